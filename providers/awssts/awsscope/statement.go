package awsscope

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

const (
	maxStatements = 20
	reference     = "${params." // begins the place of a parameter's value
	allow         = "Allow"
	deny          = "Deny"
)

var (
	sidForm      = regexp.MustCompile(`^[A-Za-z0-9]{0,40}$`)
	actionForm   = regexp.MustCompile(`^[a-zA-Z0-9-]+:[A-Za-z0-9*?]+$`)
	operatorForm = regexp.MustCompile(`^(((ForAllValues|ForAnyValue):)?(String((Not)?Equals(IgnoreCase)?|(Not)?Like)|Arn(Not)?(Equals|Like)|(Numeric|Date)((Not)?Equals|(Less|Greater)Than(Equals)?)|Bool|BinaryEquals|(Not)?IpAddress)(IfExists)?|Null)$`)
	keyForm      = regexp.MustCompile(`^[A-Za-z0-9-]+:[A-Za-z0-9_./:@+=-]+$`)
	variableForm = regexp.MustCompile(`^([*?$]|[A-Za-z0-9.-]+:[^{$,'"\\]+(, *'[^{$'"\\]*')?)$`)
	paramForm    = regexp.MustCompile(`\$\{params\.([^}]*)\}`)
)

// Statement is one statement of a scope, as IAM has it. Resources and the values
// of conditions may hold ${params.NAME}.
type Statement struct {
	Sid         string                         `json:"Sid,omitempty"`
	Effect      string                         `json:"Effect"`
	Action      []string                       `json:"Action,omitempty"`
	NotAction   []string                       `json:"NotAction,omitempty"`
	Resource    []string                       `json:"Resource,omitempty"`
	NotResource []string                       `json:"NotResource,omitempty"`
	Condition   map[string]map[string][]string `json:"Condition,omitempty"`
}

// texts is one text or a list of texts, as IAM takes both.
type texts []string

func (t *texts) UnmarshalJSON(raw []byte) error {
	var one string
	if json.Unmarshal(raw, &one) == nil {
		*t = texts{one}
		return nil
	}
	// Numbers and booleans are how people write the values of conditions.
	var scalar any
	if err := json.Unmarshal(raw, &scalar); err != nil {
		return err
	}
	switch scalar.(type) {
	case bool, float64:
		*t = texts{string(raw)}
		return nil
	}
	var many []string
	if err := json.Unmarshal(raw, &many); err != nil {
		return err
	}
	*t = many
	return nil
}

// written is a statement as people write it, in IAM's own words.
type written struct {
	Sid         string                      `json:"Sid"`
	Effect      string                      `json:"Effect"`
	Action      texts                       `json:"Action"`
	NotAction   texts                       `json:"NotAction"`
	Resource    texts                       `json:"Resource"`
	NotResource texts                       `json:"NotResource"`
	Condition   map[string]map[string]texts `json:"Condition"`
}

func (w written) statement() Statement {
	s := Statement{Sid: w.Sid, Effect: w.Effect, Action: w.Action, NotAction: w.NotAction, Resource: w.Resource, NotResource: w.NotResource}
	for operator, keys := range w.Condition {
		if s.Condition == nil {
			s.Condition = map[string]map[string][]string{}
		}
		s.Condition[operator] = map[string][]string{}
		for key, values := range keys {
			s.Condition[operator][key] = values
		}
	}
	return s
}

// parseStatements reads the statements of a scope.
func parseStatements(raw json.RawMessage) ([]Statement, error) {
	var list []json.RawMessage
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, providers.FieldErrorf("statements", "must be a list of IAM statements")
	}
	if len(list) == 0 || len(list) > maxStatements {
		return nil, providers.FieldErrorf("statements", "must list 1 to %d statements", maxStatements)
	}
	var all []Statement
	for i, each := range list {
		if err := exactly(each); err != nil {
			return nil, within(fmt.Sprintf("statements[%d]", i), err)
		}
		var w written
		if err := providers.Decode(each, &w); err != nil {
			return nil, within(fmt.Sprintf("statements[%d]", i), err)
		}
		if w.Sid != "" && slices.ContainsFunc(all, func(other Statement) bool { return other.Sid == w.Sid }) {
			return nil, providers.FieldErrorf(fmt.Sprintf("statements[%d].Sid", i), "is %s, which another statement has", broker.Clean(broker.Shorten(w.Sid, 60)))
		}
		all = append(all, w.statement())
	}
	return all, nil
}

// exactly refuses a statement with a field that differs from IAM's in its case
// alone: of two such fields one would be read, and people may have read the other.
func exactly(statement json.RawMessage) error {
	var fields map[string]json.RawMessage
	if json.Unmarshal(statement, &fields) != nil {
		return nil // it is refused for that
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		for _, has := range []string{"Sid", "Effect", "Action", "NotAction", "Resource", "NotResource", "Condition"} {
			if name != has && strings.EqualFold(name, has) {
				return providers.FieldErrorf(name, "is written %s", has)
			}
		}
	}
	return nil
}

// within puts the field of an error below another.
func within(at string, err error) error {
	f, ok := err.(*providers.FieldError)
	if !ok {
		return err
	}
	field := at
	if f.Field != "" {
		field += "." + f.Field
	}
	return &providers.FieldError{Field: field, Message: f.Message}
}

// check checks one statement.
func (s Statement) check(c Config, at string, params []broker.Param) error {
	if !sidForm.MatchString(s.Sid) || strings.HasPrefix(s.Sid, "Mayfly") {
		return providers.FieldErrorf(at+".Sid", "is %q; it has at most 40 letters and digits and does not begin with Mayfly", s.Sid)
	}
	if s.Effect != allow && s.Effect != deny {
		return providers.FieldErrorf(at+".Effect", "is %q; it is Allow or Deny", s.Effect)
	}
	if s.Effect == allow {
		if s.NotAction != nil {
			return providers.FieldErrorf(at+".NotAction", "with Allow gives everything that it does not name; name with Action what the tool may do")
		}
		if s.NotResource != nil {
			return providers.FieldErrorf(at+".NotResource", "with Allow gives everything that it does not name; name with Resource what the tool may do it to")
		}
	}
	if (len(s.Action) == 0) == (len(s.NotAction) == 0) {
		return providers.FieldErrorf(at+".Action", "is missing")
	}
	if (len(s.Resource) == 0) == (len(s.NotResource) == 0) {
		return providers.FieldErrorf(at+".Resource", "is missing")
	}
	for _, field := range []struct {
		name   string
		values []string
		check  func(string) error
	}{
		{"Action", s.Action, s.checkAction}, {"NotAction", s.NotAction, s.checkAction},
		{"Resource", s.Resource, func(v string) error { return checkResource(c, v) }},
		{"NotResource", s.NotResource, func(v string) error { return checkResource(c, v) }},
	} {
		for i, v := range field.values {
			where := fmt.Sprintf("%s.%s[%d]", at, field.name, i)
			if c.Compatible() && s.Effect == allow && field.name == "Action" && !strings.HasPrefix(strings.ToLower(v), "s3:") {
				return providers.FieldErrorf(where, "is %s; on a compatible server tools have actions of s3 alone: no others are ended with the lease", broker.Clean(broker.Shorten(v, 80)))
			}
			if err := field.check(v); err != nil {
				return providers.FieldErrorf(where, "%v", err)
			}
			if err := checkReferences(where, v, params, strings.HasSuffix(field.name, "Resource")); err != nil {
				return err
			}
		}
	}
	return s.checkCondition(at, params)
}

func (s Statement) checkCondition(at string, params []broker.Param) error {
	for _, operator := range slices.Sorted(maps.Keys(s.Condition)) {
		where := at + ".Condition"
		if !operatorForm.MatchString(operator) {
			return providers.FieldErrorf(where, "%q is no operator of IAM, such as StringEquals", broker.Clean(broker.Shorten(operator, 60)))
		}
		if len(s.Condition[operator]) == 0 {
			return providers.FieldErrorf(where+"."+operator, "names no key")
		}
		for _, key := range slices.Sorted(maps.Keys(s.Condition[operator])) {
			if !keyForm.MatchString(key) {
				return providers.FieldErrorf(where+"."+operator, "%q is no condition key of IAM, such as aws:SourceVpc", broker.Clean(broker.Shorten(key, 60)))
			}
			if len(s.Condition[operator][key]) == 0 {
				return providers.FieldErrorf(where+"."+operator+"."+key, "has no value")
			}
			for _, v := range s.Condition[operator][key] {
				if !inPolicy(v) {
					return providers.FieldErrorf(where+"."+operator+"."+key, "has characters that AWS does not take in a session policy")
				}
				if err := checkReferences(where+"."+operator+"."+key, v, params, true); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func checkResource(c Config, resource string) error {
	if resource == "*" {
		return nil // some actions know no other; it is warned about
	}
	if !inPolicy(resource) || strings.ContainsAny(resource, " \t\r\n") {
		return fmt.Errorf("has spaces, or characters that AWS does not take in a session policy")
	}
	parts := strings.SplitN(resource, ":", 6)
	if len(parts) < 6 || parts[0] != "arn" || parts[2] == "" || parts[5] == "" {
		return fmt.Errorf("is %q; it is * or an ARN, such as arn:%s:s3:::crm/*", broker.Clean(broker.Shorten(resource, 80)), c.Partition)
	}
	if parts[1] != c.Partition {
		return fmt.Errorf("is of partition %q, and the provider's region %s is in partition %s", broker.Clean(broker.Shorten(parts[1], 40)), c.Region, c.Partition)
	}
	if strings.ContainsAny(parts[2], "*?$") {
		return fmt.Errorf("has a wildcard as its service; name the service")
	}
	for _, p := range parts[:5] {
		if strings.Contains(p, "$") {
			return fmt.Errorf("has ${ before its last part: region and account are fixed by the catalog")
		}
	}
	return nil
}
