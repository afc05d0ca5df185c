package vault

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// newPKI mounts an authority.
func (w *world) newPKI(leases bool) broker.Tool {
	w.write("sys/mounts/"+w.mount("pki"), map[string]any{"type": "pki", "config": map[string]any{"max_lease_ttl": "720h"}})
	w.write(w.mount("pki")+"/root/generate/internal", map[string]any{"common_name": "acme", "ttl": "720h"})
	w.write(w.mount("pki")+"/roles/web", map[string]any{
		"allowed_domains": "acme.test", "allow_subdomains": true, "max_ttl": "1h", "generate_lease": leases, "key_type": "ec", "key_bits": 256,
	})
	return broker.Tool{Name: "web.cert", Provider: "vault", MaxTTL: 10 * time.Minute, Scope: json.RawMessage(fmt.Sprintf(
		`{"engine":"pki","path":"%s/issue/web","data":{"common_name":"web.acme.test"}}`, w.mount("pki")))}
}

func certificateOf(t testing.TB, secret broker.Secret) *x509.Certificate {
	t.Helper()
	text, _ := secret.Reveal("certificate")
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatal("there is no certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// onList reports whether Vault's revocation list has the certificate.
func (w *world) onList(cert *x509.Certificate) bool {
	w.t.Helper()
	resp, err := http.Get(w.v.address() + "/v1/" + w.mount("pki") + "/crl")
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	var der [1 << 16]byte
	n := 0
	for {
		m, err := resp.Body.Read(der[n:])
		n += m
		if err != nil {
			break
		}
	}
	list, err := x509.ParseRevocationList(der[:n])
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range list.RevokedCertificateEntries {
		if e.SerialNumber.Cmp(cert.SerialNumber) == 0 {
			return true
		}
	}
	return false
}

// TestPKI: with a lease a certificate goes onto the revocation list; without,
// nothing reaches it. Either way it is dead when it has expired, and not before.
func TestPKI(t *testing.T) {
	v, pg := servers(t)
	for name, leases := range map[string]bool{"with leases": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, v, pg)
			clock := providertest.NewClock(time.Now())
			w.now, w.noDirect = clock.Now, true
			tool := w.newPKI(leases)
			p := w.setup(tool).open()
			clock.AdvanceTo(time.Now()) // Vault's clock went on meanwhile
			a := w.mint(p, tool, time.Minute)
			cert := certificateOf(t, a.minted.Secret)
			if !a.minted.DiesAt.After(cert.NotAfter) || a.minted.DiesAt.After(a.req.End) {
				t.Errorf("it dies at %s; its NotAfter is %s, and %s was asked for", a.minted.DiesAt, cert.NotAfter, a.req.End)
			}
			if !a.minted.Ends.Equal(cert.NotAfter) {
				t.Errorf("it ends at %s", a.minted.Ends)
			}
			if !strings.Contains(a.minted.Survives, stamp(cert.NotAfter)) {
				t.Errorf("what survives: %q", a.minted.Survives)
			}
			want := broker.ProgressRequested
			if leases {
				want = broker.ProgressWritten
			}
			d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]
			if d.Err != nil || d.Progress != want || !d.RetryAt.Equal(a.minted.DiesAt) {
				t.Fatalf("%+v, want %q and to look again at %s", d, want, a.minted.DiesAt)
			}
			if w.onList(cert) != leases {
				t.Errorf("on the list: %v", w.onList(cert))
			}
			if w.tokenLives(handleOf(t, a.minted.Handle).Accessor) {
				t.Error("the token lives")
			}
			clock.AdvanceTo(a.minted.DiesAt)
			for what, ask := range map[string]func(context.Context, []providers.Ending) []providers.Death{"Revoke": p.Revoke, "Confirm": p.Confirm} {
				if d := ask(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified {
					t.Errorf("%s when it has expired: %+v", what, d)
				}
			}
		})
	}
}

// TestSSH: a signed key is dead when it expires, by what ssh-keygen reads.
func TestSSH(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	clock := providertest.NewClock(time.Now())
	w.now, w.noDirect = clock.Now, true
	w.write("sys/mounts/"+w.mount("ssh"), map[string]any{"type": "ssh"})
	w.write(w.mount("ssh")+"/config/ca", map[string]any{"generate_signing_key": true, "key_type": "ed25519"})
	w.write(w.mount("ssh")+"/roles/ops", map[string]any{"key_type": "ca", "allow_user_certificates": true, "allowed_users": "ops", "default_user": "ops", "max_ttl": "1h"})
	tool := broker.Tool{Name: "ssh.ops", Provider: "vault", MaxTTL: 10 * time.Minute, Scope: json.RawMessage(fmt.Sprintf(
		`{"engine":"ssh","path":"%s/sign/ops","data":{"public_key":"${params.key}","valid_principals":"ops"}}`, w.mount("ssh"))),
		Params: []broker.Param{{Name: "key", Type: broker.ParamString}}}
	p := w.setup(tool).open()
	for _, kind := range []string{"ed25519", "rsa", "ecdsa"} {
		dir := t.TempDir()
		file := filepath.Join(dir, "key")
		if out, err := exec.Command("ssh-keygen", "-q", "-t", kind, "-N", "", "-f", file).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		public, err := os.ReadFile(file + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		clock = providertest.NewClock(time.Now())
		p.now, w.now = clock.Now, clock.Now
		req := w.request(tool, time.Minute)
		req.Params = map[string]string{"key": strings.TrimSpace(string(public))}
		a := mint(t.Context(), p, req)
		if a.err != nil {
			t.Fatal(a.err)
		}
		signed, _ := a.minted.Secret.Reveal("signed_key")
		if err := os.WriteFile(file+"-cert.pub", []byte(signed), 0o600); err != nil {
			t.Fatal(err)
		}
		show := exec.Command("ssh-keygen", "-L", "-f", file+"-cert.pub")
		show.Env = append(os.Environ(), "TZ=UTC")
		out, err := show.CombinedOutput()
		if want := "to " + a.minted.Ends.UTC().Format("2006-01-02T15:04:05"); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: it ends %q, and ssh-keygen says\n%s", kind, want, out)
		}
		if a.minted.DiesAt.After(req.End) {
			t.Errorf("%s: it dies at %s, after %s", kind, a.minted.DiesAt, req.End)
		}
		d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]
		if d.Err != nil || d.Progress != broker.ProgressRequested || !d.RetryAt.Equal(a.minted.DiesAt) {
			t.Errorf("%s: %+v", kind, d)
		}
		clock.AdvanceTo(a.minted.DiesAt)
		if d := p.Confirm(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified {
			t.Errorf("%s: %+v", kind, d)
		}
	}
}

// TestStatic: a KV secret is read through a lease, and its lease lapses.
func TestStatic(t *testing.T) {
	v, pg := servers(t)
	for version, path := range map[int]string{1: "app/key", 2: "data/app/key"} {
		w := newWorld(t, v, pg)
		w.noDirect = true
		mount := w.mount("kv")
		w.write("sys/mounts/"+mount, map[string]any{"type": "kv", "options": map[string]any{"version": fmt.Sprint(version)}})
		value := map[string]any{"api_key": "a-static-secret", "rotations": 3}
		body := value
		if version == 2 {
			body = map[string]any{"data": value}
		}
		tool := broker.Tool{Name: "mail.key", Provider: "vault", MaxTTL: time.Minute, Scope: json.RawMessage(fmt.Sprintf(
			`{"engine":"kv","version":%d,"path":"%s/%s","fields":["api_key","rotations"]}`, version, mount, path))}
		p := w.setup(tool).open()
		none := mint(t.Context(), p, w.request(tool, time.Minute))
		wantRefused(t, none, broker.ReasonProviderRefused)
		if _, err := v.client.Logical().Write(mount+"/"+path, body); err != nil {
			t.Fatal(err)
		}
		a := w.mint(p, tool, time.Minute)
		if key, _ := a.minted.Secret.Reveal("api_key"); key != "a-static-secret" {
			t.Errorf("version %d: %q", version, key)
		}
		if n, _ := a.minted.Secret.Reveal("rotations"); n != "3" {
			t.Errorf("version %d: %q", version, n)
		}
		if !a.minted.Static || !a.minted.DiesAt.IsZero() {
			t.Errorf("version %d: %+v", version, a.minted)
		}
		if d := p.Confirm(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressNone || d.Lapsed {
			t.Errorf("version %d, not ended: %+v", version, d)
		}
		d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]
		if d.Err != nil || !d.Lapsed || d.Progress == broker.ProgressVerified {
			t.Errorf("version %d: %+v", version, d)
		}
		if w.tokenLives(handleOf(t, a.minted.Handle).Accessor) {
			t.Error("the token lives")
		}
	}
}

// wantRefused checks an attempt that made nothing.
func wantRefused(t testing.TB, a *attempt, reason broker.Reason) {
	t.Helper()
	if !isNothing(a.err) || broker.ReasonOf(a.err) != reason {
		t.Errorf("%v, want nothing made and %s", a.err, reason)
	}
}

// TestOther: what is no engine that we know goes by its lease.
func TestOther(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	w.noDirect = true
	w.write("sys/mounts/"+w.mount("transit"), map[string]any{"type": "transit"})
	w.write(w.mount("transit")+"/keys/k", nil)
	leased := broker.Tool{Name: "leased", Provider: "vault", MaxTTL: time.Minute, Scope: json.RawMessage(fmt.Sprintf(
		`{"engine":"other","path":"%s/creds/plain","fields":["username","password"]}`, w.mount("database")))}
	unleased := broker.Tool{Name: "unleased", Provider: "vault", MaxTTL: time.Minute, Scope: json.RawMessage(fmt.Sprintf(
		`{"engine":"other","path":"%s/datakey/plaintext/k","method":"write","fields":["plaintext"]}`, w.mount("transit")))}
	p := w.setup(leased, unleased).open()
	w.write(w.mount("database")+"/config/mayfly", map[string]any{"plugin_name": "postgresql-database-plugin", "allowed_roles": "*"})
	w.write(w.mount("database")+"/roles/plain", map[string]any{"db_name": "mayfly", "default_ttl": "30s", "max_ttl": "30s",
		"creation_statements":   []string{`CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}';`},
		"revocation_statements": []string{`DROP ROLE IF EXISTS "{{name}}";`}})
	a := w.mint(p, leased, time.Minute)
	if !w.connects(a.minted.Secret) {
		t.Error("it does not work")
	}
	if d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]; d.Progress != broker.ProgressVerified || w.connects(a.minted.Secret) {
		t.Errorf("%+v", d)
	}
	b := mint(t.Context(), p, w.request(unleased, time.Minute))
	if b.err == nil || isNothing(b.err) || !b.minted.Secret.IsZero() {
		t.Errorf("without a lease nothing could end it, and it is not certain that nothing was made: %v", b.err)
	}
}

// TestTooLong: Vault's roles decide how long credentials live, and one that
// gives more than the catalog says is refused, with nothing left.
func TestTooLong(t *testing.T) {
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	p := w.setup(w.database()).open()
	w.write(w.mount("database")+"/roles/crm-read-10s", map[string]any{"db_name": "mayfly", "default_ttl": "1h", "max_ttl": "1h",
		"creation_statements": []string{`CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}';`}})
	a := mint(t.Context(), p, w.request(w.database(), 30*time.Second))
	wantRefused(t, a, broker.ReasonProviderRefused)
	if !strings.Contains(a.err.Error(), "default_ttl") {
		t.Errorf("the operator is told: %v", a.err)
	}
	if left := w.rolesOf(a.req.Lease); len(left) > 0 || w.tokenLives(handleOf(t, a.recorded[0]).Accessor) {
		t.Errorf("left: %q", left)
	}
	// One whose name is not the lease's would never be found by us.
	w.write(w.mount("database")+"/config/mayfly", map[string]any{"plugin_name": "postgresql-database-plugin", "username_template": `x_{{random 20}}`})
	b := mint(t.Context(), p, w.request(w.database(), 2*time.Minute))
	wantRefused(t, b, broker.ReasonProviderRefused)
	if left := w.roles("x_"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestAWS: AWS is not here. A handler stands in for Vault's whole API with
// answers as Vault's AWS engine gives them, so that this tests what becomes of
// each kind of key, and nothing of AWS or of Vault.
func TestAWS(t *testing.T) {
	for kind, want := range map[string]broker.Progress{"iam_user": broker.ProgressVerified, "assumed_role": broker.ProgressRequested} {
		t.Run(kind, func(t *testing.T) {
			var asked []string
			fake := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				asked = append(asked, r.Method+" "+r.URL.RequestURI())
				rw.Header().Set("Content-Type", "application/json")
				switch {
				case strings.HasSuffix(r.URL.Path, "/login"):
					fmt.Fprint(rw, `{"auth":{"client_token":"s.broker","lease_duration":900}}`)
				case strings.HasPrefix(r.URL.Path, "/v1/auth/token/create/"):
					fmt.Fprint(rw, `{"auth":{"client_token":"s.lease","accessor":"an-accessor","lease_duration":900}}`)
				case r.URL.Path == "/v1/aws/creds/deploy":
					if r.Header.Get("X-Vault-Token") != "s.lease" {
						rw.WriteHeader(http.StatusForbidden)
						return
					}
					fmt.Fprint(rw, `{"lease_id":"aws/creds/deploy/abc","lease_duration":900,"renewable":false,"data":{"access_key":"AKIA","secret_key":"a-secret","session_token":"a-session"}}`)
				default:
					rw.WriteHeader(http.StatusNoContent)
				}
			}))
			defer fake.Close()
			v, pg := servers(t)
			w := newWorld(t, v, pg)
			w.address, w.noDirect = fake.URL, true
			p := w.open()
			tool := broker.Tool{Name: "aws.deploy", MaxTTL: time.Hour, Scope: json.RawMessage(`{"engine":"aws","path":"aws/creds/deploy","credential_type":"` + kind + `"}`)}
			a := w.mint(p, tool, 15*time.Minute)
			if d := p.Revoke(t.Context(), []providers.Ending{a.ending()})[0]; d.Err != nil || d.Progress != want {
				t.Errorf("%+v, want %q", d, want)
			}
			calls := strings.Join(asked, "\n")
			if revoked := strings.Contains(calls, "sys/leases/revoke/aws/creds/deploy/abc"); revoked != (kind == "iam_user") {
				t.Errorf("the lease was revoked: %v; the calls:\n%s", revoked, calls)
			}
			if ttl := strings.Contains(calls, "GET /v1/aws/creds/deploy?ttl=900s"); ttl != (kind != "iam_user") {
				t.Errorf("the calls:\n%s", calls)
			}
			if !strings.Contains(calls, "PUT /v1/auth/token/revoke-accessor") {
				t.Errorf("the calls:\n%s", calls)
			}
		})
	}
}

// FuzzValidBefore reads nothing into what is no signed key.
func FuzzValidBefore(f *testing.F) {
	f.Add("ssh-ed25519-cert-v01@openssh.com AAAAIHNzaC1lZDI1NTE5LWNlcnQtdjAxQG9wZW5zc2guY29t")
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		if at, err := validBefore(map[string]any{"signed_key": text}); err == nil && at.IsZero() {
			t.Error("no instant and no error")
		}
	})
}
