package vault

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// envVaultArgs has the test binary be Vault's command: this machine has none.
const envVaultArgs = "MAYFLY_TEST_VAULT_ARGS"

// TestBeVaultCommand is no test: it stands in for those of Vault's commands
// that the printed script has, and does what they do through Vault's API.
func TestBeVaultCommand(t *testing.T) {
	args := strings.Fields(os.Getenv(envVaultArgs))
	if len(args) == 0 {
		return
	}
	fail := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "vault: "+format+"\n", args...)
		os.Exit(1)
	}
	c, err := newAPI(endpoint{address: os.Getenv("VAULT_ADDR"), namespace: os.Getenv("VAULT_NAMESPACE")}, newTransport(nil, true))
	if err != nil {
		fail("%v", err)
	}
	c.SetToken(os.Getenv("VAULT_TOKEN"))
	input := func() []byte {
		b, err := io.ReadAll(os.Stdin)
		if err != nil {
			fail("%v", err)
		}
		return b
	}
	switch line := strings.Join(args, " "); {
	case strings.HasPrefix(line, "policy write ") && len(args) == 4 && args[3] == "-":
		_, err = c.Logical().Write("sys/policies/acl/"+args[2], map[string]any{"policy": string(input())})
	case strings.HasPrefix(line, "write ") && len(args) == 3 && args[2] == "-":
		var body map[string]any
		if err = json.Unmarshal(input(), &body); err == nil {
			_, err = c.Logical().Write(args[1], body)
		}
	case line == "auth list -format=json":
		secret, listErr := c.Logical().Read("sys/auth")
		if err = listErr; err == nil {
			err = json.NewEncoder(os.Stdout).Encode(secret.Data)
		}
	case strings.HasPrefix(line, "auth enable -path=") && len(args) == 4:
		_, err = c.Logical().Write("sys/auth/"+strings.TrimPrefix(args[2], "-path="), map[string]any{"type": args[3]})
	default:
		fail("no such command: %s", line)
	}
	if err != nil {
		fail("%v", err)
	}
	os.Exit(0)
}

// TestPrintedScript: the script that is printed does the whole setup, may be
// run again, and leases work after it.
func TestPrintedScript(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	config, err := vaultscope.ParseConfig(w.config())
	if err != nil {
		t.Fatal(err)
	}
	tool := w.database()
	s, err := vaultscope.NewSetup(config, []broker.Tool{tool}, vaultscope.Options{Broker: brokerID, PublicKeys: w.jwtKeys()})
	if err != nil {
		t.Fatal(err)
	}
	w.super("%s", s.SQL()+"ALTER ROLE "+w.sweep()+" PASSWORD 'sweep-password';")
	dir := t.TempDir()
	shim := "#!/bin/sh\nexec env " + envVaultArgs + "=\"$*\" '" + os.Args[0] + "' -test.run '^TestBeVaultCommand$'\n"
	if err := os.WriteFile(filepath.Join(dir, "vault"), []byte(shim), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		cmd := exec.CommandContext(t.Context(), "sh")
		cmd.Stdin = strings.NewReader(s.Shell())
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "VAULT_TOKEN="+v.root, "VAULT_NAMESPACE=", "VAULT_ADDR=",
			"GORACE=atexit_sleep_ms=0") // a process with the race detector lingers for a second otherwise
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	findings, err := Driver{Login: w.login, CheckToken: v.root}.CheckLive(t.Context(),
		providers.Config{Name: "vault", Installation: w.installation, Raw: w.config(), Log: discard(), Now: time.Now}, []broker.Tool{tool})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		if f.Bad {
			t.Error(f.Message)
		}
	}
	p := w.open()
	a := w.mint(p, tool, 2*time.Minute)
	if !w.connects(a.minted.Secret) {
		t.Error("a lease does not work")
	}
	if d := p.Revoke(t.Context(), []providers.Ending{a.ending()}); d[0].Progress != broker.ProgressVerified {
		t.Errorf("%+v", d)
	}
}
