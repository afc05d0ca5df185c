package vaultscope

import (
	"maps"
	"regexp"
	"slices"
	"time"

	"github.com/mayfly-security/mayfly/providers"
)

// Engine is a kind of Vault's secrets engines, by what becomes of what it makes.
type Engine string

// The engines.
const (
	EngineDatabase Engine = "database" // a login, with a lease; Vault removes it
	EnginePKI      Engine = "pki"      // a certificate; dies at its NotAfter
	EngineSSH      Engine = "ssh"      // a signed key; dies at its ValidBefore
	EngineAWS      Engine = "aws"      // keys of an IAM user, which Vault removes, or of a session, which nobody can
	EngineKV       Engine = "kv"       // a secret that was there before and stays
	EngineOther    Engine = "other"    // any other path; with a lease, or it is refused
)

// engine is what is fixed for an engine.
type engine struct {
	write bool
	forms []*regexp.Regexp // of paths below the mount at which it makes credentials; none: any
	where string           // the same in words
}

const roleText = `[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?`

var engines = map[Engine]engine{
	EngineDatabase: {forms: forms(`creds/` + roleText), where: "that is creds/ROLE"},
	EnginePKI:      {write: true, forms: forms(`(issue|sign)/`+roleText, `issuer/`+roleText+`/(issue|sign)/`+roleText), where: "that is issue/ROLE or sign/ROLE, or the same below issuer/NAME"},
	EngineSSH:      {write: true, forms: forms(`(issue|sign)/` + roleText), where: "that is sign/ROLE or issue/ROLE"},
	EngineAWS:      {forms: forms(`(creds|sts)/` + roleText), where: "that is creds/ROLE or sts/ROLE"},
	EngineKV:       {where: "for version 2 that is data/PATH"},
	EngineOther:    {},
}

func forms(texts ...string) (all []*regexp.Regexp) {
	for _, t := range texts {
		all = append(all, regexp.MustCompile("^("+t+")$"))
	}
	return all
}

func engineNames() []string {
	var names []string
	for _, e := range slices.Sorted(maps.Keys(engines)) {
		names = append(names, string(e))
	}
	return names
}

// Static reports whether the secret was there before the lease and stays after it.
func (s Scope) Static() bool { return s.Engine == EngineKV }

// Leased reports whether Vault itself keeps a lease of what it makes and can
// end it: without one in Vault's answer, what was made is refused.
func (s Scope) Leased() bool {
	switch s.Engine {
	case EngineDatabase, EngineOther:
		return true
	case EngineAWS:
		return s.CredentialType == "iam_user"
	}
	return false
}

// SetsTTL reports whether the request to the engine says how long the
// credential may live.
func (s Scope) SetsTTL() bool {
	return s.Engine == EnginePKI || s.Engine == EngineSSH || s.Engine == EngineAWS && s.CredentialType != "iam_user"
}

// MinTTL is the shortest TTL that a lease can have.
func (s Scope) MinTTL() time.Duration {
	switch {
	case s.Engine == EngineDatabase:
		return s.Classes[0].TTL
	case s.Engine == EngineAWS && s.SetsTTL():
		return 15 * time.Minute // the least that AWS STS gives
	}
	return time.Second
}

// Survives says, for people, what of a lease outlives its revocation.
func (s Scope) Survives(c Config) string {
	switch s.Engine {
	case EngineDatabase:
		if _, swept := c.Database(s.Mount); !swept {
			return "open sessions, unless the role's revocation statements end them, as those of \"mayfly vault setup\" do"
		}
		return ""
	case EnginePKI:
		return "the certificate, until its NotAfter, with whoever does not check revocation"
	case EngineSSH:
		return "the signed key, until its ValidBefore: nobody asks anybody whether it is revoked; sessions stay open"
	case EngineAWS:
		if s.SetsTTL() {
			return "the session's keys, until they expire: AWS cannot revoke them one by one"
		}
		return "the keys for some seconds, until all of AWS knows that they are gone"
	case EngineKV:
		return "the secret itself: it was there before the lease, and only its rotation ends it"
	}
	return "whatever the engine does not end when Vault revokes its lease"
}

// Info is what the catalog is told of a scope.
func (s Scope) Info(c Config) providers.ScopeInfo {
	return providers.ScopeInfo{Fields: s.Fields, Survives: s.Survives(c), MinTTL: s.MinTTL(), Static: s.Static()}
}

// engineFields are the fields of the secret where the scope names none.
func (s Scope) engineFields() []string {
	path := s.Classes[0].Path
	issues := regexp.MustCompile(`/issue/[^/]+$`).MatchString(path) // makes the key, too
	switch {
	case s.Engine == EngineDatabase:
		return []string{"username", "password"}
	case s.Engine == EnginePKI && issues:
		return []string{"certificate", "private_key", "issuing_ca", "serial_number"}
	case s.Engine == EnginePKI:
		return []string{"certificate", "issuing_ca", "serial_number"}
	case s.Engine == EngineSSH && issues:
		return []string{"signed_key", "private_key", "serial_number"}
	case s.Engine == EngineSSH:
		return []string{"signed_key", "serial_number"}
	case s.Engine == EngineAWS && s.SetsTTL():
		return []string{"access_key", "secret_key", "session_token"}
	case s.Engine == EngineAWS:
		return []string{"access_key", "secret_key"}
	}
	return nil
}
