package vaultscope

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

const (
	maxClasses = 32
	maxFields  = 32
	maxField   = 64 // bytes of the name of a field
	maxTTL     = 24 * time.Hour
)

// Scope is what a tool's leases can do in Vault: one path and what is sent
// there, complete.
type Scope struct {
	Engine         Engine
	Mount          string         // the engine's mount
	Classes        []Class        // by TTL, the shortest first; one, but for database
	Write          bool           // the path is written to, not read
	Data           map[string]any // what is written; strings may hold ${params.NAME}
	CredentialType string         // aws: what the role makes
	Version        int            // kv: 1 or 2
	Fields         []string       // of the answer, which are the secret

	optional map[string]bool // the tool's optional parameters
}

// Class is one path, and how long the engine lets live what it makes there.
type Class struct {
	Path string
	TTL  time.Duration // database: the role's default_ttl; zero where the request says it
}

// Class returns the class for a lease that may live for ttl: the longest that
// does not outlive it. It is false if even the shortest does.
func (s Scope) Class(ttl time.Duration) (Class, bool) {
	for _, c := range slices.Backward(s.Classes) {
		if c.TTL <= ttl {
			return c, true
		}
	}
	return Class{}, false
}

// Paths are all paths of the scope; its policy names exactly these.
func (s Scope) Paths() []string {
	var paths []string
	for _, c := range s.Classes {
		paths = append(paths, c.Path)
	}
	return paths
}

// ParseScope reads and checks a tool's scope. Its errors are
// *providers.FieldError.
func ParseScope(c Config, tool broker.Tool) (Scope, error) {
	var in struct {
		Engine  string `json:"engine"`
		Path    string `json:"path"`
		Mount   string `json:"mount"`
		TTL     string `json:"ttl"`
		Classes []struct {
			Path string `json:"path"`
			TTL  string `json:"ttl"`
		} `json:"classes"`
		Data           json.RawMessage `json:"data"`
		Method         string          `json:"method"`
		CredentialType string          `json:"credential_type"`
		Version        *int            `json:"version"`
		Fields         []string        `json:"fields"`
	}
	if err := providers.Decode(tool.Scope, &in); err != nil {
		return Scope{}, err
	}
	if !roleForm.MatchString(c.TokenRole(tool.Name)) {
		return Scope{}, providers.FieldErrorf("", "the tool's name ends with a character with which no name of a role in Vault can end; end it with a letter or digit")
	}
	s := Scope{Engine: Engine(in.Engine), Mount: strings.Trim(in.Mount, "/"), CredentialType: in.CredentialType, Fields: in.Fields}
	kind, ok := engines[s.Engine]
	if !ok {
		return Scope{}, providers.FieldErrorf("engine", "is %q; it is one of %s", in.Engine, strings.Join(engineNames(), ", "))
	}
	if s.Engine != EngineDatabase && (in.TTL != "" || in.Classes != nil) {
		field := "ttl"
		if in.Classes != nil {
			field = "classes"
		}
		return Scope{}, providers.FieldErrorf(field, "is for engine database only")
	}
	switch {
	case in.Classes == nil:
		class := Class{Path: in.Path}
		if s.Engine == EngineDatabase {
			class.TTL = tool.MaxTTL
		}
		if in.TTL != "" {
			var err error
			if class.TTL, err = parseTTL("ttl", in.TTL, tool.MaxTTL); err != nil {
				return Scope{}, err
			}
		}
		if err := s.addClass("path", class); err != nil {
			return Scope{}, err
		}
	case in.Path != "" || in.TTL != "":
		return Scope{}, providers.FieldErrorf("classes", "takes the place of path and ttl; set either")
	case len(in.Classes) == 0 || len(in.Classes) > maxClasses:
		return Scope{}, providers.FieldErrorf("classes", "must list 1 to %d classes", maxClasses)
	default:
		for i, each := range in.Classes {
			at := fmt.Sprintf("classes[%d]", i)
			ttl, err := parseTTL(at+".ttl", each.TTL, tool.MaxTTL)
			if err != nil {
				return Scope{}, err
			}
			if err := s.addClass(at+".path", Class{each.Path, ttl}); err != nil {
				return Scope{}, err
			}
		}
		slices.SortFunc(s.Classes, func(a, b Class) int { return int(a.TTL - b.TTL) })
		for i := range s.Classes[1:] {
			if s.Classes[i].TTL == s.Classes[i+1].TTL {
				return Scope{}, providers.FieldErrorf("classes", "has two of ttl %s", s.Classes[i].TTL)
			}
		}
	}
	if err := s.method(kind, in.Method); err != nil {
		return Scope{}, err
	}
	if err := s.special(in.Version); err != nil {
		return Scope{}, err
	}
	if err := s.form(kind); err != nil {
		return Scope{}, err
	}
	if err := s.data(in.Data, tool.Params); err != nil {
		return Scope{}, err
	}
	if err := s.fields(); err != nil {
		return Scope{}, err
	}
	return s, nil
}

// addClass checks a path and adds it.
func (s *Scope) addClass(field string, class Class) error {
	if err := checkPath(field, class.Path); err != nil {
		return err
	}
	first, _, found := strings.Cut(class.Path, "/")
	switch first {
	case "sys", "auth", "identity", "cubbyhole":
		return providers.FieldErrorf(field, "%q is a part of Vault itself, and no engine that makes credentials", class.Path)
	}
	if !found {
		return providers.FieldErrorf(field, "%q is a mount alone; the path goes on below it", class.Path)
	}
	if s.Mount == "" {
		s.Mount = first
	}
	if err := checkPath("mount", s.Mount); err != nil {
		return err
	}
	if !strings.HasPrefix(class.Path, s.Mount+"/") {
		return providers.FieldErrorf(field, "%q is not below the mount %s", class.Path, s.Mount)
	}
	if slices.ContainsFunc(s.Classes, func(c Class) bool { return c.Path == class.Path }) {
		return providers.FieldErrorf(field, "%q stands twice", class.Path)
	}
	s.Classes = append(s.Classes, class)
	return nil
}

// method decides whether the path is read or written.
func (s *Scope) method(kind engine, method string) error {
	s.Write = kind.write
	switch {
	case method == "":
	case s.Engine != EngineOther && (method == "write") != kind.write:
		return providers.FieldErrorf("method", "is %q; engine %s has its own", method, s.Engine)
	case method != "read" && method != "write":
		return providers.FieldErrorf("method", "is %q; it is read or write", method)
	default:
		s.Write = method == "write"
	}
	return nil
}

// special checks what one engine alone has.
func (s *Scope) special(version *int) error {
	kinds := []string{"iam_user", "assumed_role", "federation_token", "session_token"}
	switch {
	case s.Engine != EngineAWS && s.CredentialType != "":
		return providers.FieldErrorf("credential_type", "is for engine aws only")
	case s.Engine == EngineAWS && !slices.Contains(kinds, s.CredentialType):
		return providers.FieldErrorf("credential_type", "is %q; it is that of the role in Vault: one of %s", s.CredentialType, strings.Join(kinds, ", "))
	case s.Engine != EngineKV && version != nil:
		return providers.FieldErrorf("version", "is for engine kv only")
	case s.Engine != EngineKV:
		return nil
	}
	s.Version = 2
	if version != nil {
		s.Version = *version
	}
	if s.Version != 1 && s.Version != 2 {
		return providers.FieldErrorf("version", "is %d; it is 1 or 2", s.Version)
	}
	return nil
}

// form checks that a path is one of those at which the engine makes credentials.
func (s *Scope) form(kind engine) error {
	field := "path"
	if len(s.Classes) > 1 {
		field = "classes"
	}
	for _, path := range s.Paths() {
		below := strings.TrimPrefix(path, s.Mount+"/")
		ok := len(kind.forms) == 0
		for _, form := range kind.forms {
			ok = ok || form.MatchString(below)
		}
		if s.Version == 2 {
			ok = strings.HasPrefix(below, "data/")
		}
		if !ok {
			return providers.FieldErrorf(field, "%q is no path at which engine %s, mounted at %s, hands out credentials: %s", path, s.Engine, s.Mount, kind.where)
		}
	}
	return nil
}

// fields checks the names of the secret's fields, or sets the engine's.
func (s *Scope) fields() error {
	if len(s.Fields) == 0 {
		s.Fields = s.engineFields()
	}
	if len(s.Fields) == 0 {
		return providers.FieldErrorf("fields", "is missing: name the fields of Vault's answer that are the secret")
	}
	if len(s.Fields) > maxFields {
		return providers.FieldErrorf("fields", "has %d names; at most %d are taken", len(s.Fields), maxFields)
	}
	for i, f := range s.Fields {
		at := fmt.Sprintf("fields[%d]", i)
		if f == "" || len(f) > maxField || broker.Clean(f) != f {
			return providers.FieldErrorf(at, "is no name of a field: 1 to %d printable bytes", maxField)
		}
		if slices.Contains(s.Fields[:i], f) {
			return providers.FieldErrorf(at, "%q stands twice", f)
		}
	}
	return nil
}

func parseTTL(field, text string, most time.Duration) (time.Duration, error) {
	ttl, err := time.ParseDuration(text)
	if err != nil || ttl < time.Second || ttl%time.Second != 0 || ttl > maxTTL {
		return 0, providers.FieldErrorf(field, "is %q; it is the default_ttl of the role in Vault, in whole seconds, such as 15m", text)
	}
	if ttl > most {
		return 0, providers.FieldErrorf(field, "is %s, longer than the tool's max_ttl of %s", ttl, most)
	}
	return ttl, nil
}
