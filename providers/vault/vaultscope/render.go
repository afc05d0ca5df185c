package vaultscope

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// HCL is the text of every policy, each headed by its name.
func (s *Setup) HCL() string {
	var b strings.Builder
	b.WriteString(comment("#", "Policies of Mayfly, as \"mayfly vault setup\" prints them. They are one file each:\nvault policy write NAME FILE"))
	for _, w := range s.Writes {
		if w.Kind == WritePolicy {
			fmt.Fprintf(&b, "\n# ---- policy %s\n%s", w.name, w.Body["policy"])
		}
	}
	return b.String()
}

// SQL is every script.
func (s *Setup) SQL() string {
	var b strings.Builder
	for i, script := range s.Scripts {
		if i > 0 {
			b.WriteString("\n")
		}
		b.WriteString(script.SQL)
	}
	return b.String()
}

// Shell is a script for a POSIX shell that applies the writes with Vault's own
// command. It may be run again.
func (s *Setup) Shell() string {
	var b strings.Builder
	b.WriteString("#!/bin/sh\n" + comment("#", `What Mayfly needs in Vault, as "mayfly vault setup" prints it: read it, then run it as
an operator of Vault who may write policies, token roles, auth methods and database
roles. It may be run again. It prints and holds no secret.`))
	if len(s.Scripts) > 0 {
		b.WriteString("#\n" + comment("#", `First run what "mayfly vault setup --format sql" prints, in PostgreSQL, and make the
database connection in Vault, with a password that Vault alone knows afterwards:`))
		for _, w := range s.Writes {
			if w.Kind == WriteConnection {
				fmt.Fprintf(&b, "#   vault write %s plugin_name=postgresql-database-plugin username=%s password=... \\\n#     connection_url='postgresql://{{username}}:{{password}}@db.acme.test/crm?sslmode=verify-full'\n#   vault write -force %s/rotate-root/%s\n",
					w.Path, s.options.VaultLogin, w.at, w.name)
			}
		}
	}
	fmt.Fprintf(&b, "set -eu\nexport VAULT_ADDR=\"${VAULT_ADDR:-%s}\"\n", s.Config.Address)
	if s.Config.Namespace != "" {
		fmt.Fprintf(&b, "export VAULT_NAMESPACE=%s\n", shellQuote(s.Config.Namespace))
	}
	for _, w := range s.Writes {
		b.WriteString("\n" + comment("#", w.Why))
		switch w.Kind {
		case WritePolicy:
			fmt.Fprintf(&b, "vault policy write %s - <<'MAYFLY'\n%sMAYFLY\n", shellQuote(w.name), w.Body["policy"])
		case WriteMount:
			fmt.Fprintf(&b, "vault auth list -format=json | grep -qF %s ||\n  vault auth enable -path=%s %s\n",
				shellQuote(`"`+w.name+`/"`), shellQuote(w.name), w.Body["type"])
		default:
			fmt.Fprintf(&b, "vault write %s - <<'MAYFLY'\n%s\nMAYFLY\n", shellQuote(w.Path), indented(w.Body))
		}
	}
	return b.String()
}

func indented(value any) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(value); err != nil {
		panic(fmt.Sprintf("a write has no JSON form: %v", err)) // all values are ours
	}
	return strings.TrimSpace(b.String())
}

func shellQuote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:=@-") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// Terraform is the setup as resources of Terraform's provider "vault".
func (s *Setup) Terraform() string {
	var b strings.Builder
	b.WriteString(comment("#", `What Mayfly needs in Vault, as "mayfly vault setup" prints it, for Terraform's provider
hashicorp/vault. PostgreSQL's part is printed by --format sql; the database connection
itself, with its password, is yours: set its username_template and allowed_roles as the
comment at its roles says.`))
	for _, w := range s.Writes {
		if w.Kind == WriteAuthConfig {
			continue // the mount's resource has it
		}
		b.WriteString("\n" + comment("#", w.Why))
		resource, args := s.resource(w)
		if resource == "" {
			for _, key := range slices.Sorted(maps.Keys(w.Body)) {
				b.WriteString("#   " + key + " = " + terraformValue(w.Body[key]) + "\n")
			}
			continue
		}
		if s.Config.Namespace != "" {
			args["namespace"] = s.Config.Namespace
		}
		fmt.Fprintf(&b, "resource %s %s {\n", hcl(resource), hcl(terraformName(w)))
		width := 0
		for key := range args {
			width = max(width, len(key))
		}
		for _, key := range slices.Sorted(maps.Keys(args)) {
			fmt.Fprintf(&b, "  %-*s = %s\n", width, key, terraformValue(args[key]))
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// terraformRef refers to another resource; it is written without quotes.
type terraformRef string

// resource is the kind of resource for a write, and its arguments. The
// connection has none: it holds a password.
func (s *Setup) resource(w Write) (string, map[string]any) {
	args := maps.Clone(w.Body)
	var backend any = s.Config.Auth.Mount // one that is there already
	for _, other := range s.Writes {
		if other.Kind == WriteMount {
			kind := map[string]string{MethodJWT: "vault_jwt_auth_backend", MethodCert: "vault_auth_backend"}[s.Config.Auth.Method]
			backend = terraformRef(kind + "." + terraformName(other) + ".path")
		}
	}
	switch w.Kind {
	case WritePolicy:
		args["name"] = w.name
		return "vault_policy", args
	case WriteTokenRole:
		args["role_name"] = w.name
		return "vault_token_auth_backend_role", args
	case WriteMount:
		args["path"] = w.name
		if s.Config.Auth.Method == MethodCert {
			return "vault_auth_backend", args
		}
		for _, other := range s.Writes {
			if other.Kind == WriteAuthConfig {
				maps.Copy(args, other.Body)
			}
		}
		return "vault_jwt_auth_backend", args
	case WriteAuthRole:
		args["backend"] = backend
		if s.Config.Auth.Method == MethodCert {
			args["name"] = w.name
			return "vault_cert_auth_backend_role", args
		}
		args["role_name"] = w.name
		return "vault_jwt_auth_backend_role", args
	case WriteDatabaseRole:
		args["backend"], args["name"] = w.at, w.name
		return "vault_database_secret_backend_role", args
	}
	return "", nil
}

// terraformName names a resource: letters, digits and underscores.
func terraformName(w Write) string {
	var b strings.Builder
	for _, r := range w.name {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			b.WriteRune(r)
		case r == '-' || r == '_':
			b.WriteRune(r)
		default: // injective, so that no two resources have one name
			fmt.Fprintf(&b, "_%x_", r)
		}
	}
	return b.String()
}

func terraformValue(value any) string {
	switch v := value.(type) {
	case terraformRef:
		return string(v)
	case string:
		return terraformText(v)
	case []string:
		var all []string
		for _, e := range v {
			all = append(all, terraformText(e))
		}
		return "[" + strings.Join(all, ", ") + "]"
	}
	return hcl(value)
}

// terraformText writes a string; "${" and "%{" would begin an expression.
func terraformText(s string) string {
	escape := strings.NewReplacer("${", "$${", "%{", "%%{")
	if strings.Count(s, "\n") > 1 && strings.HasSuffix(s, "\n") {
		return "<<-EOT\n" + indent(escape.Replace(s)) + "  EOT"
	}
	return escape.Replace(hcl(s))
}

func indent(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if strings.TrimSpace(line) != "" {
			b.WriteString("    ")
		}
		b.WriteString(line)
	}
	return b.String()
}

// Document is the setup for programs.
type Document struct {
	Address   string   `json:"address"`
	Namespace string   `json:"namespace,omitempty"`
	Writes    []Write  `json:"writes"`
	Scripts   []Script `json:"scripts,omitempty"`
}

// Document returns the setup as data.
func (s *Setup) Document() Document {
	return Document{Address: s.Config.Address, Namespace: s.Config.Namespace, Writes: s.Writes, Scripts: s.Scripts}
}
