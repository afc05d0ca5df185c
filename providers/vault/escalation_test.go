package vault

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/attestation/devtrust"
	"github.com/mayfly-security/mayfly/attestation/spiffe"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// somebodysKey is a public key, for SSH to sign.
const somebodysKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBbLXXSK/Ap4PBjbjaGY9EqRQ+BgrR9ceYT1rC8LmL+F"

// thief has the broker's login to a Vault that is set up exactly as `mayfly
// vault setup` prints, beside things of others.
type thief struct {
	*world
	config  vaultscope.Config
	stolen  string // the broker's token
	tool    broker.Tool
	second  broker.Tool // another of the broker's tools
	signed  broker.Tool // of an engine that is written to
	foreign string      // a lease of somebody else's
	others  map[spiffeid.ID]attestation.LoginSource
}

func newThief(t *testing.T) *thief {
	t.Helper()
	v, pg := servers(t)
	w := newWorld(t, v, pg)
	h := &thief{world: w, tool: w.database(), others: map[spiffeid.ID]attestation.LoginSource{}}
	h.second = broker.Tool{Name: "pay.write", Provider: "vault", MaxTTL: 5 * time.Minute,
		Scope: json.RawMessage(fmt.Sprintf(`{"engine":"database","path":"%s/creds/pay"}`, w.mount("database")))}
	h.signed = broker.Tool{Name: "ops.ssh", Provider: "vault", MaxTTL: 5 * time.Minute, Params: []broker.Param{{Name: "key", Type: broker.ParamString}},
		Scope: json.RawMessage(fmt.Sprintf(`{"engine":"ssh","path":"%s/sign/ops","data":{"public_key":"${params.key}","valid_principals":"deploy"}}`, w.mount("ssh")))}
	w.setup(h.tool, h.second, h.signed)
	var err error
	if h.config, err = vaultscope.ParseConfig(w.config()); err != nil {
		t.Fatal(err)
	}
	// What is others', and roles that a thief would like.
	w.write("sys/policies/acl/"+w.id+"admin", map[string]any{"policy": `path "*" { capabilities = ["create", "read", "update", "delete", "list", "sudo"] }`})
	w.write("auth/token/roles/"+w.id+"other", map[string]any{"allowed_policies": w.id + "admin"})
	w.write("auth/token/roles/"+w.id+"glob", map[string]any{"allowed_policies_glob": "*"})
	w.write("auth/"+w.mount("jwt")+"/role/admin", map[string]any{"role_type": "jwt", "user_claim": "sub", "bound_audiences": audience,
		"bound_subject": "spiffe://acme.test/admin", "token_policies": w.id + "admin"})
	w.write("sys/mounts/"+w.mount("kv"), map[string]any{"type": "kv"})
	w.write(w.mount("kv")+"/secret", map[string]any{"k": "v"})
	w.write("sys/mounts/"+w.mount("ssh"), map[string]any{"type": "ssh"})
	w.write(w.mount("ssh")+"/config/ca", map[string]any{"generate_signing_key": true})
	w.write(w.mount("ssh")+"/roles/ops", map[string]any{"key_type": "ca", "allow_user_certificates": true, "allowed_users": "deploy,root", "default_user": "root"})
	w.write("sys/mounts/"+w.mount("theirs"), map[string]any{"type": "database"})
	w.write(w.mount("theirs")+"/config/mayfly", map[string]any{
		"plugin_name": "postgresql-database-plugin", "username": "vault", "password": "vault-password", "allowed_roles": "*",
		"connection_url": fmt.Sprintf("postgresql://{{username}}:{{password}}@127.0.0.1:%d/crm?sslmode=disable", pg.port),
	})
	w.write(w.mount("theirs")+"/roles/app", map[string]any{"db_name": "mayfly", "default_ttl": "10m",
		"creation_statements":   `CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}';`,
		"revocation_statements": `DROP ROLE IF EXISTS "{{name}}";`}) // Vault's own would look into everybody's tables
	theirs, err := w.v.client.Logical().Read(w.mount("theirs") + "/creds/app")
	if err != nil {
		t.Fatal(err)
	}
	h.foreign = theirs.LeaseID
	if h.stolen, err = h.enter("mayfly", brokerID, audience); err != nil {
		t.Fatal(err)
	}
	return h
}

// enter logs in to Vault as an identity of the trust domain.
func (h *thief) enter(role string, id spiffeid.ID, audience string) (string, error) {
	login := h.login
	if id != brokerID {
		if h.others[id] == nil {
			addr, err := h.trust.Add(devtrust.Identity{ID: id})
			if err != nil {
				h.t.Fatal(err)
			}
			src, err := spiffe.Open(h.t.Context(), spiffe.Config{Addr: addr, Log: discard()})
			if err != nil {
				h.t.Fatal(err)
			}
			h.t.Cleanup(func() { src.Close() })
			h.others[id] = src
		}
		login = h.others[id]
	}
	svid, _, err := login.JWTSVID(h.t.Context(), audience)
	if err != nil {
		h.t.Fatal(err)
	}
	secret, err := h.call("", http.MethodPost, h.config.LoginPath(), map[string]any{"role": role, "jwt": svid})
	if err != nil {
		return "", err
	}
	return secret.Auth.ClientToken, nil
}

// call makes one call with a token.
func (h *thief) call(token, method, path string, body map[string]any) (*api.Secret, error) {
	c, err := h.v.client.Clone()
	if err != nil {
		h.t.Fatal(err)
	}
	c.SetToken(token)
	ctx := h.t.Context()
	switch method {
	case http.MethodGet:
		return c.Logical().ReadWithContext(ctx, path)
	case "LIST":
		return c.Logical().ListWithContext(ctx, path)
	case http.MethodDelete:
		return c.Logical().DeleteWithContext(ctx, path)
	}
	return c.Logical().WriteWithContext(ctx, path, body)
}

// made makes a token for a lease, as the broker does; more is added to what is asked for.
func (h *thief) made(tool broker.Tool, more map[string]any) (*api.Secret, error) {
	body := map[string]any{"explicit_max_ttl": "1m", "ttl": "1m", "meta": map[string]string{"mayfly_lease": "l"},
		"display_name": vaultscope.DisplayName(h.installation, broker.NewLeaseID(time.Now()))}
	for k, v := range more {
		if body[k] = v; v == nil {
			delete(body, k)
		}
	}
	return h.call(h.stolen, http.MethodPost, h.config.CreatePath(tool.Name), body)
}

// fresh is a token for a lease: it is good for few calls.
func (h *thief) fresh(tool broker.Tool) string {
	h.t.Helper()
	secret, err := h.made(tool, nil)
	if err != nil {
		h.t.Fatalf("making a token: %v", err)
	}
	return secret.Auth.ClientToken
}

// credential makes a credential of a tool, as the broker does.
func (h *thief) credential(path string, tool broker.Tool) *api.Secret {
	h.t.Helper()
	secret, err := h.call(h.fresh(tool), http.MethodGet, path, nil)
	if err != nil {
		h.t.Fatalf("making a credential: %v", err)
	}
	return secret
}

func (h *thief) creds(role string) string { return h.mount("database") + "/creds/" + role }

// vaultSays is the status and the text that a call was answered with.
func vaultSays(err error) (int, string) {
	var answer *api.ResponseError
	if !errors.As(err, &answer) {
		return 0, ""
	}
	return answer.StatusCode, strings.Join(answer.Errors, "; ")
}

// escalation is one thing that a thief tries. It succeeds with nil.
type escalation struct {
	try    func() error
	status int    // of Vault's denial; zero means 403
	says   string // a part of it; empty means "permission denied"
}

// errHeld is what an attempt ends with that Vault answered, and that got the
// thief nothing: what it asked for was cut down.
var errHeld = errors.New("it has no more than the setup gives")

func (e escalation) denied(err error) error {
	if e.status == 0 {
		e.status, e.says = http.StatusForbidden, "permission denied"
	}
	status, says := vaultSays(err)
	switch {
	case err == nil:
		return errors.New("it was not denied")
	case e.status < 0 && errors.Is(err, errHeld), status == e.status && strings.Contains(says, e.says):
		return nil
	}
	return fmt.Errorf("it was denied in another way than expected: %w", err)
}

// attacks are the escalations at Vault.
func (h *thief) attacks() map[string]escalation {
	all := map[string]escalation{}
	plain := func(name, method, path string, body map[string]any) {
		all[name] = escalation{try: func() error { _, err := h.call(h.stolen, method, path, body); return err }}
	}
	write := func(name, path string, body map[string]any) { plain(name, http.MethodPost, path, body) }
	admin := map[string]any{"policy": `path "*" { capabilities = ["sudo", "read"] }`}

	// Its own rights.
	write("write its own policy", "sys/policies/acl/"+h.config.BrokerPolicy(), admin)
	write("write its own policy, the old way", "sys/policy/"+h.config.BrokerPolicy(), admin)
	plain("delete its own policy", http.MethodDelete, "sys/policies/acl/"+h.config.BrokerPolicy(), nil)
	write("write a tool's policy", "sys/policies/acl/"+h.config.Policy("crm.read"), admin)
	write("write a policy beside", "sys/policies/acl/"+h.config.Prefix+"x", admin)
	plain("read another's policy", http.MethodGet, "sys/policies/acl/"+h.id+"admin", nil)
	plain("read a policy, the old way", http.MethodGet, "sys/policy/"+h.config.BrokerPolicy(), nil)
	plain("list policies", "LIST", "sys/policies/acl", nil)
	write("write a password policy", "sys/policies/password/x", map[string]any{"policy": "length = 1"})
	write("write its own token role", "auth/token/roles/"+h.config.TokenRole("crm.read"), map[string]any{"allowed_policies": "root"})
	write("write a new token role", "auth/token/roles/"+h.config.TokenRole("x"), map[string]any{"allowed_policies": "root"})
	plain("delete its own token role", http.MethodDelete, "auth/token/roles/"+h.config.TokenRole("crm.read"), nil)
	plain("read another's token role", http.MethodGet, "auth/token/roles/"+h.id+"other", nil)
	plain("list token roles", "LIST", "auth/token/roles", nil)
	write("keep its login alive", "auth/token/renew-self", nil)
	plain("look at its login", http.MethodGet, "auth/token/lookup-self", nil)
	plain("use a cubbyhole", http.MethodGet, "cubbyhole/x", nil)

	// Tokens.
	write("create a token", "auth/token/create", map[string]any{"policies": []string{h.config.BrokerPolicy()}})
	write("create a token without policies", "auth/token/create", map[string]any{})
	write("create an orphan", "auth/token/create-orphan", map[string]any{})
	for _, role := range []string{"other", "glob", "none"} {
		write("create a token through role "+role, "auth/token/create/"+h.id+role, map[string]any{"policies": []string{h.id + "admin"},
			"explicit_max_ttl": "1m", "meta": map[string]string{"a": "b"}, "display_name": vaultscope.DisplayName(h.installation, "l")})
	}
	for name, more := range map[string]map[string]any{
		"with the broker's policy":     {"policies": []string{h.config.BrokerPolicy()}},
		"with policy root":             {"policies": []string{"root"}},
		"with the default policy":      {"no_default_policy": false},
		"with a number of uses":        {"num_uses": 0},
		"with a period":                {"period": "720h"},
		"of type batch":                {"type": "batch"},
		"that can be renewed":          {"renewable": true},
		"with an ID of its own":        {"id": "hvs.chosen"},
		"that is its child":            {"no_parent": false},
		"of an entity":                 {"entity_alias": "admin"},
		"without an explicit end":      {"explicit_max_ttl": nil},
		"without metadata":             {"meta": nil},
		"without a name":               {"display_name": nil},
		"with another installation's":  {"display_name": "000000000-" + strings.Repeat("l", 26)},
		"with the lease in the future": {"lease": "720h"},
	} {
		all["create a tool's token "+name] = escalation{try: func() error { _, err := h.made(h.tool, more); return err }}
	}
	for name, ttl := range map[string]string{"long": "8760h", "no": "0s"} {
		all["create a tool's token with "+name+" TTL"] = escalation{status: -1, try: func() error {
			secret, err := h.made(h.tool, map[string]any{"ttl": ttl, "explicit_max_ttl": ttl})
			if err != nil {
				return err
			}
			t, err := h.v.client.Auth().Token().LookupAccessor(secret.Auth.Accessor)
			if err != nil {
				return err
			}
			ttl, _ := t.Data["creation_ttl"].(json.Number).Int64()
			uses, _ := t.Data["num_uses"].(json.Number).Int64()
			if ttl > 0 && time.Duration(ttl)*time.Second <= h.config.TokenTTL(h.tool.MaxTTL) && t.Data["renewable"] == false &&
				uses == 2 && fmt.Sprint(t.Data["policies"]) == "["+h.config.Policy("crm.read")+"]" {
				return errHeld
			}
			return nil
		}}
	}
	write("look a token up", "auth/token/lookup", map[string]any{"token": h.v.root})
	write("look an accessor up", "auth/token/lookup-accessor", map[string]any{"accessor": "x"})
	plain("list accessors", "LIST", "auth/token/accessors", nil)
	write("revoke a token", "auth/token/revoke", map[string]any{"token": "x"})
	write("revoke a token without its children", "auth/token/revoke-orphan", map[string]any{"token": "x"})
	write("renew a token", "auth/token/renew", map[string]any{"token": "x"})
	write("renew by accessor", "auth/token/renew-accessor", map[string]any{"accessor": "x"})
	write("revoke a token with its accessor's call", h.config.RevokeAccessorPath(), map[string]any{"accessor": "x", "token": "y"})
	write("tidy tokens", "auth/token/tidy", nil)

	// Paths of the tools and of others.
	plain("read a credential itself", http.MethodGet, h.creds("crm-read-1m"), nil)
	write("sign a key itself", h.mount("ssh")+"/sign/ops", map[string]any{"public_key": somebodysKey})
	plain("read another's credential", http.MethodGet, h.mount("theirs")+"/creds/app", nil)
	plain("read another's secret", http.MethodGet, h.mount("kv")+"/secret", nil)
	plain("read a database role", http.MethodGet, h.mount("database")+"/roles/crm-read-1m", nil)
	write("write a database role", h.mount("database")+"/roles/crm-read-1m", map[string]any{"default_ttl": "24h"})
	plain("read the connection", http.MethodGet, h.mount("database")+"/config/mayfly", nil)
	write("rotate the connection's password", h.mount("database")+"/rotate-root/mayfly", nil)
	write("reset the connection", h.mount("database")+"/reset/mayfly", nil)

	// Leases.
	mine, other := h.credential(h.creds("crm-read-1m"), h.tool).LeaseID, h.foreign
	write("look a lease up", "sys/leases/lookup", map[string]any{"lease_id": mine})
	plain("list leases", "LIST", "sys/leases/lookup/"+h.creds("crm-read-1m"), nil)
	write("renew a lease", "sys/leases/renew", map[string]any{"lease_id": mine})
	write("renew a lease, the old way", "sys/renew/"+mine, nil)
	write("revoke a prefix", "sys/leases/revoke-prefix/"+h.creds("crm-read-1m"), map[string]any{"sync": true})
	write("revoke by force", "sys/leases/revoke-force/"+h.creds("crm-read-1m"), nil)
	write("tidy leases", "sys/leases/tidy", nil)
	write("revoke another's lease", "sys/leases/revoke/"+other, map[string]any{"sync": true})
	write("revoke another's lease by the body", "sys/leases/revoke", map[string]any{"lease_id": other, "sync": true})
	write("revoke another's lease below its own path", "sys/leases/revoke/"+h.creds("crm-read-1m")+"/x", map[string]any{"lease_id": other, "sync": true})
	write("revoke another's lease with dots", "sys/leases/revoke/"+h.creds("crm-read-1m")+"/../../../"+other, map[string]any{"sync": true})
	write("revoke another's lease, the old way", "sys/revoke/"+other, map[string]any{"sync": true})
	write("revoke its lease without waiting", "sys/leases/revoke/"+mine, map[string]any{"sync": false})
	write("revoke its lease without saying", "sys/leases/revoke/"+mine, map[string]any{})

	// Vault itself.
	for _, path := range []string{"sys/raw/core/master", "sys/mounts", "sys/auth", "sys/audit", "sys/policy", "sys/config/auditing/request-headers",
		"sys/storage/raft/snapshot", "sys/storage/raft/configuration", "sys/plugins/catalog", "sys/quotas/rate-limit/x", "sys/internal/counters/activity",
		"sys/leases", "sys/key-status", "sys/config/state/sanitized", "sys/metrics", "sys/pprof/heap", "sys/host-info", "sys/capabilities", "identity/entity/id/x"} {
		plain("read "+path, http.MethodGet, path, nil)
	}
	for path, body := range map[string]map[string]any{
		"sys/seal": nil, "sys/step-down": nil, "sys/rotate": nil, "sys/raw/core/x": {"value": "x"},
		"sys/audit/x":                             {"type": "file", "options": map[string]string{"file_path": "discard"}},
		"sys/mounts/x":                            {"type": "kv"},
		"sys/remount":                             {"from": "a", "to": "b"},
		"sys/auth/x":                              {"type": "jwt"},
		"sys/auth/token/tune":                     {"max_lease_ttl": "8760h"},
		"sys/quotas/rate-limit/x":                 {"rate": 1},
		"sys/wrapping/wrap":                       {"a": "b"},
		"sys/tools/random/8":                      nil,
		"sys/config/cors":                         {"enabled": true, "allowed_origins": "*"},
		"sys/storage/raft/remove-peer":            {"server_id": "x"},
		"auth/" + h.mount("jwt") + "/config":      {"jwks_url": "https://evil.test"},
		"auth/" + h.mount("jwt") + "/role/mayfly": {"role_type": "jwt", "user_claim": "sub", "token_policies": h.id + "admin"},
		"identity/entity":                         {"name": "x", "policies": []string{"root"}},
		"identity/entity-alias":                   {"name": "x", "canonical_id": "y"},
		"identity/group":                          {"name": "x", "policies": []string{"root"}},
		"identity/lookup/entity":                  {"name": "x"},
		"identity/oidc/key/x":                     {"allowed_client_ids": "*"},
		"identity/mfa/method/totp":                {"issuer": "x"},
	} {
		write("write "+path, path, body)
	}

	// Logins of others.
	denied := func(role string, id spiffeid.ID, audience, says string) escalation {
		return escalation{status: http.StatusBadRequest, says: says, try: func() error { _, err := h.enter(role, id, audience); return err }}
	}
	all["log in to another role"] = denied("admin", brokerID, audience, "invalid subject")
	all["log in with a token for another audience"] = denied("mayfly", brokerID, "https://elsewhere.test", "invalid audience")
	all["log in as an agent"] = denied("mayfly", agentID, audience, "invalid subject")
	all["log in below the broker's name"] = denied("mayfly", spiffeid.RequireFromString("spiffe://acme.test/mayfly/x"), audience, "invalid subject")

	// The tokens of leases.
	for name, try := range map[string]func(token string) error{
		"look itself up": func(t string) error { _, err := h.call(t, http.MethodGet, "auth/token/lookup-self", nil); return err },
		"renew itself":   func(t string) error { _, err := h.call(t, http.MethodPost, "auth/token/renew-self", nil); return err },
		"make a token":   func(t string) error { _, err := h.call(t, http.MethodPost, "auth/token/create", nil); return err },
		"make the broker's": func(t string) error {
			_, err := h.call(t, http.MethodPost, h.config.CreatePath("crm.read"), nil)
			return err
		},
		"read its own policy": func(t string) error {
			_, err := h.call(t, http.MethodGet, "sys/policies/acl/"+h.config.Policy("crm.read"), nil)
			return err
		},
		"read the other tool's": func(t string) error { _, err := h.call(t, http.MethodGet, h.creds("pay"), nil); return err },
		"read another's": func(t string) error {
			_, err := h.call(t, http.MethodGet, h.mount("theirs")+"/creds/app", nil)
			return err
		},
		"list its path": func(t string) error { _, err := h.call(t, "LIST", h.mount("database")+"/roles", nil); return err },
		"write its path": func(t string) error {
			_, err := h.call(t, http.MethodPost, h.creds("crm-read-1m"), map[string]any{"a": 1})
			return err
		},
		"revoke its own lease": func(t string) error {
			_, err := h.call(t, http.MethodPost, "sys/leases/revoke/"+mine, map[string]any{"sync": true})
			return err
		},
		"ask what it can": func(t string) error {
			_, err := h.call(t, http.MethodPost, "sys/capabilities-self", map[string]any{"path": "x"})
			return err
		},
		"write the path of pay": func(t string) error { _, err := h.call(t, http.MethodPost, h.creds("pay"), nil); return err },
		"read below its path": func(t string) error {
			_, err := h.call(t, http.MethodGet, h.creds("crm-read-1m")+"/x", nil)
			return err
		},
		"read dots below its": func(t string) error {
			_, err := h.call(t, http.MethodGet, h.creds("crm-read-1m")+"/../pay", nil)
			return err
		},
	} {
		all["a tool's token: "+name] = escalation{try: func() error { return try(h.fresh(h.tool)) }}
	}
	for name, body := range map[string]map[string]any{
		"for another principal":  {"public_key": somebodysKey, "valid_principals": "root", "ttl": "1m"},
		"for the default one":    {"public_key": somebodysKey, "ttl": "1m"},
		"of a host":              {"public_key": somebodysKey, "valid_principals": "deploy", "ttl": "1m", "cert_type": "host"},
		"with more extensions":   {"public_key": somebodysKey, "valid_principals": "deploy", "ttl": "1m", "extensions": map[string]string{"permit-port-forwarding": ""}},
		"with an ID of its own":  {"public_key": somebodysKey, "valid_principals": "deploy", "ttl": "1m", "key_id": "root"},
		"for as long as may be":  {"public_key": somebodysKey, "valid_principals": "deploy"},
		"of two names in a list": {"public_key": somebodysKey, "valid_principals": []string{"deploy", "root"}, "ttl": "1m"},
	} {
		all["a tool's token: sign "+name] = escalation{try: func() error {
			_, err := h.call(h.fresh(h.signed), http.MethodPost, h.mount("ssh")+"/sign/ops", body)
			return err
		}}
	}
	all["a tool's token: use it a third time"] = escalation{try: func() error {
		token := h.fresh(h.tool)
		var err error
		for range 3 {
			_, err = h.call(token, http.MethodGet, h.creds("crm-read-1m"), nil)
		}
		return err
	}}
	return all
}

// controls are what the setup is for: each works.
func (h *thief) controls() map[string]func() error {
	call := func(method, path string, body map[string]any) func() error {
		return func() error { _, err := h.call(h.stolen, method, path, body); return err }
	}
	all := map[string]func() error{
		"read its own policy":    call(http.MethodGet, "sys/policies/acl/"+h.config.BrokerPolicy(), nil),
		"read a tool's policy":   call(http.MethodGet, "sys/policies/acl/"+h.config.Policy("crm.read"), nil),
		"read a token role":      call(http.MethodGet, "auth/token/roles/"+h.config.TokenRole("crm.read"), nil),
		"ask what it can":        call(http.MethodPost, "sys/capabilities-self", map[string]any{"paths": []string{"sys/seal"}}),
		"make, use, end, forget": func() error { return h.cycle(h.creds("crm-read-1m"), h.tool) },
		"the same for a second":  func() error { return h.cycle(h.creds("pay"), h.second) },
		"sign a key": func() error {
			_, err := h.call(h.fresh(h.signed), http.MethodPost, h.mount("ssh")+"/sign/ops", map[string]any{"public_key": somebodysKey, "valid_principals": "deploy", "ttl": "1m"})
			return err
		},
		"another's lease is alive": func() error {
			_, err := h.v.client.Logical().Write("sys/leases/lookup", map[string]any{"lease_id": h.foreign})
			return err
		},
	}
	return all
}

// cycle is one lease: its credential works, and is gone at the end.
func (h *thief) cycle(path string, tool broker.Tool) error {
	made, err := h.made(tool, nil)
	if err != nil {
		return fmt.Errorf("making a token: %w", err)
	}
	secret, err := h.call(made.Auth.ClientToken, http.MethodGet, path, nil)
	if err != nil {
		return fmt.Errorf("making a credential: %w", err)
	}
	user := secret.Data["username"].(string)
	if n := len(h.roles(user)); n != 1 || !strings.HasPrefix(user, vaultscope.RolePrefix(h.installation)) {
		return fmt.Errorf("there are %d roles %s", n, user)
	}
	if _, err := h.call(h.stolen, http.MethodPost, "sys/leases/revoke/"+secret.LeaseID, map[string]any{"sync": true}); err != nil {
		return fmt.Errorf("ending the lease: %w", err)
	}
	if _, err := h.call(h.stolen, http.MethodPost, h.config.RevokeAccessorPath(), map[string]any{"accessor": made.Auth.Accessor}); err != nil {
		return fmt.Errorf("ending the token: %w", err)
	}
	if n := len(h.roles(user)); n != 0 || h.tokenLives(made.Auth.Accessor) {
		return fmt.Errorf("something is left of it")
	}
	return nil
}

// TestEscalations: whoever steals the broker's login to Vault can do what the
// setup says and nothing else. Vault itself denies the rest.
func TestEscalations(t *testing.T) {
	h := newThief(t)
	attacks := h.attacks()
	if len(attacks) < 100 {
		t.Errorf("only %d escalations are tried", len(attacks))
	}
	for _, name := range slices.Sorted(maps.Keys(attacks)) {
		if err := attacks[name].denied(attacks[name].try()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, try := range h.controls() {
		if err := try(); err != nil {
			t.Errorf("the setup does not let the broker %s: %v", name, err)
		}
	}
	t.Logf("%d escalations at Vault were denied", len(attacks))
}

// policy changes a policy's text; what it returns changes it back.
func (h *thief) policy(name, from, to string) (restore func()) {
	h.t.Helper()
	path := "sys/policies/acl/" + name
	secret, err := h.v.client.Logical().Read(path)
	if err != nil {
		h.t.Fatal(err)
	}
	text := secret.Data["policy"].(string)
	if !strings.Contains(text, from) {
		h.t.Fatalf("policy %s does not contain %q", name, from)
	}
	h.write(path, map[string]any{"policy": strings.ReplaceAll(text, from, to)})
	return func() { h.write(path, map[string]any{"policy": text}) }
}

// role changes a field of a role of Vault's; what it returns changes it back.
func (h *thief) role(path, field string, value, was any) (restore func()) {
	h.t.Helper()
	secret, err := h.v.client.Logical().Read(path)
	if err != nil || secret == nil {
		h.t.Fatalf("reading %s: %v", path, err)
	}
	whole := secret.Data // writing a role of JWT auth replaces it
	whole[field] = value
	h.write(path, whole)
	return func() {
		whole[field] = was
		h.write(path, whole)
	}
}

// TestEscalationsAreNoticed: each part of the setup is there for something.
// Without it, the escalation that it prevents succeeds.
func TestEscalationsAreNoticed(t *testing.T) {
	h := newThief(t)
	attacks := h.attacks()
	policy, role := h.policy, h.role
	ours, tokenRole, login := h.config.BrokerPolicy(), "auth/token/roles/"+h.config.TokenRole("crm.read"), "auth/"+h.mount("jwt")+"/role/mayfly"
	sync := "  required_parameters = [\"sync\"]\n  allowed_parameters = {\n    \"sync\" = [true]\n  }\n"
	for name, tt := range map[string]struct {
		damage func() (restore func())
		attack string
	}{
		"the parameters of revoking": {func() func() { return policy(ours, sync, "") }, "revoke another's lease below its own path"},
		"the need to wait":           {func() func() { return policy(ours, sync, "") }, "revoke its lease without waiting"},
		"the need to say so":         {func() func() { return policy(ours, "  required_parameters = [\"sync\"]\n", "") }, "revoke its lease without saying"},
		"the path of revoking":       {func() func() { return policy(ours, "sys/leases/revoke/"+h.creds("pay")+"/*", "sys/leases/revoke/*") }, "revoke another's lease"},
		"the need for an end":        {func() func() { return policy(ours, `"explicit_max_ttl", `, "") }, "create a tool's token without an explicit end"},
		"the need for metadata":      {func() func() { return policy(ours, `, "meta"]`, "]") }, "create a tool's token without metadata"},
		"the installation's name":    {func() func() { return policy(ours, `["`+vaultscope.Installation(h.installation)+`-*"]`, "[]") }, "create a tool's token with another installation's"},
		"the parameters of creating": {func() func() { return policy(ours, `"ttl" = []`, `"*" = []`) }, "create a tool's token with a number of uses"},
		"the token role's policies": {func() func() {
			return role(tokenRole, "allowed_policies", []string{}, []string{h.config.Policy("crm.read")})
		}, "a tool's token: ask what it can"},
		"the number of uses":                {func() func() { return role(tokenRole, "token_num_uses", 0, 2) }, "a tool's token: use it a third time"},
		"the token role's default policy":   {func() func() { return role(tokenRole, "token_no_default_policy", false, true) }, "a tool's token: look itself up"},
		"the token role's end":              {func() func() { return role(tokenRole, "token_explicit_max_ttl", 0, 300) }, "create a tool's token with long TTL"},
		"the values that the catalog fixes": {func() func() { return policy(h.config.Policy("ops.ssh"), `["deploy"]`, "[]") }, "a tool's token: sign for another principal"},
		"the values that must be given":     {func() func() { return policy(h.config.Policy("ops.ssh"), `"ttl", "valid_principals"`, `"ttl"`) }, "a tool's token: sign for the default one"},
		"who may log in":                    {func() func() { return role(login, "bound_subject", "", brokerID.String()) }, "log in as an agent"},
	} {
		restore := tt.damage()
		attack, ok := attacks[tt.attack]
		if !ok {
			t.Fatalf("there is no attack %q", tt.attack)
		}
		if err := attack.denied(attack.try()); err == nil || err.Error() != "it was not denied" {
			t.Errorf("without %s, %q: %v", name, tt.attack, err)
		}
		restore()
		if tt.attack == "revoke another's lease" || strings.HasPrefix(tt.attack, "revoke ") {
			continue // what it ends is ended
		}
		if err := attack.denied(attack.try()); err != nil {
			t.Errorf("with %s again, %q: %v", name, tt.attack, err)
		}
	}
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
