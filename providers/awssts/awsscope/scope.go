package awsscope

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

const (
	// MaxPolicy is AWS's limit on the characters of a session policy.
	MaxPolicy = 2048
	// MaxPacked bounds policy, policy ARNs and tags together. AWS has a limit on
	// their packed size that it tells nobody how to compute; this leaves a
	// margin, and what it does not catch AWS refuses with PackedPolicyTooLarge.
	MaxPacked = 2400
	// tagRoom is what the three tags take at most, keys and values.
	tagRoom = len(TagAgent) + maxAgentTag + len(TagIncident) + 26 + len(TagTool) + 64

	maxRoles = 50
	maxARNs  = 10
)

// The fields of the secret.
const (
	FieldAccessKeyID     = "access_key_id"
	FieldSecretAccessKey = "secret_access_key"
	FieldSessionToken    = "session_token"
	FieldExpiration      = "expiration"
)

var policyForm = regexp.MustCompile(`^arn:(aws[a-z-]*):iam::(aws|[0-9]{12}):policy(/[A-Za-z0-9+=,.@_-]+)+$`)

// wide are AWS's own policies that no tool may have.
var wide = []string{"AdministratorAccess", "PowerUserAccess", "IAMFullAccess"}

// Scope is what a tool's leases can do in AWS, complete.
type Scope struct {
	Roles      []awsaccess.Role // sorted by ARN; none on a compatible server
	Statements []Statement      // or PolicyARNs
	PolicyARNs []string

	compatible bool
	params     []broker.Param
}

// ParseScope reads and checks a tool's scope. Its errors are
// *providers.FieldError.
func ParseScope(c Config, tool broker.Tool) (Scope, error) {
	var in struct {
		Role       string          `json:"role"`
		Roles      []string        `json:"roles"`
		Statements json.RawMessage `json:"statements"`
		PolicyARNs []string        `json:"policy_arns"`
	}
	if err := providers.Decode(tool.Scope, &in); err != nil {
		return Scope{}, err
	}
	s := Scope{PolicyARNs: in.PolicyARNs, compatible: c.Compatible(), params: tool.Params}
	if err := s.roles(c, in.Role, in.Roles); err != nil {
		return Scope{}, err
	}
	none := len(in.Statements) == 0 || string(in.Statements) == "null"
	switch {
	case none && in.PolicyARNs == nil:
		return Scope{}, providers.FieldErrorf("statements", "is missing: the IAM statements that say what the tool may do (or policy_arns, managed policies)")
	case !none && in.PolicyARNs != nil:
		return Scope{}, providers.FieldErrorf("policy_arns", "takes the place of statements; set either")
	case !none:
		var err error
		if s.Statements, err = parseStatements(in.Statements); err != nil {
			return Scope{}, err
		}
		for i, each := range s.Statements {
			if err := each.check(c, fmt.Sprintf("statements[%d]", i), tool.Params); err != nil {
				return Scope{}, err
			}
		}
		if !slices.ContainsFunc(s.Statements, func(each Statement) bool { return each.Effect == allow }) {
			return Scope{}, providers.FieldErrorf("statements", "allow nothing")
		}
	default:
		if err := s.arns(c); err != nil {
			return Scope{}, err
		}
	}
	if tool.MaxTTL > c.MaxSession {
		why := "max_session of the provider"
		if c.Chained && c.MaxSession == ChainedMax {
			why = "what AWS gives to the broker's credentials, which are a role's (role chaining)"
		}
		return Scope{}, providers.FieldErrorf("", "max_ttl of the tool is %s, and a session lives at most %s: %s", broker.Span(tool.MaxTTL), broker.Span(c.MaxSession), why)
	}
	return s, s.fits(tool)
}

func (s *Scope) roles(c Config, one string, pool []string) error {
	if c.Compatible() {
		if one != "" || pool != nil {
			return providers.FieldErrorf("role", "is for AWS; on a compatible server leases are a part of what the provider's own keys can do")
		}
		return nil
	}
	field := func(i int) string { return fmt.Sprintf("roles[%d]", i) }
	switch {
	case one != "" && pool != nil:
		return providers.FieldErrorf("roles", "is a pool that takes the place of role; set either")
	case one != "":
		pool, field = []string{one}, func(int) string { return "role" }
	case len(pool) == 0:
		return providers.FieldErrorf("role", "is missing: the ARN of the IAM role whose sessions the leases are")
	case len(pool) > maxRoles:
		return providers.FieldErrorf("roles", "has %d roles; at most %d are taken", len(pool), maxRoles)
	}
	for i, arn := range pool {
		r, err := awsaccess.ParseRole(arn)
		if err != nil {
			return providers.FieldErrorf(field(i), "is %q, %v", broker.Clean(broker.Shorten(arn, 120)), err)
		}
		switch {
		case r.Partition != c.Partition:
			return providers.FieldErrorf(field(i), "is of partition %s, and the provider's region %s is in partition %s", r.Partition, c.Region, c.Partition)
		case r.Account != c.Account:
			return providers.FieldErrorf(field(i), "is of account %s, and the provider is account %s", r.Account, c.Account)
		case !strings.HasPrefix(r.Path, c.RolePath):
			return providers.FieldErrorf(field(i), "has the path %s; the broker may use roles below %s alone (role_path)", r.Path, c.RolePath)
		case !strings.HasPrefix(r.Name, c.RolePrefix):
			return providers.FieldErrorf(field(i), "has the name %s, which does not begin with %s (role_prefix)", r.Name, c.RolePrefix)
		case slices.ContainsFunc(s.Roles, func(other awsaccess.Role) bool { return other.ARN == arn }):
			return providers.FieldErrorf(field(i), "stands twice")
		}
		s.Roles = append(s.Roles, r)
	}
	slices.SortFunc(s.Roles, func(a, b awsaccess.Role) int { return strings.Compare(a.ARN, b.ARN) })
	return nil
}

func (s *Scope) arns(c Config) error {
	if c.Compatible() {
		return providers.FieldErrorf("policy_arns", "are for AWS; on a compatible server write statements")
	}
	if len(s.PolicyARNs) == 0 || len(s.PolicyARNs) > maxARNs {
		return providers.FieldErrorf("policy_arns", "must list 1 to %d ARNs of managed policies", maxARNs)
	}
	for i, arn := range s.PolicyARNs {
		at := fmt.Sprintf("policy_arns[%d]", i)
		m := policyForm.FindStringSubmatch(arn)
		switch {
		case m == nil || len(arn) > awsaccess.MaxText:
			return providers.FieldErrorf(at, "is %q; it is the ARN of a managed policy, such as arn:%s:iam::aws:policy/AmazonS3ReadOnlyAccess", broker.Clean(broker.Shorten(arn, 120)), c.Partition)
		case m[1] != c.Partition:
			return providers.FieldErrorf(at, "is of partition %s, and the provider's region %s is in partition %s", m[1], c.Region, c.Partition)
		case m[2] != "aws" && m[2] != c.Account:
			return providers.FieldErrorf(at, "is of account %s: a session policy is AWS's own, or of the role's account", m[2])
		case slices.Contains(s.PolicyARNs[:i], arn):
			return providers.FieldErrorf(at, "stands twice")
		case m[2] == "aws" && slices.Contains(wide, arn[strings.LastIndexByte(arn, '/')+1:]):
			return providers.FieldErrorf(at, "gives nearly everything; no tool can have it")
		}
	}
	return nil
}

// fits refuses a scope whose session policy could be too long for AWS with the
// longest values of its parameters.
func (s Scope) fits(tool broker.Tool) error {
	most := map[string]int{}
	for _, p := range tool.Params {
		most[p.Name] = longest(p)
	}
	policy, err := s.render(func(name string) string { return strings.Repeat("x", most[name]) }, time.Unix(0, 0))
	if err != nil {
		return providers.FieldErrorf("statements", "%v", err)
	}
	field := "statements"
	if s.Statements == nil {
		field = "policy_arns"
	}
	with := ""
	if len(tool.Params) > 0 {
		with = " at the longest values of its parameters (bound their patterns, such as [a-z]{1,20})"
	}
	if n := len([]rune(string(policy))); n > MaxPolicy {
		return providers.FieldErrorf(field, "make a session policy of up to %d characters, with the end of the lease in it%s; AWS takes %d", n, with, MaxPolicy)
	}
	n := len(policy) + tagRoom
	for _, arn := range s.PolicyARNs {
		n += len(arn)
	}
	if n > MaxPacked {
		return providers.FieldErrorf(field, "make, with the session's tags, up to %d characters%s; AWS packs them into a size that cannot be computed here, and more than %d are not dared", n, with, MaxPacked)
	}
	return nil
}

// document is a policy of IAM.
type document struct {
	Version   string
	Statement []Statement
}

// Policy is the session policy of a lease: what the tool may do with these
// values of its parameters, and nothing at all after end. Fractions of seconds
// are cut off.
func (s Scope) Policy(params map[string]string, end time.Time) (string, error) {
	for name, v := range params {
		if s.compatible && special(v) {
			return "", broker.Refusef(broker.ReasonParameter, "give a value without these characters",
				"parameter %s has one of * ? $, which a compatible server may take for a wildcard", name)
		}
		if !inPolicy(v) {
			return "", broker.Refusef(broker.ReasonParameter, "give a value of Latin-1 characters",
				"parameter %s has characters that AWS does not take in a session policy", name)
		}
	}
	missing := ""
	policy, err := s.render(func(name string) string {
		if params[name] == "" {
			missing = name
		}
		return escape(params[name])
	}, end)
	switch {
	case err != nil:
		return "", err
	case missing != "":
		return "", broker.Refusef(broker.ReasonParameter, "give a value", "parameter %s has no value, and without one the permissions would be wider", missing)
	}
	if n := len([]rune(string(policy))); n > MaxPolicy {
		return "", broker.Refusef(broker.ReasonParameter, "give shorter values", "the session policy would have %d characters; AWS takes %d", n, MaxPolicy)
	}
	return string(policy), nil
}

func (s Scope) render(value func(string) string, end time.Time) ([]byte, error) {
	d := document{Version: "2012-10-17"}
	for _, each := range s.Statements {
		d.Statement = append(d.Statement, each.filled(value))
	}
	if !s.compatible {
		// That statements do not allow it is not enough: a role that trusts the
		// session by its ARN, or everybody under conditions, asks for no more. And
		// what managed policies hold is not known here, and may change.
		not := []string{"sts:AssumeRole"}
		if len(s.PolicyARNs) > 0 {
			not = denied
		}
		d.Statement = append(d.Statement, Statement{Sid: "MayflyNever", Effect: deny, Action: not, Resource: []string{"*"}})
	}
	action, resource := "*", "*"
	if s.compatible {
		action, resource = "s3:*", "arn:aws:s3:::*" // MinIO takes no time with *; its tools have actions of S3 alone
	}
	d.Statement = append(d.Statement, Statement{Sid: "MayflyEnd", Effect: deny, Action: []string{action}, Resource: []string{resource},
		Condition: map[string]map[string][]string{"DateGreaterThan": {"aws:CurrentTime": {Instant(end)}}}})
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(d); err != nil {
		return nil, fmt.Errorf("writing the session policy: %w", err)
	}
	return bytes.TrimSpace(b.Bytes()), nil
}

// Instant is an instant as policies have it, in whole seconds.
func Instant(t time.Time) string { return t.UTC().Truncate(time.Second).Format(time.RFC3339) }

// Survives says, for people, what of a lease outlives its revocation.
func (s Scope) Survives(c Config) string {
	const always = "connections that are open already, work that was begun with it, presigned GetCallerIdentity requests, and what a resource policy gives to everybody"
	switch c.Early.Mode {
	case EarlyDenyList:
		return always
	case EarlyMinIO:
		return "work that was begun with it"
	}
	return "the session itself, until the lease's end: nothing ends it earlier (early_revoke is off)"
}

// Info is what the catalog learns of the scope.
func (s Scope) Info(c Config) providers.ScopeInfo {
	return providers.ScopeInfo{
		Fields:   []string{FieldAccessKeyID, FieldExpiration, FieldSecretAccessKey, FieldSessionToken},
		Survives: s.Survives(c),
		MinTTL:   time.Second,
	}
}
