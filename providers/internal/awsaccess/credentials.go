package awsaccess

import (
	"cmp"
	"path/filepath"
	"strings"

	"github.com/mayfly-security/mayfly/providers"
)

// How the broker gets its own credentials. Which of them a driver takes is up to it.
const (
	MethodWebIdentity = "web_identity" // AssumeRoleWithWebIdentity, with a JWT-SVID
	MethodDefault     = "default"      // the SDK's default chain
	MethodKeyFile     = "key_file"     // static keys in a file, for servers that are not AWS
)

const defaultAudience = "sts.amazonaws.com"

// Credentials say what the broker itself calls AWS with.
type Credentials struct {
	Method   string
	RoleARN  string // web_identity: the broker's own role
	Audience string // web_identity: of the JWT-SVID; "sts.amazonaws.com"
	KeyFile  string // key_file: absolute path
}

// Check says what is wrong with them, as a *providers.FieldError, and completes
// them. That the method is one that the driver takes has been seen.
func (k *Credentials) Check() error {
	for _, f := range []struct{ field, value, method string }{
		{"credentials.role_arn", k.RoleARN, MethodWebIdentity},
		{"credentials.audience", k.Audience, MethodWebIdentity},
		{"credentials.key_file", k.KeyFile, MethodKeyFile},
	} {
		if f.value != "" && f.method != k.Method {
			return providers.FieldErrorf(f.field, "is for method %s only", f.method)
		}
	}
	switch k.Method {
	case MethodWebIdentity:
		k.Audience = cmp.Or(k.Audience, defaultAudience)
		if _, err := ParseRole(k.RoleARN); err != nil {
			return providers.FieldErrorf("credentials.role_arn", "is %q, %v", k.RoleARN, err)
		}
		if len(k.Audience) > 256 || strings.ContainsFunc(k.Audience, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
			return providers.FieldErrorf("credentials.audience", "must be one audience: a URL or name without spaces and quotes")
		}
	case MethodKeyFile:
		if !filepath.IsAbs(k.KeyFile) || len(k.KeyFile) > MaxText {
			return providers.FieldErrorf("credentials.key_file", "must be an absolute path, not %q", k.KeyFile)
		}
	}
	return nil
}
