package secretsmanager

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

const (
	stageCurrent = "AWSCURRENT"
	// fieldValue is the secret's field where the scope names none.
	fieldValue = "value"
	maxFields  = 32
	maxName    = 512 // characters of a secret's name; AWS's own limit
)

var (
	nameForm    = regexp.MustCompile(`^[A-Za-z0-9/_+=.@-]{1,512}$`) // of a secret, as AWS takes it
	arnForm     = regexp.MustCompile(`^arn:aws[a-z-]*:secretsmanager:([a-z0-9-]+):([0-9]{12}):secret:([A-Za-z0-9/_+=.@-]{1,512})$`)
	stageForm   = regexp.MustCompile(`^[A-Za-z0-9_+=.@-]{1,256}$`)
	versionForm = regexp.MustCompile(`^[A-Za-z0-9-]{32,64}$`)
	fieldForm   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,63}$`)
	paramForm   = regexp.MustCompile(`\$\{params\.([a-z][a-z0-9_]*)\}`)
	// valueForm is what a parameter may put into a secret's name: no slash, with
	// which it would leave its place.
	valueForm = regexp.MustCompile(`^[A-Za-z0-9_+=.@-]{1,256}$`)
)

// scope is a tool's: one version of one secret.
type scope struct {
	secret  string // name or ARN; may have ${params.…} in it
	stage   string // of the version; empty where version is set
	version string // the version's ID; may be empty
	fields  []string
	rotate  bool
}

// parseScope reads and checks a tool's scope. Its errors are *providers.FieldError.
func parseScope(c config, tool broker.Tool) (scope, error) {
	var in struct {
		Secret  string   `json:"secret"`
		Stage   string   `json:"version_stage"`
		Version string   `json:"version_id"`
		Fields  []string `json:"fields"`
		Rotate  bool     `json:"rotate"`
	}
	if err := providers.Decode(tool.Scope, &in); err != nil {
		return scope{}, err
	}
	s := scope{secret: in.Secret, stage: in.Stage, version: in.Version, fields: slices.Clone(in.Fields), rotate: in.Rotate}
	if err := s.checkSecret(c, tool); err != nil {
		return scope{}, err
	}
	switch {
	case s.version != "" && s.stage != "":
		return scope{}, providers.FieldErrorf("version_id", "stands beside version_stage: a lease has one version")
	case s.version != "" && !versionForm.MatchString(s.version):
		return scope{}, providers.FieldErrorf("version_id", "is %q; it is the ID of a version, of 32 to 64 characters", s.version)
	case s.version == "" && s.stage == "":
		s.stage = stageCurrent
	case s.stage != "" && !stageForm.MatchString(s.stage):
		return scope{}, providers.FieldErrorf("version_stage", "is %q; it is a staging label, such as AWSCURRENT", s.stage)
	}
	if s.rotate && s.stage != stageCurrent {
		return scope{}, providers.FieldErrorf("rotate", "is true, and the version is not AWSCURRENT: a rotation makes a new current version, and ends no other")
	}
	if len(s.fields) > maxFields {
		return scope{}, providers.FieldErrorf("fields", "are %d; at most %d are given", len(s.fields), maxFields)
	}
	for i, f := range s.fields {
		at := fmt.Sprintf("fields[%d]", i)
		if !fieldForm.MatchString(f) {
			return scope{}, providers.FieldErrorf(at, "is %q; it is the name of a member of the secret's JSON object: a letter, then letters, digits, '_', '.' and '-'", f)
		}
		if slices.Contains(s.fields[:i], f) {
			return scope{}, providers.FieldErrorf(at, "%q is there twice", f)
		}
	}
	return s, nil
}

func (s scope) checkSecret(c config, tool broker.Tool) error {
	if s.secret == "" {
		return providers.FieldErrorf("secret", "is missing: the name or the ARN of one secret")
	}
	declared := map[string]broker.Param{}
	for _, p := range tool.Params {
		declared[p.Name] = p
	}
	used := map[string]bool{}
	for _, m := range paramForm.FindAllStringSubmatch(s.secret, -1) {
		p, ok := declared[m[1]]
		if !ok {
			return providers.FieldErrorf("secret", "has ${params.%s}, and the tool has no such parameter", m[1])
		}
		if p.Optional {
			return providers.FieldErrorf("secret", "has ${params.%s}, which the caller may leave out: make it no optional one", m[1])
		}
		used[m[1]] = true
	}
	for _, p := range tool.Params {
		if !used[p.Name] {
			return providers.FieldErrorf("secret", "does not use the parameter %s, which would then mean nothing: put ${params.%s} into the secret's name, or remove it", p.Name, p.Name)
		}
	}
	plain := paramForm.ReplaceAllString(s.secret, "x")
	if strings.HasPrefix(plain, "arn:") {
		m := arnForm.FindStringSubmatch(plain)
		switch {
		case m == nil:
			return providers.FieldErrorf("secret", "is %q, which is no ARN of a secret, such as arn:aws:secretsmanager:eu-central-1:123456789012:secret:crm/key-AbCdEf", s.secret)
		case m[1] != c.Region || m[2] != c.Account:
			return providers.FieldErrorf("secret", "is in region %s of account %s, and the provider is region %s of account %s", m[1], m[2], c.Region, c.Account)
		case len(used) > 0:
			return providers.FieldErrorf("secret", "is an ARN with a parameter in it; an ARN is of one secret: use its name")
		}
		return nil
	}
	if !nameForm.MatchString(plain) {
		return providers.FieldErrorf("secret", "is %q; it is a secret's name: letters, digits and / _ + = . @ -", s.secret)
	}
	return nil
}

// name is the secret's name for a lease with these parameters.
func (s scope) name(params map[string]string) (string, error) {
	var bad error
	name := paramForm.ReplaceAllStringFunc(s.secret, func(m string) string {
		key := paramForm.FindStringSubmatch(m)[1]
		value := params[key]
		if !valueForm.MatchString(value) {
			bad = broker.Refusef(broker.ReasonParameter, "give a value of letters, digits and _ + = . @ -",
				"parameter %s is %q, which cannot stand in a secret's name", key, broker.Clean(broker.Shorten(value, 60)))
		}
		return value
	})
	if bad == nil && len(name) > maxName {
		bad = broker.Refusef(broker.ReasonParameter, "give shorter values", "the secret's name has %d characters; AWS takes %d", len(name), maxName)
	}
	return name, bad
}

// names are the fields that leases have.
func (s scope) names() []string {
	if len(s.fields) == 0 {
		return []string{fieldValue}
	}
	return s.fields
}

// pick takes what the tool gives out of a secret's text.
func (s scope) pick(text string) (map[string]string, error) {
	if len(s.fields) == 0 {
		return map[string]string{fieldValue: text}, nil
	}
	var members map[string]json.RawMessage
	if json.Unmarshal([]byte(text), &members) != nil {
		return nil, fmt.Errorf("the secret is no JSON object, and the scope names fields of one")
	}
	out := make(map[string]string, len(s.fields))
	for _, f := range s.fields {
		value, err := plainText(members[f])
		if err != nil {
			return nil, fmt.Errorf("the secret's member %s %w", f, err)
		}
		out[f] = value
	}
	return out, nil
}

// plainText is a JSON string's text, and what else is one value as it is written.
// Its errors hold nothing of the value.
func plainText(raw json.RawMessage) (string, error) {
	var text string
	switch {
	case len(raw) == 0 || string(raw) == "null":
		return "", fmt.Errorf("is not there")
	case json.Unmarshal(raw, &text) == nil:
		return text, nil
	case raw[0] == '{' || raw[0] == '[':
		return "", fmt.Errorf("is no single value")
	}
	return string(raw), nil
}

func (s scope) survives() string {
	if s.rotate {
		return "the secret itself: it was there before the lease; the lease's end begins its rotation, and whether the old value works after that is up to the rotation function"
	}
	return "the secret itself: it was there before the lease, and only its rotation ends it"
}
