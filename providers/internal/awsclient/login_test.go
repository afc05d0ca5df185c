package awsclient

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	const keys = `{"access_key_id":"AKIA","secret_access_key":"secret"}`
	write(keys, 0o600)
	if got, err := readKeys(path); err != nil || got.AccessKeyID != "AKIA" || got.SecretAccessKey != "secret" {
		t.Fatal(got.AccessKeyID, err)
	}
	if _, err := readKeys(path + "x"); err == nil {
		t.Error("there is no such file")
	}
	if _, err := readKeys(t.TempDir()); err == nil {
		t.Error("a directory is taken for keys")
	}
	for text, mode := range map[string]os.FileMode{
		keys:                              0o640, // others may read it
		"AKIA:secret":                     0o600,
		`{"access_key_id":"AKIA"}`:        0o600,
		`{"secret_access_key":"secret"}`:  0o600,
		keys + strings.Repeat(" ", 4<<10): 0o600,
	} {
		write(text, mode)
		if _, err := readKeys(path); err == nil || strings.Contains(err.Error(), "secret:") || mode == 0o640 && !strings.Contains(err.Error(), "0600") {
			t.Errorf("%.40s with %o: %v", text, mode, err)
		}
	}
}
