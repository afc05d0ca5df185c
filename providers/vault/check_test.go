package vault

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// check runs a live check and returns what is bad and what is told beside.
func (h *thief) check(d Driver) (bad, notes []string) {
	h.t.Helper()
	findings, err := d.CheckLive(h.t.Context(), h.providerConfig(), []broker.Tool{h.signed, h.tool, h.second})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, f := range findings {
		line := f.Message
		if f.Tool != "" {
			line = f.Tool + ": " + line
		}
		if !f.Bad {
			notes = append(notes, line)
			continue
		}
		if f.Fix == "" {
			h.t.Errorf("nothing is said about what to do: %s", line)
		}
		bad = append(bad, line)
	}
	return bad, notes
}

func (h *thief) providerConfig() providers.Config {
	return providers.Config{Name: "vault", Installation: h.installation, Raw: h.world.config(), Log: discard(), Now: time.Now}
}

// TestCheckLive: a Vault and a PostgreSQL that are set up as printed are good.
func TestCheckLive(t *testing.T) {
	h := newThief(t)
	for name, d := range map[string]Driver{
		"broker":   {Login: h.login},
		"operator": {CheckToken: h.v.root},
		"both":     {Login: h.login, CheckToken: h.v.root},
	} {
		bad, notes := h.check(d)
		if len(bad) > 0 {
			t.Errorf("as %s:\n%s", name, strings.Join(bad, "\n"))
		}
		if asked := slices.ContainsFunc(notes, func(n string) bool { return strings.Contains(n, "with an operator's token (VAULT_TOKEN) a") }); asked != (name != "broker") {
			t.Errorf("as %s it is told: %q", name, notes)
		}
	}
	// What serves any installation is told, and is no fault.
	unbound := func() []string {
		bad, notes := h.check(Driver{Login: h.login})
		if len(bad) > 0 {
			t.Errorf("what is not bound is bad:\n%s", strings.Join(bad, "\n"))
		}
		return slices.DeleteFunc(notes, func(n string) bool { return !strings.Contains(n, "not bound to this installation") })
	}
	if notes := unbound(); len(notes) != 0 {
		t.Errorf("of what is bound it is told: %q", notes)
	}
	h.unbind(h.tool, h.second, h.signed)
	if notes := unbound(); len(notes) != 1 || !strings.Contains(notes[0], "the functions of schema mayfly_"+h.id) {
		t.Errorf("of functions for any installation it is told: %q", notes)
	}
	restore := h.policy(h.config.BrokerPolicy(), `"display_name" = ["`+vaultscope.Installation(h.installation)+`-*"]`, `"display_name" = []`)
	if notes := unbound(); len(notes) != 2 || !strings.Contains(notes[0], "the broker's policy") {
		t.Errorf("of a policy for any installation it is told: %q", notes)
	}
	restore()
	// The login of a check is ended with it.
	before := h.accessors()
	h.check(Driver{Login: h.login})
	if after := h.accessors(); after != before {
		t.Errorf("%d tokens before a check, %d after it", before, after)
	}
	if _, err := (Driver{}).CheckLive(t.Context(), h.providerConfig(), nil); err == nil {
		t.Error("a check without a login says nothing")
	}
}

func (h *thief) accessors() int {
	h.t.Helper()
	mine := 0
	secret, err := h.v.client.Logical().List("auth/token/accessors")
	if err != nil {
		h.t.Fatal(err)
	}
	for _, key := range secret.Data["keys"].([]any) {
		if t, err := h.v.client.Auth().Token().LookupAccessor(key.(string)); err == nil && strings.HasPrefix(fmt.Sprint(t.Data["path"]), "auth/"+h.mount("jwt")) {
			mine++
		}
	}
	return mine
}

// TestCheckLiveFinds: whatever is missing or too wide is found, by whom it can be.
func TestCheckLiveFinds(t *testing.T) {
	h := newThief(t)
	asBroker, asOperator := Driver{Login: h.login}, Driver{CheckToken: h.v.root}
	ours, tokenRole, login := h.config.BrokerPolicy(), "auth/token/roles/"+h.config.TokenRole("crm.read"), "auth/"+h.mount("jwt")+"/role/mayfly"
	dbRole, connection := h.mount("database")+"/roles/crm-read-1m", h.mount("database")+"/config/mayfly"
	schema := "mayfly_" + h.id
	sql := func(do, undo string) func() func() {
		return func() func() {
			h.super("%s", do)
			return func() { h.super("%s", undo) }
		}
	}
	gone := func(path string) func() func() {
		return func() func() {
			secret, err := h.v.client.Logical().Read(path)
			if err != nil || secret == nil {
				t.Fatalf("reading %s: %v", path, err)
			}
			if _, err := h.v.client.Logical().Delete(path); err != nil {
				t.Fatal(err)
			}
			return func() { h.write(path, secret.Data) }
		}
	}
	field := func(path, name string, value, was any) func() func() {
		return func() func() { return h.role(path, name, value, was) }
	}
	text := func(name, from, to string) func() func() { return func() func() { return h.policy(name, from, to) } }
	for name, tt := range map[string]struct {
		damage func() func()
		look   Driver
		want   string // part of a message
	}{
		"no token role":         {gone(tokenRole), asBroker, "crm.read: token role " + h.config.TokenRole("crm.read") + " is missing"},
		"no policies":           {field(tokenRole, "allowed_policies", []string{}, []string{h.config.Policy("crm.read")}), asBroker, "has no allowed_policies"},
		"other policies":        {field(tokenRole, "allowed_policies", []string{"other", h.config.Policy("crm.read")}, []string{h.config.Policy("crm.read")}), asBroker, "allows the policies other, "},
		"a glob":                {field(tokenRole, "allowed_policies_glob", []string{h.id + "-*"}, []string{}), asBroker, "allows policies by a glob"},
		"aliases":               {field(tokenRole, "allowed_entity_aliases", []string{"a"}, []string{}), asBroker, "allows entity aliases"},
		"no orphans":            {field(tokenRole, "orphan", false, true), asBroker, "has orphan=false"},
		"renewable":             {field(tokenRole, "renewable", true, false), asBroker, "has renewable=true"},
		"batch tokens":          {field(tokenRole, "token_type", "default-service", "service"), asBroker, "has token_type=default-service"},
		"the default policy":    {field(tokenRole, "token_no_default_policy", false, true), asBroker, "has token_no_default_policy=false"},
		"uses":                  {field(tokenRole, "token_num_uses", 0, 2), asBroker, "has token_num_uses=0"},
		"a period":              {field(tokenRole, "token_period", 60, 0), asBroker, "has token_period=60s"},
		"no end":                {field(tokenRole, "token_explicit_max_ttl", 0, 300), asBroker, "has no token_explicit_max_ttl"},
		"an early end":          {field(tokenRole, "token_explicit_max_ttl", 60, 300), asBroker, "leases of the tool need 5m0s"},
		"a late end":            {field(tokenRole, "token_explicit_max_ttl", 3600, 300), asBroker, "has token_explicit_max_ttl=1h0m0s"},
		"a tool's policy":       {text(h.config.Policy("crm.read"), `["read"]`, `["read", "list"]`), asBroker, "crm.read: policy " + h.config.Policy("crm.read") + " is not what the setup says"},
		"no tool's policy":      {gone("sys/policies/acl/" + h.config.Policy("crm.read")), asBroker, "is missing"},
		"the broker's policy":   {text(ours, `"sync" = [true]`, `"*" = []`), asBroker, "the broker's policy " + ours + " is not what the setup says"},
		"too wide a path":       {text(ours, "auth/token/create/"+h.config.TokenRole("pay.write"), "auth/token/create/*"), asBroker, "can update auth/token/create/x"},
		"a credential":          {text(ours, "sys/leases/revoke/"+h.creds("pay")+"/*", h.creds("pay")), asBroker, "pay.write: the broker's login can update " + h.creds("pay")},
		"no way to end":         {text(ours, "sys/leases/revoke/"+h.creds("pay")+"/*", "x/y"), asBroker, "pay.write: the broker's login cannot update sys/leases/revoke/" + h.creds("pay")},
		"no way to ask":         {text(ours, "sys/capabilities-self", "x/y"), asBroker, "may not ask what it can do"},
		"no way to read":        {text(ours, `path "sys/policies/acl/`+ours, `path "x/`+ours), asBroker, "cannot be read"},
		"another policy":        {field(login, "token_policies", []string{ours, "other"}, []string{ours}), asBroker, "the broker's login has policy other besides its own"},
		"no own policy":         {field(login, "token_policies", []string{"other"}, []string{ours}), asBroker, "does not have policy " + ours},
		"default for the login": {field(login, "token_no_default_policy", false, true), asBroker, "has policy default besides"},
		"a long login": {func() func() {
			a := h.role(login, "token_max_ttl", 7200, 900)
			b := h.role(login, "token_ttl", 7200, 900)
			return func() { b(); a(); h.role(login, "token_ttl", 900, 900) }
		}, asBroker, "a login of the broker's lives for 2h0m0s"},
		"no login":              {gone(login), asBroker, "Vault does not let the broker in"},
		"somebody else's login": {field(login, "bound_subject", "spiffe://acme.test/other", brokerID.String()), asBroker, "Vault does not let the broker in"},
		"anybody's login":       {field(login, "bound_subject", "", brokerID.String()), asOperator, "is not bound to the broker's SPIFFE ID"},
		"a login for ever":      {field(login, "token_period", 60, 0), asOperator, "has a token_period"},
		"any audience's login":  {field(login, "bound_audiences", []string{}, []string{audience}), asOperator, "has no bound_audiences"},
		"a long database role":  {field(dbRole, "default_ttl", 120, 60), asOperator, "has default_ttl=2m0s, and the catalog says 1m0s"},
		"a short database role": {field(dbRole, "default_ttl", 30, 60), asOperator, "leases end early"},
		"no database role":      {gone(dbRole), asOperator, "crm.read: database role crm-read-1m is missing"},
		"logins for ever":       {field(dbRole, "creation_statements", []string{`CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}'`}, nil), asOperator, "without VALID UNTIL"},
		"sessions that go on":   {field(dbRole, "revocation_statements", []string{`DROP ROLE IF EXISTS "{{name}}"`}, nil), asOperator, "without ending their sessions"},
		"names that tell naught": {func() func() {
			h.write(connection, map[string]any{"username_template": "x{{random 8}}"})
			return func() { h.write(connection, map[string]any{"username_template": vaultscope.UsernameTemplate}) }
		}, asOperator, "another username_template"},
		"a shared connection": {func() func() {
			h.write(connection, map[string]any{"allowed_roles": "*"})
			return func() {
				h.write(connection, map[string]any{"allowed_roles": []string{"crm-read-10s", "crm-read-1m", "crm-read-5m", "pay"}})
			}
		}, asOperator, "by any database role"},
		"a superuser":            {sql("ALTER ROLE "+h.sweep()+" SUPERUSER", "ALTER ROLE "+h.sweep()+" NOSUPERUSER"), asBroker, "is a superuser"},
		"CREATEROLE":             {sql("ALTER ROLE "+h.sweep()+" CREATEROLE", "ALTER ROLE "+h.sweep()+" NOCREATEROLE"), asBroker, "may create roles"},
		"a member":               {sql("GRANT pg_read_all_data TO "+h.sweep(), "REVOKE pg_read_all_data FROM "+h.sweep()), asBroker, "is a member of pg_read_all_data"},
		"no function":            {sql("ALTER FUNCTION "+schema+".end_sessions() RENAME TO x", "ALTER FUNCTION "+schema+".x() RENAME TO end_sessions"), asBroker, "there is no function"},
		"not to be called":       {sql("REVOKE EXECUTE ON FUNCTION "+schema+".end_sessions() FROM "+h.sweep(), "GRANT EXECUTE ON FUNCTION "+schema+".end_sessions() TO "+h.sweep()), asBroker, "cannot call"},
		"called by all":          {sql("GRANT EXECUTE ON FUNCTION "+schema+".end_sessions() TO PUBLIC", "REVOKE EXECUTE ON FUNCTION "+schema+".end_sessions() FROM PUBLIC"), asBroker, "everybody can call"},
		"a superuser's function": {sql("ALTER FUNCTION "+schema+".end_sessions() OWNER TO postgres", "ALTER FUNCTION "+schema+".end_sessions() OWNER TO vault"), asBroker, "belongs to the superuser postgres"},
		"an open search path":    {sql("ALTER FUNCTION "+schema+".end_sessions() RESET search_path", "ALTER FUNCTION "+schema+".end_sessions() SET search_path = pg_catalog, pg_temp"), asBroker, "has no fixed search_path"},
		"other locks":            {sql("ALTER FUNCTION "+schema+".drop_roles(text, text[]) RESET lock_timeout", "ALTER FUNCTION "+schema+".drop_roles(text, text[]) SET lock_timeout = '500ms'"), asBroker, "has other settings than the setup's"},
		"the caller's rights":    {sql("ALTER FUNCTION "+schema+".end_sessions() SECURITY INVOKER", "ALTER FUNCTION "+schema+".end_sessions() SECURITY DEFINER"), asBroker, "is to run with those of Vault's login"},
		"its own schema":         {sql("GRANT CREATE ON SCHEMA "+schema+" TO "+h.sweep(), "REVOKE CREATE ON SCHEMA "+schema+" FROM "+h.sweep()), asBroker, "may create things in schema"},
		"schemas":                {sql("GRANT CREATE ON DATABASE crm TO "+h.sweep(), "REVOKE CREATE ON DATABASE crm FROM "+h.sweep()), asBroker, "may create schemas"},
		"another function":       {sql("ALTER FUNCTION "+schema+".end_sessions() RENAME TO kept; CREATE FUNCTION "+schema+".end_sessions() RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN 1; END'; ALTER FUNCTION "+schema+".end_sessions() OWNER TO vault; REVOKE ALL ON FUNCTION "+schema+".end_sessions() FROM PUBLIC; GRANT EXECUTE ON FUNCTION "+schema+".end_sessions() TO "+h.sweep(), "DROP FUNCTION "+schema+".end_sessions(); ALTER FUNCTION "+schema+".kept() RENAME TO end_sessions"), asBroker, "is not what the setup says"},
		"no such login":          {sql("ALTER ROLE "+h.sweep()+" NOLOGIN", "ALTER ROLE "+h.sweep()+" LOGIN"), asBroker, "does not let the broker in"},
	} {
		restore := tt.damage()
		bad, _ := h.check(tt.look)
		if !slices.ContainsFunc(bad, func(line string) bool { return strings.Contains(line, tt.want) }) {
			t.Errorf("%s: nothing says %q:\n%s", name, tt.want, strings.Join(bad, "\n"))
		}
		restore()
	}
	h.setup(h.tool, h.second, h.signed)
	if bad, _ := h.check(Driver{Login: h.login, CheckToken: h.v.root}); len(bad) > 0 {
		t.Errorf("applying the setup again does not repair it:\n%s", strings.Join(bad, "\n"))
	}
}

// TestCheckLiveAway: a Vault that does not answer is no finding but an error.
func TestCheckLiveAway(t *testing.T) {
	h := newThief(t)
	h.address = fmt.Sprintf("http://127.0.0.1:%d", freePort())
	for name, d := range map[string]Driver{"broker": {Login: h.login}, "operator": {CheckToken: "hvs.secret"}} {
		_, err := d.CheckLive(t.Context(), h.providerConfig(), []broker.Tool{h.tool})
		if err == nil || strings.Contains(err.Error(), "hvs.secret") {
			t.Errorf("as %s: %v", name, err)
		}
	}
}

// TestAtAddress: an operator's token is for the Vault at its address alone.
func TestAtAddress(t *testing.T) {
	raw := func(address string) []byte {
		return fmt.Appendf(nil, `{"address":%q,"auth":{"method":"jwt"}}`, address)
	}
	for _, tt := range []struct {
		config, address string
		want            bool
	}{
		{"https://vault.acme.test:8200", "https://vault.acme.test:8200", true},
		{"https://vault.acme.test:8200", "https://vault.acme.test:8200/", true},
		{"https://vault.acme.test", "https://VAULT.acme.test:443//", true},
		{"http://127.0.0.1", "http://127.0.0.1:80", true},
		{"https://vault.acme.test:8200", "", false},
		{"https://vault.acme.test:8200", "https://vault.acme.test", false},
		{"https://vault.acme.test:8200", "http://vault.acme.test:8200", false},
		{"https://vault.acme.test:8200", "https://vault.acme.test:8200/v", false},
		{"https://vault.acme.test:8200", "https://vault.acme.test:8200?x", false},
		{"https://vault.acme.test:8200", "https://vault.acme.test:8200@evil.test", false},
		{"https://vault.acme.test:8200", "https://vault.acme.test.evil.test:8200", false},
		{"https://vault.acme.test:8200", "vault.acme.test:8200", false},
	} {
		if got := AtAddress(raw(tt.config), tt.address); got != tt.want {
			t.Errorf("%s at VAULT_ADDR=%s: %t", tt.config, tt.address, got)
		}
	}
	if AtAddress([]byte(`{}`), "") {
		t.Error("no address is at none")
	}
}
