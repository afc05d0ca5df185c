package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// personAt is a person's command at a stand-in.
func personAt(t *testing.T, r *rig, stderr io.Writer, args ...string) *program {
	t.Helper()
	return &program{
		args: args, stdin: strings.NewReader(""), stdout: io.Discard, stderr: stderr, now: time.Now,
		environ: []string{"MAYFLY_PEOPLE_ADDR=" + r.people, "MAYFLY_PEOPLE_CA=" + r.ca, "XDG_CONFIG_HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH")},
	}
}

func rigFor(t *testing.T) *rig {
	t.Helper()
	r, stop, err := newRig()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return r
}

// addresses reads what a command says, and passes on the address to sign in at.
type addresses struct{ c chan string }

func (a addresses) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		if at := strings.TrimSpace(line); strings.HasPrefix(at, "https://") {
			a.c <- at
		}
	}
	return len(b), nil
}

// The address that is shown works in any browser; what another sign-in brings
// does not end it.
func TestLoginWithoutABrowser(t *testing.T) {
	r := rigFor(t)
	shown := addresses{make(chan string, 1)}
	p := personAt(t, r, shown, "login", "--no-browser")
	done := make(chan int, 1)
	go func() { done <- p.run(t.Context()) }()
	at, err := url.Parse(<-shown.c)
	if err != nil {
		t.Fatal(err)
	}
	q := at.Query()
	if at.Scheme+"://"+at.Host != r.people || at.Path != "/signin" || len(q["code_challenge"]) != 1 || len(q.Get("code_challenge")) != 43 || len(q.Get("state")) < 22 {
		t.Fatalf("it shows %s", at)
	}
	if status, _, _ := knock(t, "GET", q.Get("redirect_uri")+"?code=evil&state=evil", ""); status != 400 {
		t.Errorf("another's callback: status %d", status)
	}
	t.Setenv("MAYFLY_PEOPLE_CA", r.ca)
	oldArgs := os.Args
	os.Args = []string{"browser", at.String()}
	defer func() { os.Args = oldArgs }()
	browser()
	if code := <-done; code != 0 {
		t.Fatalf("it exits with %d", code)
	}
	if n := r.Calls("RedeemCode"); n != 1 {
		t.Errorf("%d codes were redeemed", n)
	}
}

func TestLoginGivesUp(t *testing.T) {
	r := rigFor(t)
	var said strings.Builder
	p := personAt(t, r, &said, "login", "--no-browser")
	p.signInLimit = 20 * time.Millisecond
	if code := p.run(t.Context()); code != exitIdentity || !strings.Contains(said.String(), "nobody came back from the browser in time") {
		t.Errorf("it exits with %d and says %s", code, said.String())
	}
	// A browser that there is not is no failure: the address is shown.
	said.Reset()
	p = personAt(t, r, &said, "login")
	p.signInLimit = 20 * time.Millisecond
	p.environ = append(p.environ, "BROWSER=/nothing/that/there/is")
	if code := p.run(t.Context()); code != exitIdentity || !strings.Contains(said.String(), "open this in a browser on this machine") {
		t.Errorf("it exits with %d and says %s", code, said.String())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if code := personAt(t, r, io.Discard, "login", "--no-browser").run(ctx); code != exitSignal+2 {
		t.Errorf("interrupted, it exits with %d", code)
	}
}

// BROWSER is a command and no line for a shell.
func TestBrowserCommand(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "see")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nprintf '%s|' \"$@\" > "+dir+"/part && mv "+dir+"/part "+dir+"/seen\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	const address = "https://broker.test/signin?a=1&b=$(touch${IFS}pwned);'"
	for command, want := range map[string]string{
		script:                      address + "|",
		script + " --new-window %s": "--new-window|" + address + "|",
		script + " a --url=%s b":    "a|--url=" + address + "|b|",
	} {
		p := &program{environ: []string{"BROWSER=" + command, "PATH=" + os.Getenv("PATH")}}
		if err := p.openBrowser(address); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for got == nil {
			got, _ = os.ReadFile(dir + "/seen")
			time.Sleep(time.Millisecond) // another process writes it
		}
		if string(got) != want {
			t.Errorf("%s got %q", command, got)
		}
		if err := os.Remove(dir + "/seen"); err != nil {
			t.Fatal(err)
		}
	}
}

// Others can neither read the session nor put one in its place.
func TestSessionFile(t *testing.T) {
	const addr = "https://broker.test:8444"
	config := t.TempDir()
	p := &program{environ: []string{"XDG_CONFIG_HOME=" + config}}
	kept := client.Session{Person: "ada@acme.test", Token: client.NewToken("mfs_secret"), ExpiresAt: time.Now().Add(time.Hour)}
	if err := p.saveSession(addr+"/", kept); err != nil {
		t.Fatal(err)
	}
	path, err := p.sessionPath(addr)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := p.loadSession(addr); err != nil || s.Token != "mfs_secret" || s.Person != "ada@acme.test" {
		t.Fatalf("it reads %+v, %v", s, err)
	}
	if _, err := p.loadSession("https://broker.test:8445"); broker.ReasonOf(err) != broker.ReasonUnauthenticated {
		t.Errorf("the session of another broker: %v", err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o602, 0o666, 0o601} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if s, err := p.loadSession(addr); codeOf(err) != exitIdentity || s.Token != "" || strings.Contains(fmt.Sprint(err), "mfs_secret") {
			t.Errorf("mode %o: %+v, %v", mode, s, err)
		}
		if err := p.saveSession(addr, kept); err == nil {
			t.Errorf("a file with mode %o was written to", mode)
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}

	// A link is not followed, neither in reading nor in writing.
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Rename(path, elsewhere); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, path); err != nil {
		t.Fatal(err)
	}
	if s, err := p.loadSession(addr); err == nil || s.Token != "" {
		t.Errorf("through a link: %+v, %v", s, err)
	}
	if err := p.saveSession(addr, kept); err == nil {
		t.Error("it was written through a link")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}

	// Neither is what is none, or another's.
	for _, doc := range []any{nil, map[string]string{}, session{Addr: addr}, session{Addr: "https://evil.test", Token: "x"}, strings.Repeat("x", 2*maxOwn)} {
		b, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := p.loadSession(addr); codeOf(err) != exitIdentity || s.Token != "" {
			t.Errorf("%.40s: %+v, %v", b, s, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := p.loadSession(addr); err == nil {
		t.Error("a directory was taken for a session")
	}

	for _, environ := range [][]string{nil, {"HOME="}, {"XDG_CONFIG_HOME=relative", "HOME=relative"}} {
		if _, err := (&program{environ: environ}).sessionPath(addr); codeOf(err) != exitUsage {
			t.Errorf("%v: %v", environ, err)
		}
	}
	if at, err := (&program{environ: []string{"XDG_CONFIG_HOME=relative", "HOME=/home/ada"}}).sessionPath(addr); err != nil || !strings.HasPrefix(at, "/home/ada/.config/mayfly/session-") {
		t.Errorf("%s, %v", at, err)
	}
}

// A yes is only y or yes.
func TestAgree(t *testing.T) {
	for typed, ok := range map[string]bool{"y\n": true, "Yes\n": true, " y ": true, "": false, "\n": false, "n\n": false, "yess\n": false, "approve\n": false, "j\n": false} {
		p := &program{stdin: strings.NewReader(typed), stderr: io.Discard, terminal: func() bool { return true }}
		if err := p.agree("?"); (err == nil) != ok || err != nil && codeOf(err) != exitRefused {
			t.Errorf("%q: %v", typed, err)
		}
	}
	if err := (&program{stdin: strings.NewReader("y\n"), stderr: io.Discard}).agree("?"); codeOf(err) != exitUsage {
		t.Errorf("without a terminal: %v", err)
	}
}

// On a terminal the count down stays on one line.
func TestCountDownOnATerminal(t *testing.T) {
	r := rigFor(t)
	r.Ends = endsOf(3, 1, 0)
	var said strings.Builder
	p := &program{
		args: []string{"revoke", "--all", "--yes", "--reason", "r"}, environ: r.env, stdin: strings.NewReader(""), stdout: io.Discard, stderr: &said,
		now: time.Now, screen: func() bool { return true },
	}
	if code := p.run(t.Context()); code != 0 {
		t.Fatalf("it exits with %d: %s", code, said.String())
	}
	if got, want := said.String(), "\r\x1b[K3 of 3 leases alive\r\x1b[K1 of 3 leases alive\r\x1b[K0 of 3 leases alive\n"; got != want {
		t.Errorf("it says %q", got)
	}
	// What lapsed is over, and nobody knows that it is dead.
	r.Lock()
	r.Ends[2].Lapsed = 1
	r.Unlock()
	p.args = append(p.args, "-o", "json")
	if code := p.run(t.Context()); code != exitAlive {
		t.Errorf("with a lapsed lease it exits with %d", code)
	}
}
