//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// script is a stand-in for the broker: what it logs, and what it does at a
// signal, are what is tested here.
func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mayflyd")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDaemon(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	d, err := startDaemon(script(t, `
n=0
trap 'n=$((n+1)); if [ $n = 1 ]; then echo "{\"level\":\"INFO\",\"msg\":\"the catalog was exchanged\"}" >&2
      elif [ $n = 2 ]; then echo "{\"level\":\"ERROR\",\"msg\":\"the catalog was not exchanged; the present one stays\"}" >&2; fi' HUP
echo '{"level":"INFO","msg":"serving"}' >&2
while :; do sleep 0.05; done
`), "x", nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	defer d.kill()
	if err := d.serving(ctx); err != nil {
		t.Fatal(err)
	}
	if taken, err := d.reload(ctx); !taken || err != nil {
		t.Errorf("a reload that was taken: %t, %v", taken, err)
	}
	if taken, err := d.reload(ctx); taken || err != nil {
		t.Errorf("a reload that was refused: %t, %v", taken, err)
	}
	short, stop := context.WithTimeout(ctx, 200*time.Millisecond)
	defer stop()
	if taken, err := d.reload(short); taken || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a reload that is not answered: %t, %v", taken, err)
	}
	if !d.alive() || d.within(10*time.Millisecond) {
		t.Error("it is dead already")
	}
	d.kill()
	if d.alive() || !d.within(time.Second) || d.atFailpoint() != "" {
		t.Error("it lives after its kill, or died of something else")
	}
	if _, err := d.reload(ctx); !errors.Is(err, errGone) {
		t.Errorf("a reload of a dead broker: %v", err)
	}
}

func TestDaemonDiesAtFailpoint(t *testing.T) {
	d, err := startDaemon(script(t, `echo '{"msg":"failpoint","name":"lease.deliver","n":3}' >&2; kill -9 $$`), "x", nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.serving(t.Context()); !errors.Is(err, errGone) {
		t.Errorf("waiting for it: %v", err)
	}
	if at := d.atFailpoint(); at != "lease.deliver" {
		t.Errorf("it died at %q", at)
	}
}

func TestArguments(t *testing.T) {
	for _, args := range [][]string{
		{"--rounds", "-1"}, {"--clients", "0"}, {"--mutate", "everything"}, {"--nonsense"}, {"more"},
	} {
		var out bytes.Buffer
		if code := command(t.Context(), args, &out, &out); code != 2 || out.Len() == 0 {
			t.Errorf("%v: exit code %d, %q", args, code, &out)
		}
	}
	var out bytes.Buffer
	if code := command(t.Context(), []string{"--mayflyd", "/nonexistent"}, &out, &out); code != 1 || !strings.Contains(out.String(), "make torture") {
		t.Errorf("without a broker: exit code %d, %q", code, &out)
	}
}
