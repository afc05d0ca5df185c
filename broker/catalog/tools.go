package catalog

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

func (l *loader) providers(s source) {
	for i, e := range s.file.Providers {
		path := fmt.Sprintf("providers[%d]", i)
		named := l.name(s, path+".name", e.Name) && l.define(s, path+".name", "provider", e.Name)
		driver, ok := l.drivers[e.Driver]
		if !ok {
			l.fail(s, path+".driver", "there is no driver %s%s", show(e.Driver), suggest(e.Driver, "drivers", l.drivers))
			continue
		}
		if err := driver.ValidateConfig(e.Config); err != nil {
			l.field(s, path+".config", err)
			continue
		}
		if named {
			l.snapshot.providers[e.Name] = Provider(e)
		}
	}
}

// field reports what a driver says of a field of its own, at the field's line.
func (l *loader) field(s source, path string, err error) {
	var f *providers.FieldError
	if !errors.As(err, &f) {
		l.fail(s, path, "%s", broker.Clean(broker.Shorten(err.Error(), 500)))
		return
	}
	if f.Field != "" {
		path += "." + f.Field
	}
	l.fail(s, path, "%s", broker.Clean(broker.Shorten(f.Error(), 500)))
}

func (l *loader) tools(s source) {
	for i, e := range s.file.Tools {
		path := fmt.Sprintf("tools[%d]", i)
		named := l.name(s, path+".name", e.Name) && l.define(s, path+".name", "tool", e.Name)
		l.text(s, path+".description", "description", e.Description, true)
		l.span(s, path+".max_ttl", "max_ttl", e.MaxTTL)
		t := broker.Tool{Name: e.Name, Description: e.Description, Provider: e.Provider, Scope: e.Scope, MaxTTL: e.MaxTTL, Env: e.Env}
		t.Labels, t.Sensitivity = e.Labels, l.sensitivity(s, path+".sensitivity", e.Sensitivity)
		l.labels(s, path+".labels", e.Labels)
		l.approval(s, path, e, &t)
		t.Params = l.params(s, path+".params", e.Params)
		p, ok := l.snapshot.providers[e.Provider]
		if !ok {
			// A provider that is there but was refused is one error already.
			if _, defined := l.at["provider "+e.Provider]; !defined {
				l.fail(s, path+".provider", "there is no provider %s%s", show(e.Provider), suggest(e.Provider, "providers", l.snapshot.providers))
			}
			continue
		}
		info, err := l.drivers[p.Driver].ValidateScope(p.Config, t)
		if err != nil {
			l.field(s, path+".scope", err)
			continue
		}
		if info.MinTTL > t.MaxTTL {
			l.fail(s, path+".max_ttl", "max_ttl is %s, and the shortest lease that provider %s can make lives %s", t.MaxTTL, p.Name, info.MinTTL)
		}
		l.env(s, path+".env", e.Env, info.Fields)
		if !named {
			continue
		}
		meaning, err := l.meaning(p)
		if err != nil {
			l.field(s, path+".provider", err)
			continue
		}
		t.Digest = toolDigest(t, p, meaning)
		l.snapshot.tools[t.Name], l.snapshot.scopes[t.Name] = t, info
	}
}

func (l *loader) params(s source, path string, entries map[string]parameter) []broker.Param {
	var params []broker.Param
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		e, at := entries[name], path+"."+name
		if !l.name(s, at, name) {
			continue
		}
		l.text(s, at+".description", "description", e.Description, false)
		for j, v := range e.OneOf {
			one := fmt.Sprintf("%s.one_of[%d]", at, j)
			l.text(s, one, "a value", v, true)
			if slices.Contains(e.OneOf[:j], v) {
				l.fail(s, one, "value %s stands twice", show(v))
			}
		}
		p := broker.Param{Name: name, Type: broker.ParamType(e.Type), OneOf: slices.Sorted(slices.Values(e.OneOf)), Min: e.Min, Max: e.Max,
			Optional: e.Optional, Description: e.Description}
		isString := p.Type == broker.ParamString
		switch p.Type {
		case broker.ParamString, broker.ParamInteger, broker.ParamBoolean:
		default:
			l.fail(s, at+".type", "type is %s; it must be string, integer or boolean", show(e.Type))
			continue
		}
		switch {
		case isString && (e.Pattern == "") == (len(e.OneOf) == 0):
			l.fail(s, at, "a string needs either a pattern or one_of")
		case !isString && (e.Pattern != "" || len(e.OneOf) > 0):
			l.fail(s, at, "pattern and one_of are for strings")
		case p.Type != broker.ParamInteger && (e.Min != nil || e.Max != nil):
			l.fail(s, at, "min and max are for integers")
		case e.Min != nil && e.Max != nil && *e.Min > *e.Max:
			l.fail(s, at, "min is greater than max")
		case len(e.Pattern) > maxPattern:
			l.fail(s, at+".pattern", "the pattern has %d bytes; at most %d are taken", len(e.Pattern), maxPattern)
		case e.Pattern != "":
			re, err := regexp.Compile("^(?:" + e.Pattern + ")$") // the whole value, always
			if _, alone := regexp.Compile(e.Pattern); err != nil || alone != nil {
				l.fail(s, at+".pattern", "the pattern is no regular expression (RE2): %v", errors.Join(err, alone))
				continue
			}
			p.Pattern = re
		}
		params = append(params, p)
	}
	return params
}

// env checks the environment variables of a tool: none that change how
// programs are found, loaded or run, and each from a field that there is.
func (l *loader) env(s source, path string, env map[string]string, fields []string) {
	for name, field := range env {
		at := path + "." + name
		if !envForm.MatchString(name) {
			l.fail(s, at, "%s is no name for an environment variable: use capitals, digits and '_'", show(name))
		} else if dangerous(name) {
			l.fail(s, at, "%s changes how programs run; choose another name", name)
		}
		if !slices.Contains(fields, field) {
			l.fail(s, at, "the secret has no field %s%s", show(field), broker.Suggest(field, "fields", fields))
		}
	}
}

// dangerous reports whether a variable makes programs run something, look for
// things elsewhere, or trust somebody else.
func dangerous(name string) bool {
	switch name {
	case "PATH", "HOME", "SHELL", "IFS", "ENV", "BASH_ENV", "CDPATH", "PROMPT_COMMAND", "PS1", "PS4", "TMPDIR", "USER", "LOGNAME",
		"EDITOR", "VISUAL", "PAGER", "BROWSER", "NODE_OPTIONS", "NODE_PATH", "CLASSPATH", "SHELLOPTS", "BASHOPTS", "GLOBIGNORE",
		"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSH_ASKPASS", "SSH_AUTH_SOCK", "TERM", "LANG",
		"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "CURL_HOME", "NODE_EXTRA_CA_CERTS", "GLIBC_TUNABLES", "LESSOPEN", "LESSCLOSE", "MAKEFLAGS",
		"HOSTALIASES", "RES_OPTIONS", "LOCALDOMAIN", "DOCKER_HOST", "DOCKER_CONFIG", "KUBECONFIG",
		"GODEBUG", "GOFLAGS", "GOPATH", "GOROOT", "GOPROXY", "GOTOOLCHAIN", "GOENV":
		return true
	}
	for _, prefix := range []string{"LD_", "DYLD_", "GIT_", "PYTHON", "PERL", "RUBY", "JAVA_", "_JAVA", "JDK_", "NPM_CONFIG_", "PIP_", "CARGO_", "RUSTC", "GCONV_", "MALLOC_", "LC_", "MAYFLY_", "SPIFFE_", "XDG_"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// toolDigest is what a grant is bound to: everything that decides what a lease
// of the tool can do. The description is not part of it, nor are the names of
// environment variables, labels and sensitivity; and an approval rule has a
// digest of its own.
func toolDigest(t broker.Tool, p Provider, meaning json.RawMessage) string {
	return digest(map[string]any{
		"name": t.Name, "provider": p.Name, "driver": p.Driver, "config": orEmpty(meaning),
		"scope": orEmpty(t.Scope), "max_ttl": t.MaxTTL, "params": paramsForDigest(t.Params),
	})
}

// meaning is the part of a provider's configuration that decides what a lease can do.
func (l *loader) meaning(p Provider) (json.RawMessage, error) {
	if d, ok := l.drivers[p.Driver].(providers.Meaning); ok {
		return d.Meaning(p.Config)
	}
	return p.Config, nil
}

func orEmpty(raw json.RawMessage) json.RawMessage {
	if len(raw) == 0 {
		return json.RawMessage("{}")
	}
	return raw
}

func paramsForDigest(params []broker.Param) []any {
	var all []any
	for _, p := range params {
		pattern := ""
		if p.Pattern != nil {
			pattern = p.Pattern.String()
		}
		all = append(all, map[string]any{"name": p.Name, "type": p.Type, "pattern": pattern,
			"one_of": p.OneOf, "min": p.Min, "max": p.Max, "optional": p.Optional})
	}
	return all
}
