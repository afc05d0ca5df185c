package token

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/providers"
)

func keyOf(t *testing.T, f *fixture, token string) string {
	t.Helper()
	header, _ := decoded(t, f.JWKS(), token)
	return header["kid"].(string)
}

// TestRotation: a new key signs, older tokens live on, and a key that is
// removed takes its tokens with it.
func TestRotation(t *testing.T) {
	f := newFixture(t)
	_, _, old := f.mint(t, introspectScope)
	first := keyOf(t, f, old)
	f.clock.Advance(time.Minute)
	f.newKey(t)
	f.clock.Advance(lookEvery)
	_, _, young := f.mint(t, introspectScope)
	if keyOf(t, f, young) == first {
		t.Error("the older key signs")
	}
	if len(published(t, f.JWKS())) != 2 || !f.accepts(t, old) || !f.accepts(t, young) {
		t.Error("not both keys verify")
	}
	restarted := f.open(t, configFor(f.dir))
	if _, ok := restarted.Introspect(t.Context(), old, server); !ok || !bytes.Equal(restarted.JWKS(), f.JWKS()) {
		t.Error("a restart changes the keys")
	}
	files, _ := filepath.Glob(filepath.Join(f.dir, "*.pem"))
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	f.clock.Advance(lookEvery)
	if len(published(t, f.JWKS())) != 1 || f.accepts(t, old) || !f.accepts(t, young) {
		t.Error("the removed key still verifies, or the other does not")
	}
	if err := os.Remove(files[1]); err != nil {
		t.Fatal(err)
	}
	f.clock.Advance(lookEvery)
	if f.accepts(t, young) || string(f.JWKS()) != `{"keys":[]}` {
		t.Error("without keys, a token is accepted")
	}
	if _, err := f.Mint(t.Context(), f.request(introspectScope), nil); !errors.Is(err, providers.ErrNothingMade) || errors.Is(err, providers.ErrRefused) {
		t.Errorf("mint without a key: %v", err)
	}
	f.clock.Advance(lookEvery)
	f.newKey(t)
	f.mint(t, introspectScope)
}

// TestRotationUnderLoad rotates while tokens are minted and introspected.
func TestRotationUnderLoad(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				_, _, token := f.mint(t, introspectScope)
				if !f.accepts(t, token) {
					t.Error("a fresh token is not accepted")
				}
				f.JWKS()
			}
		})
	}
	for range 5 {
		f.clock.Advance(lookEvery)
		f.newKey(t)
		f.mint(t, introspectScope)
	}
	cancel()
	wg.Wait()
}

// TestBadKeysLater: what becomes unusable while the provider is open.
func TestBadKeysLater(t *testing.T) {
	write := func(t *testing.T, path string, content []byte, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, content, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name   string
		do     func(t *testing.T, f *fixture, key string)
		signs  bool // with the key that was there
		logged string
	}{
		{"a new key that others can read", func(t *testing.T, f *fixture, _ string) {
			f.clock.Advance(time.Minute)
			if err := os.Chmod(f.newKey(t), 0o640); err != nil {
				t.Fatal(err)
			}
		}, true, "others can read it"},
		{"a new key that is none", func(t *testing.T, f *fixture, _ string) {
			write(t, filepath.Join(f.dir, "9999.pem"), []byte("-----BEGIN OOPS"), 0o600)
		}, true, "no single PEM block"},
		{"no more a key", func(t *testing.T, f *fixture, key string) { write(t, key, []byte("gone"), 0o600) }, false, "no single PEM block"},
		{"others can read the key now", func(t *testing.T, f *fixture, key string) {
			if err := os.Chmod(key, 0o644); err != nil {
				t.Fatal(err)
			}
		}, false, "others can read it"},
		{"others can look into the directory now", func(t *testing.T, f *fixture, _ string) {
			if err := os.Chmod(f.dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}, false, "others can read it"},
		{"the directory is gone", func(t *testing.T, f *fixture, _ string) {
			if err := os.RemoveAll(f.dir); err != nil {
				t.Fatal(err)
			}
		}, false, "no such file"},
		{"the directory is a file", func(t *testing.T, f *fixture, _ string) {
			// It says nothing about the keys, so they stay.
			if err := os.Rename(f.dir, f.dir+"-away"); err != nil {
				t.Fatal(err)
			}
			write(t, f.dir, nil, 0o600)
		}, true, "is no directory"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			_, _, token := f.mint(t, introspectScope)
			files, _ := filepath.Glob(filepath.Join(f.dir, "*.pem"))
			test.do(t, f, files[0])
			for range 3 {
				f.clock.Advance(lookEvery)
				if f.accepts(t, token) != test.signs {
					t.Errorf("the token is accepted: %v", !test.signs)
				}
			}
			if _, err := f.Mint(t.Context(), f.request(introspectScope), nil); (err == nil) != test.signs {
				t.Errorf("mint: %v", err)
			}
			if log := f.log.String(); strings.Count(log, test.logged) != 1 || strings.Contains(log, "OOPS") {
				t.Errorf("the log does not say %q once:\n%s", test.logged, log)
			}
		})
	}
}

func TestOpenRefusesKeys(t *testing.T) {
	good := func(t *testing.T, dir string) string {
		t.Helper()
		path, err := NewKey(dir, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ecDER, err := x509.MarshalPKCS8PrivateKey(ecKey)
	if err != nil {
		t.Fatal(err)
	}
	file := func(content []byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			good(t, dir)
			if err := os.WriteFile(filepath.Join(dir, "0.pem"), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	chmod := func(mode os.FileMode, directory bool) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			path := good(t, dir)
			if directory {
				path = dir
			}
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, test := range []struct {
		name, want string
		do         func(*testing.T, string)
	}{
		{"none", "make one with", func(t *testing.T, dir string) {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}},
		{"no directory", "no such file", func(*testing.T, string) {}},
		{"group can read", "mode 0640 and must have 0600", chmod(0o640, false)},
		{"others can read", "mode 0604 and must have 0600", chmod(0o604, false)},
		{"group can write", "mode 0620 and must have 0600", chmod(0o620, false)},
		{"directory open to group", "mode 0750 and must have 0700", chmod(0o750, true)},
		{"no PEM", "no single PEM block", file([]byte("secret stuff"))},
		{"other PEM", "no single PEM block", file(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ecDER}))},
		{"more than one", "no single PEM block", file(append(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: ecDER}), "secret stuff"...))},
		{"no PKCS #8", "holds no PKCS #8", file(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: []byte("secret stuff")}))},
		{"ECDSA", "not an Ed25519 key", file(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: ecDER}))},
		{"a directory", "no regular file", func(t *testing.T, dir string) {
			good(t, dir)
			if err := os.Mkdir(filepath.Join(dir, "x.pem"), 0o700); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "keys")
			test.do(t, dir)
			_, err := Driver{}.Open(t.Context(), providers.Config{Raw: configFor(dir), Log: slog.New(slog.DiscardHandler), Now: time.Now})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("%v, want %q", err, test.want)
			}
			if strings.Contains(err.Error(), "secret stuff") {
				t.Error("the error shows the file's content")
			}
		})
	}
	dir := t.TempDir()
	for name, c := range map[string]providers.Config{
		"no log":   {Raw: configFor(dir), Now: time.Now},
		"no clock": {Raw: configFor(dir), Log: slog.New(slog.DiscardHandler)},
	} {
		if _, err := (Driver{}).Open(t.Context(), c); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
}

func TestNewKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "keys")
	now := time.Date(2026, 11, 23, 10, 0, 0, 5, time.FixedZone("", 3600))
	path, err := NewKey(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	if filepath.Base(path) != "2026-11-23T09-00-00Z.pem" {
		t.Errorf("path %s", path)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v (%v)", info.Mode(), err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory %v (%v)", info.Mode(), err)
	}
	before, _ := os.ReadFile(path)
	for name, at := range map[string]time.Time{"the same second": now, "an earlier one": now.Add(-time.Hour)} {
		if _, err := NewKey(dir, at); err == nil {
			t.Errorf("a key of %s was made, and would never sign", name)
		}
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("the key was replaced")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("%d files are left", len(entries))
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := NewKey(dir, now.Add(time.Hour)); !errors.Is(err, errExposed) {
		t.Errorf("into a directory that others can read: %v", err)
	}
}
