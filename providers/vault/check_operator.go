package vault

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// asOperator looks with an operator's token at what the broker may not see:
// database roles, their connections, and the role of the broker's login.
func (c *check) asOperator(ctx context.Context, token string) error {
	if err := c.loginRole(ctx, token); err != nil {
		return err
	}
	connections := map[string]bool{}
	for _, t := range c.tools {
		if t.Scope.Engine != vaultscope.EngineDatabase {
			continue
		}
		for _, class := range t.Scope.Classes {
			role := strings.TrimPrefix(class.Path, t.Scope.Mount+"/creds/")
			data, ok, err := c.read(ctx, token, t.Tool.Name, "database role "+role, t.Scope.Mount+"/roles/"+role)
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			c.databaseRole(t, class, role, data)
			connection, _ := data["db_name"].(string)
			path := t.Scope.Mount + "/config/" + connection
			if connections[path] {
				continue
			}
			connections[path] = true
			if data, ok, err = c.read(ctx, token, t.Tool.Name, "database connection "+connection, path); err != nil {
				return err
			}
			if ok {
				c.connection(t, connection, data)
			}
		}
	}
	return nil
}

// loginRole compares the role that the broker logs in as.
func (c *check) loginRole(ctx context.Context, token string) error {
	path := "auth/" + c.config.Auth.Mount + "/role/" + c.config.Auth.Role
	if c.config.Auth.Method == vaultscope.MethodCert {
		path = "auth/" + c.config.Auth.Mount + "/certs/" + c.config.Auth.Role
	}
	data, ok, err := c.read(ctx, token, "", "role "+c.config.Auth.Role+" of the broker's login", path)
	if err != nil || !ok {
		return err
	}
	fault := func(format string, args ...any) {
		c.bad("", fixSetup, "role "+c.config.Auth.Role+" of the broker's login "+format, args...)
	}
	if got := texts(data["token_policies"]); !slices.Equal(got, []string{c.config.BrokerPolicy()}) {
		fault("gives the policies %s; it is for %s alone", strings.Join(got, ", "), c.config.BrokerPolicy())
	}
	if number(data["token_period"]) != 0 {
		fault("has a token_period: a stolen login can be kept alive for ever")
	}
	if none, _ := data["token_no_default_policy"].(bool); !none {
		fault("gives the default policy, too")
	}
	if ttl := time.Duration(number(data["token_max_ttl"])) * time.Second; ttl == 0 || ttl > maxLogin {
		fault("has token_max_ttl=%s; %s is enough", ttl, maxLogin)
	}
	bound := texts(data["allowed_uri_sans"])
	if c.config.Auth.Method == vaultscope.MethodJWT {
		bound = nil
		if subject, _ := data["bound_subject"].(string); subject != "" {
			bound = []string{subject}
		}
		if len(texts(data["bound_audiences"])) == 0 {
			fault("has no bound_audiences: tokens for other systems let in, too")
		}
	}
	switch {
	case len(bound) == 0:
		fault("lets in whoever is in the trust domain: it is not bound to the broker's SPIFFE ID")
	case len(bound) > 1 || strings.Contains(bound[0], "*"):
		fault("lets in %s; it is for one SPIFFE ID", strings.Join(bound, ", "))
	}
	return nil
}

// databaseRole compares the role of one class.
func (c *check) databaseRole(t vaultscope.ScopedTool, class vaultscope.Class, role string, data map[string]any) {
	fault := func(format string, args ...any) {
		c.bad(t.Tool.Name, fixSetup, "database role "+role+" "+format, args...)
	}
	switch ttl := time.Duration(number(data["default_ttl"])) * time.Second; {
	case ttl == 0:
		fault("has no default_ttl: what it makes can log in for as long as Vault's own default, and the catalog says %s", class.TTL)
	case ttl > class.TTL:
		fault("has default_ttl=%s, and the catalog says %s: what it makes outlives its lease if Vault is lost, and each lease is refused", ttl, class.TTL)
	case ttl < class.TTL:
		fault("has default_ttl=%s, and the catalog says %s: leases end early", ttl, class.TTL)
	}
	creation := strings.Join(texts(data["creation_statements"]), ";")
	if !strings.Contains(strings.ToUpper(creation), "VALID UNTIL") || !strings.Contains(creation, "{{expiration}}") {
		fault("makes logins without VALID UNTIL '{{expiration}}': one that Vault loses never dies")
	}
	if revocation := strings.Join(texts(data["revocation_statements"]), ";"); !strings.Contains(revocation, "pg_terminate_backend") {
		fault("ends leases without ending their sessions: its revocation_statements do not call pg_terminate_backend")
	} else if !strings.Contains(strings.ToUpper(revocation), "DROP ROLE IF EXISTS") {
		fault("fails to end a lease whose role is gone: its revocation_statements do not say DROP ROLE IF EXISTS")
	}
}

// connection compares a database connection.
func (c *check) connection(t vaultscope.ScopedTool, name string, data map[string]any) {
	details, _ := data["connection_details"].(map[string]any)
	template, _ := details["username_template"].(string)
	if template == "" {
		template, _ = data["username_template"].(string)
	}
	if template != vaultscope.UsernameTemplate {
		c.bad(t.Tool.Name, fixSetup, "database connection %s has another username_template than the setup's: the names of roles do not tell whose they are, and none that Vault loses is found", name)
	}
	if slices.Contains(texts(data["allowed_roles"]), "*") {
		c.bad(t.Tool.Name, fixSetup, "database connection %s may be used by any database role of Vault", name)
	}
}
