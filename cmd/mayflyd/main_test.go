package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// TestWrongUse: what fails says what to do next.
func TestWrongUse(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"frobnicate"}, []string{`unknown command "frobnicate"`, "see `mayflyd --help`"}},
		{[]string{"server"}, []string{"mayflyd server needs --config", "see `mayflyd server --help`"}},
		{[]string{"server", "--frob"}, []string{"unknown flag: --frob", "see `mayflyd server --help`"}},
		{[]string{"recover", "--dir", "x"}, []string{"mayflyd recover needs --principal, --reason; see `mayflyd recover --help`"}},
		{[]string{"dev", "--dir", filepath.Join(t.TempDir(), "s"), "--people-listen", ln.Addr().String()}, []string{"address already in use", "stop it, or choose another address"}},
	} {
		err := execute(t.Context(), c.args)
		if err == nil {
			t.Errorf("%v: no error", c.args)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v: %q does not say %q", c.args, err, want)
			}
		}
	}
}
