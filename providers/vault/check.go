package vault

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

const (
	checkLimit = 15 * time.Second // of one call of a check
	maxLogin   = 15 * time.Minute // that a login of the broker's should live
)

// The fixes that most findings have.
const (
	fixSetup = `apply what "mayfly vault setup" prints`
	fixSQL   = `run what "mayfly vault setup --format sql" prints in PostgreSQL`
	fixBind  = `print the setup again with --installation (mayfly whoami tells it) and apply it`
)

// CheckLive implements providers.LiveChecker. It logs in as the broker and
// compares what that login can see and do with the setup; with a CheckToken it
// looks with that, too, at what the broker may not see. It changes nothing, and
// ends its login.
func (d Driver) CheckLive(ctx context.Context, config providers.Config, tools []broker.Tool) ([]providers.Finding, error) {
	c, err := vaultscope.ParseConfig(config.Raw)
	if err != nil {
		return nil, err
	}
	ch := &check{config: c, installation: config.Installation}
	for _, t := range tools {
		s, err := vaultscope.ParseScope(c, t)
		if err != nil {
			return nil, fmt.Errorf("reading the scope of tool %s: %w", t.Name, err)
		}
		ch.tools = append(ch.tools, vaultscope.ScopedTool{Tool: t, Scope: s})
	}
	slices.SortFunc(ch.tools, func(a, b vaultscope.ScopedTool) int { return strings.Compare(a.Tool.Name, b.Tool.Name) })
	ch.client, err = newClient(endpoint{address: c.Address, namespace: c.Namespace, caFile: c.CAFile, serverName: c.ServerName,
		identity: d.Login, certLogin: c.Auth.Method == vaultscope.MethodCert && d.Login != nil})
	if err != nil {
		return nil, fmt.Errorf("opening Vault: %w", err)
	}
	defer ch.client.close()
	if d.Login == nil && d.CheckToken == "" {
		return nil, fmt.Errorf("checking Vault: there is nothing to log in with")
	}
	if d.Login != nil {
		if err := ch.asBroker(ctx, d); err != nil {
			return nil, err
		}
	}
	if d.CheckToken != "" {
		if d.Login == nil {
			ch.note("", "looked with an operator's token (VAULT_TOKEN) alone, and not as the broker")
		} else {
			ch.note("", "looked as the broker, and with an operator's token (VAULT_TOKEN) at what the broker may not see")
		}
		if err := ch.asOperator(ctx, d.CheckToken); err != nil {
			return nil, err
		}
	} else {
		ch.note("", "looked as the broker alone, which may not see database roles and connections, nor the role of its login; with an operator's VAULT_TOKEN in the environment, and VAULT_ADDR=%s, these are compared, too", c.Address)
	}
	for _, db := range c.Databases {
		ch.postgres(ctx, db)
	}
	return ch.findings, nil
}

// AtAddress reports whether a provider's configuration is for the Vault at an
// address, as VAULT_ADDR has it. Both are compared as URLs. An operator's token
// is for one Vault, and no other must see it.
func AtAddress(raw json.RawMessage, address string) bool {
	c, err := vaultscope.ParseConfig(raw)
	if err != nil {
		return false
	}
	ours, ok := sameForm(c.Address)
	theirs, ok2 := sameForm(address)
	return ok && ok2 && ours == theirs
}

func sameForm(address string) (string, bool) {
	u, err := url.Parse(strings.TrimSpace(address))
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" {
		return "", false
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Scheme + "://" + net.JoinHostPort(strings.ToLower(u.Hostname()), port) + strings.TrimRight(u.EscapedPath(), "/"), true
}

// check is one live check under way.
type check struct {
	config       vaultscope.Config
	installation broker.InstallationID // may be empty
	tools        []vaultscope.ScopedTool
	client       *client
	findings     []providers.Finding
}

func (c *check) bad(tool, fix, format string, args ...any) {
	c.findings = append(c.findings, providers.Finding{Tool: tool, Bad: true, Message: fmt.Sprintf(format, args...), Fix: fix})
}

func (c *check) note(tool, format string, args ...any) {
	c.findings = append(c.findings, providers.Finding{Tool: tool, Message: fmt.Sprintf(format, args...)})
}

// unbound tells of what serves any installation. It is no fault: a setup is
// first printed before there is one.
func (c *check) unbound(format string, args ...any) {
	c.findings = append(c.findings, providers.Finding{Message: fmt.Sprintf(format, args...), Fix: fixBind})
}

func (c *check) call(ctx context.Context, r request) (*api.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	return c.client.again(ctx, r)
}

// read reads a path. ok is false where there is no such thing, or where the
// login may not see it, with a finding; an error means that Vault does not answer.
func (c *check) read(ctx context.Context, token, tool, what, path string) (data map[string]any, ok bool, err error) {
	secret, err := c.call(ctx, request{what: "reading " + what, path: path, token: token})
	switch kindOf(err) {
	case none:
		if secret != nil && secret.Data != nil {
			return secret.Data, true, nil
		}
		fallthrough
	case missing, bad:
		c.bad(tool, fixSetup, "%s is missing (%s)", what, path)
		return nil, false, nil
	case denied:
		c.bad(tool, fixSetup, "%s cannot be read (%s): the policy of the login does not let it be compared", what, path)
		return nil, false, nil
	}
	return nil, false, err
}

// asBroker looks as the broker itself.
func (c *check) asBroker(ctx context.Context, d Driver) error {
	auth, err := c.login(ctx, d)
	if err != nil || auth == nil {
		return err
	}
	defer func() {
		// It would end by itself. An error changes nothing of what was found.
		_, _ = c.call(context.WithoutCancel(ctx), request{what: "ending the check's login", path: c.config.RevokeAccessorPath(), token: auth.ClientToken,
			body: map[string]string{"accessor": auth.Accessor}})
	}()
	c.loginAnswer(auth)
	own := c.config.BrokerPolicy()
	if err := c.policy(ctx, auth.ClientToken, "", "the broker's policy "+own, own, c.config.BrokerPolicyText(c.tools, c.installation)); err != nil {
		return err
	}
	for _, t := range c.tools {
		if err := c.tokenRole(ctx, auth.ClientToken, t.Tool); err != nil {
			return err
		}
		name := c.config.Policy(t.Tool.Name)
		if err := c.policy(ctx, auth.ClientToken, t.Tool.Name, "policy "+name, name, c.config.ToolPolicy(t.Tool, t.Scope)); err != nil {
			return err
		}
	}
	return c.capabilities(ctx, auth.ClientToken)
}

// login logs in. Without an answer to use it returns nil, with a finding.
func (c *check) login(ctx context.Context, d Driver) (*api.SecretAuth, error) {
	r := request{what: "logging in to Vault", path: c.config.LoginPath(), quiet: true, body: map[string]string{"name": c.config.Auth.Role}}
	if c.config.Auth.Method == vaultscope.MethodJWT {
		svid, _, err := d.Login.JWTSVID(ctx, c.config.Auth.Audience)
		if err != nil {
			return nil, fmt.Errorf("fetching a JWT-SVID to log in to Vault with: %w", err)
		}
		r.body = map[string]string{"role": c.config.Auth.Role, "jwt": svid}
	}
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	secret, err := do(ctx, c.client.login, r)
	switch kind := kindOf(err); {
	case kind == none && secret != nil && secret.Auth != nil && secret.Auth.ClientToken != "":
		return secret.Auth, nil
	case kind == none || kind == denied || kind == missing || kind == bad || kind == badToken:
		c.bad("", fixSetup+", with this broker's SPIFFE ID", "Vault does not let the broker in at %s as role %s%s", c.config.LoginPath(), c.config.Auth.Role, because(err))
		return nil, nil
	}
	return nil, err
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}

// loginAnswer compares what Vault told of the login.
func (c *check) loginAnswer(auth *api.SecretAuth) {
	want := c.config.BrokerPolicy()
	all := append(slices.Clone(auth.Policies), auth.IdentityPolicies...)
	slices.Sort(all)
	for _, p := range slices.Compact(all) {
		if p != want {
			c.bad("", "take it from the role of the login, or from the identity entity of the broker: "+fixSetup, "the broker's login has policy %s besides its own", p)
		}
	}
	if !slices.Contains(all, want) {
		c.bad("", fixSetup, "the broker's login does not have policy %s", want)
	}
	if ttl := time.Duration(auth.LeaseDuration) * time.Second; ttl <= 0 || ttl > maxLogin {
		c.bad("", fixSetup, "a login of the broker's lives for %s; a stolen one is good for as long, and %s is enough", ttl, maxLogin)
	}
}

// policy compares the text of a policy.
func (c *check) policy(ctx context.Context, token, tool, what, name, want string) error {
	data, ok, err := c.read(ctx, token, tool, what, "sys/policies/acl/"+name)
	if err != nil || !ok {
		return err
	}
	text, _ := data["policy"].(string)
	if !vaultscope.SamePolicy(text, want) {
		c.bad(tool, fixSetup, "%s is not what the setup says: it lets do more, or less", what)
	} else if name == c.config.BrokerPolicy() && !vaultscope.PolicyBound(text) {
		c.unbound("%s is not bound to this installation: what the broker makes may bear any installation's name", what)
	}
	return nil
}

// tokenRole compares the token role of a tool.
func (c *check) tokenRole(ctx context.Context, token string, tool broker.Tool) error {
	name := c.config.TokenRole(tool.Name)
	data, ok, err := c.read(ctx, token, tool.Name, "token role "+name, "auth/"+c.config.TokenMount+"/roles/"+name)
	if err != nil || !ok {
		return err
	}
	fault := func(format string, args ...any) { c.bad(tool.Name, fixSetup, "token role "+name+" "+format, args...) }
	if got := texts(data["allowed_policies"]); !slices.Equal(got, []string{c.config.Policy(tool.Name)}) {
		if len(got) == 0 {
			fault("has no allowed_policies: the broker can make tokens with its own policies, and without a bound on their number")
		} else {
			fault("allows the policies %s; it is for %s alone", strings.Join(got, ", "), c.config.Policy(tool.Name))
		}
	}
	if got := texts(data["allowed_policies_glob"]); len(got) > 0 {
		fault("allows policies by a glob (%s): the broker can combine tools", strings.Join(got, ", "))
	}
	if got := texts(data["allowed_entity_aliases"]); len(got) > 0 {
		fault("allows entity aliases (%s): tokens can have the policies of an identity", strings.Join(got, ", "))
	}
	for _, flag := range []struct {
		field string
		want  bool
		why   string
	}{
		{"orphan", true, "tokens end with the broker's login, and the credentials of leases with them"},
		{"renewable", false, "tokens can be kept alive"},
		{"token_no_default_policy", true, "tokens have the default policy, too"},
	} {
		if got, _ := data[flag.field].(bool); got != flag.want {
			fault("has %s=%t: %s", flag.field, got, flag.why)
		}
	}
	if kind, _ := data["token_type"].(string); kind != "service" {
		fault("has token_type=%s; only a service token can be revoked, and is counted", kind)
	}
	if uses := number(data["token_num_uses"]); uses != 2 {
		fault("has token_num_uses=%d; 2 is one request for a credential, and one that Vault needs to end it", uses)
	}
	if period := number(data["token_period"]); period != 0 {
		fault("has token_period=%ds: tokens need never end", period)
	}
	want, got := c.config.TokenTTL(tool.MaxTTL), time.Duration(number(data["token_explicit_max_ttl"]))*time.Second
	switch {
	case got == 0:
		fault("has no token_explicit_max_ttl: tokens live as long as is asked for")
	case got < want:
		fault("has token_explicit_max_ttl=%s; leases of the tool need %s, and die early without", got, want)
	case got > want:
		fault("has token_explicit_max_ttl=%s; %s is enough for the longest lease", got, want)
	}
	if own := time.Duration(number(data["explicit_max_ttl"])) * time.Second; own != 0 && own < want {
		fault("has explicit_max_ttl=%s; leases of the tool need %s", own, want)
	}
	return nil
}

// capabilities asks Vault what the login can do, at paths that tell.
func (c *check) capabilities(ctx context.Context, token string) error {
	want := map[string][]string{}
	own := c.config.RevokeAccessorPath()
	for _, path := range []string{
		"sys/policies/acl/x", "sys/policy/x", "sys/policies/password/x", "sys/auth/x", "sys/mounts/x", "sys/remount", "sys/audit/x",
		"sys/raw/x", "sys/seal", "sys/step-down", "sys/rotate", "sys/storage/raft/snapshot", "sys/plugins/catalog/x", "sys/capabilities",
		"sys/leases/lookup", "sys/leases/lookup/x", "sys/leases/renew", "sys/leases/revoke", "sys/leases/revoke/x/creds/x/x",
		"sys/leases/revoke-prefix/x", "sys/leases/revoke-force/x", "sys/leases/tidy", "identity/entity", "identity/entity-alias", "identity/group",
		"auth/" + c.config.TokenMount + "/create", "auth/" + c.config.TokenMount + "/create-orphan", "auth/" + c.config.TokenMount + "/create/x",
		"auth/" + c.config.TokenMount + "/roles/x", "auth/" + c.config.TokenMount + "/lookup", "auth/" + c.config.TokenMount + "/lookup-accessor",
		"auth/" + c.config.TokenMount + "/revoke", "auth/" + c.config.TokenMount + "/accessors",
		"auth/" + c.config.Auth.Mount + "/config", "auth/" + c.config.Auth.Mount + "/role/" + c.config.Auth.Role, "auth/" + c.config.Auth.Mount + "/certs/" + c.config.Auth.Role,
	} {
		want[path] = nil
	}
	want[own] = []string{"update"}
	want["sys/policies/acl/"+c.config.BrokerPolicy()] = []string{"read"}
	toolOf := map[string]string{}
	for _, t := range c.tools {
		name := t.Tool.Name
		for path, can := range map[string][]string{
			c.config.CreatePath(name): {"update"},
			"auth/" + c.config.TokenMount + "/roles/" + c.config.TokenRole(name): {"read"},
			"sys/policies/acl/" + c.config.Policy(name):                          {"read"},
			t.Scope.Mount + "/config/x":                                          nil,
			t.Scope.Mount + "/roles/x":                                           nil,
		} {
			want[path], toolOf[path] = can, name
		}
		for _, path := range t.Scope.Paths() {
			want[path], toolOf[path] = nil, name // only tokens of leases may
			if t.Scope.Leased() || t.Scope.Engine == vaultscope.EnginePKI {
				want["sys/leases/revoke/"+path+"/x"], toolOf["sys/leases/revoke/"+path+"/x"] = []string{"update"}, name
			}
		}
	}
	paths := slices.Sorted(maps.Keys(want))
	secret, err := c.call(ctx, request{what: "asking what the login can do", path: "sys/capabilities-self", token: token, body: map[string]any{"paths": paths}})
	switch kindOf(err) {
	case none:
	case denied:
		c.bad("", fixSetup, "the broker's login may not ask what it can do (sys/capabilities-self): its policy is not the setup's")
		return nil
	default:
		return err
	}
	for _, path := range paths {
		var got []string
		if secret != nil {
			got = slices.DeleteFunc(texts(secret.Data[path]), func(s string) bool { return s == "deny" })
		}
		for _, can := range got {
			if !slices.Contains(want[path], can) {
				c.bad(toolOf[path], "take it from the policies of the broker's login: "+fixSetup, "the broker's login can %s %s, which the setup does not give", can, path)
			}
		}
		for _, can := range want[path] {
			if !slices.Contains(got, can) {
				c.bad(toolOf[path], fixSetup, "the broker's login cannot %s %s", can, path)
			}
		}
	}
	return nil
}

// texts is a list of strings in an answer of Vault's.
func texts(value any) []string {
	var all []string
	list, _ := value.([]any)
	for _, each := range list {
		if s, ok := each.(string); ok {
			all = append(all, s)
		}
	}
	return all
}

// number is a whole number in an answer of Vault's.
func number(value any) int64 {
	n, _ := value.(json.Number)
	i, err := n.Int64()
	if err != nil {
		return 0
	}
	return i
}
