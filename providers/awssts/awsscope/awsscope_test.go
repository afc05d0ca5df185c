package awsscope

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

const good = `"region":"eu-central-1","account":"123456789012","credentials":{"method":"web_identity","role_arn":"arn:aws:iam::123456789012:role/mayfly-broker"},"early_revoke":{"mode":"deny_list"}`

func field(err error) string {
	var f *providers.FieldError
	if errors.As(err, &f) {
		return f.Field
	}
	if err != nil {
		return "no *FieldError: " + err.Error()
	}
	return ""
}

func TestConfig(t *testing.T) {
	for _, test := range []struct{ config, field string }{
		{`{` + good + `}`, ""},
		{`{` + good + `,"max_session":"30m","role_path":"/tools/","role_prefix":"m-","use_fips_endpoint":true,"use_dualstack_endpoint":true}`, ""},
		{`{` + good + `,"speed":1}`, "speed"},
		{`{` + good + `,"region":"Frankfurt"}`, "region"},
		{`{` + good + `,"account":"1234"}`, "account"},
		{`{` + good + `,"account":""}`, "account"},
		{`{` + good + `,"endpoint_url":"http://sts.acme.test"}`, "endpoint_url"},
		{`{` + good + `,"endpoint_url":"https://sts.acme.test/path"}`, "endpoint_url"},
		{`{` + good + `,"endpoint_url":"https://sts.acme.test","use_fips_endpoint":true}`, "endpoint_url"},
		{`{` + good + `,"iam_endpoint_url":"https://user:pw@iam.acme.test"}`, "iam_endpoint_url"},
		{`{` + good + `,"role_path":"/"}`, "role_path"},
		{`{` + good + `,"role_path":"mayfly"}`, "role_path"},
		{`{` + good + `,"role_prefix":"a b"}`, "role_prefix"},
		{`{` + good + `,"max_session":"soon"}`, "max_session"},
		{`{` + good + `,"max_session":"10m"}`, "max_session"},
		{`{` + good + `,"max_session":"2h"}`, "max_session"}, // chained
		{`{` + good + `,"credentials":{"method":"default"},"max_session":"2h"}`, "max_session"},
		{`{` + good + `,"credentials":{"method":"default","chained":false},"max_session":"12h"}`, ""},
		{`{` + good + `,"credentials":{"method":"hope"}}`, "credentials.method"},
		{`{` + good + `,"credentials":{"method":"web_identity","role_arn":"mine"}}`, "credentials.role_arn"},
		{`{` + good + `,"credentials":{"method":"web_identity","role_arn":"arn:aws:iam::123456789012:role/b","chained":false}}`, "credentials.chained"},
		{`{` + good + `,"credentials":{"method":"web_identity","role_arn":"arn:aws:iam::123456789012:role/b","audience":"a b"}}`, "credentials.audience"},
		{`{` + good + `,"credentials":{"method":"default","role_arn":"arn:aws:iam::123456789012:role/b"}}`, "credentials.role_arn"},
		{`{` + good + `,"credentials":{"method":"default","audience":"x"}}`, "credentials.audience"},
		{`{` + good + `,"credentials":{"method":"default","key_file":"/k"}}`, "credentials.key_file"},
		{`{` + good + `,"credentials":{"method":"key_file","key_file":"/k"}}`, "credentials.method"},
		{`{` + good + `,"endpoint_url":"http://127.0.0.1:1","credentials":{"method":"key_file","key_file":"k"}}`, "credentials.key_file"},
		{`{"region":"us-east-1","endpoint_url":"http://127.0.0.1:1","credentials":{"method":"key_file","key_file":"/k"},"early_revoke":{"mode":"minio"}}`, ""},
		{`{"region":"us-east-1","endpoint_url":"http://127.0.0.1:1","credentials":{"method":"default"},"early_revoke":{"mode":"off"}}`, "account"},
		{`{"region":"us-east-1","endpoint_url":"http://127.0.0.1:1","credentials":{"method":"key_file","key_file":"/k"},"early_revoke":{"mode":"deny_list"}}`, "early_revoke.mode"},
		{`{` + good + `,"early_revoke":{}}`, "early_revoke.mode"},
		{`{` + good + `,"early_revoke":{"mode":"minio"}}`, "early_revoke.mode"},
		{`{` + good + `,"early_revoke":{"mode":"off","settle":"1s"}}`, "early_revoke"},
		{`{` + good + `,"early_revoke":{"mode":"deny_list","verify":"hope"}}`, "early_revoke.verify"},
		{`{` + good + `,"early_revoke":{"mode":"deny_list","settle":"1h"}}`, "early_revoke.settle"},
		{`{` + good + `,"early_revoke":{"mode":"deny_list","settle":"-1s"}}`, "early_revoke.settle"},
	} {
		if _, err := ParseConfig(json.RawMessage(last(test.config))); field(err) != test.field {
			t.Errorf("%s: %v, want an error of %q", test.config, err, test.field)
		}
	}
}

// last keeps of each key of an object the last value: later ones of a test replace those of good.
func last(text string) string {
	var m map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		panic(err)
	}
	b, _ := json.Marshal(m)
	return string(b)
}

func TestConfigDefaults(t *testing.T) {
	c, err := ParseConfig(json.RawMessage(`{` + good + `}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.Partition != "aws" || c.RolePath != "/mayfly/" || c.MaxSession != time.Hour || c.Credentials.Audience != "sts.amazonaws.com" ||
		!c.Chained || c.Early.Verify != VerifyProbe || c.Early.Settle != 10*time.Second || c.Compatible() {
		t.Errorf("%+v", c)
	}
	for region, partition := range map[string]string{"cn-north-1": "aws-cn", "us-gov-west-1": "aws-us-gov", "us-iso-east-1": "aws-iso", "us-isob-east-1": "aws-iso-b", "eusc-de-east-1": "aws-eusc"} {
		if got := partitionOf(region); got != partition || (awsaccess.Access{Region: region}).CheckPlace() != nil {
			t.Errorf("region %s is in %s", region, got)
		}
	}
	other, _ := ParseConfig(json.RawMessage(`{` + strings.Replace(good, "deny_list", "off", 1) + `}`))
	if string(other.Meaning()) != string(c.Meaning()) {
		t.Error("how leases are ended early decides what they can do")
	}
}

const role = `"role":"arn:aws:iam::123456789012:role/mayfly/crm"`

func config(t testing.TB) Config {
	c, err := ParseConfig(json.RawMessage(`{` + good + `}`))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func str(name, pattern string) broker.Param {
	return broker.Param{Name: name, Type: broker.ParamString, Pattern: regexp.MustCompile("^(?:" + pattern + ")$")}
}

func tool(scope string, params ...broker.Param) broker.Tool {
	return broker.Tool{Name: "crm.read", Scope: json.RawMessage(scope), Params: params, MaxTTL: time.Hour}
}

func statement(fields string) string {
	return `{` + role + `,"statements":[{` + fields + `}]}`
}

func TestScope(t *testing.T) {
	customer := str("customer", "[a-z]{1,20}")
	optional := customer
	optional.Optional = true
	ok := `"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/*"`
	long := func(n int) string { return strings.Repeat("a", n) }
	for _, test := range []struct {
		name, scope, field string
		params             []broker.Param
	}{
		{name: "one statement", scope: statement(ok)},
		{name: "lists and conditions", scope: statement(`"Sid":"Read","Effect":"Allow","Action":["s3:GetObject","s3:List*"],"Resource":["arn:aws:s3:::crm","arn:aws:s3:::crm/*"],"Condition":{"StringEquals":{"aws:SourceVpc":"vpc-1"},"Bool":{"aws:SecureTransport":true},"NumericLessThan":{"s3:max-keys":10}}`)},
		{name: "a pool", scope: `{"roles":["arn:aws:iam::123456789012:role/mayfly/a","arn:aws:iam::123456789012:role/mayfly/b"],"policy_arns":["arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess"]}`},
		{name: "a parameter", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}/*","Condition":{"StringLike":{"s3:prefix":"${params.customer}/*"}}`), params: []broker.Param{customer}},
		{name: "deny all but", scope: `{` + role + `,"statements":[{` + ok + `},{"Effect":"Deny","NotAction":"s3:*","NotResource":"arn:aws:s3:::crm/*"},{"Effect":"Deny","Action":["iam:*","sts:AssumeRole","*"],"Resource":"*"}]}`},
		{name: "IAM's own variable", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${aws:PrincipalTag/mayfly-tool}/*"`)},
		{name: "an unknown field", scope: `{` + role + `,"speed":1}`, field: "speed"},
		{name: "an unknown field of a statement", scope: statement(ok + `,"Principal":"*"`), field: "statements[0].Principal"},
		{name: "no role", scope: `{"statements":[{` + ok + `}]}`, field: "role"},
		{name: "role and roles", scope: `{` + role + `,"roles":["x"],"statements":[{` + ok + `}]}`, field: "roles"},
		{name: "no ARN", scope: `{"role":"crm","statements":[{` + ok + `}]}`, field: "role"},
		{name: "another account", scope: `{"role":"arn:aws:iam::999999999999:role/mayfly/crm","statements":[{` + ok + `}]}`, field: "role"},
		{name: "another partition", scope: `{"role":"arn:aws-cn:iam::123456789012:role/mayfly/crm","statements":[{` + ok + `}]}`, field: "role"},
		{name: "another path", scope: `{"role":"arn:aws:iam::123456789012:role/crm","statements":[{` + ok + `}]}`, field: "role"},
		{name: "a role twice", scope: `{"roles":["arn:aws:iam::123456789012:role/mayfly/a","arn:aws:iam::123456789012:role/mayfly/a"],"statements":[{` + ok + `}]}`, field: "roles[1]"},
		{name: "nothing", scope: `{` + role + `}`, field: "statements"},
		{name: "both", scope: `{` + role + `,"statements":[{` + ok + `}],"policy_arns":["arn:aws:iam::aws:policy/A"]}`, field: "policy_arns"},
		{name: "no statements", scope: `{` + role + `,"statements":[]}`, field: "statements"},
		{name: "denies alone", scope: statement(`"Effect":"Deny","Action":"s3:*","Resource":"*"`), field: "statements"},
		{name: "a policy that is no ARN", scope: `{` + role + `,"policy_arns":["ReadOnly"]}`, field: "policy_arns[0]"},
		{name: "a policy of another account", scope: `{` + role + `,"policy_arns":["arn:aws:iam::999999999999:policy/A"]}`, field: "policy_arns[0]"},
		{name: "a policy of another partition", scope: `{` + role + `,"policy_arns":["arn:aws-cn:iam::aws:policy/A"]}`, field: "policy_arns[0]"},
		{name: "a policy twice", scope: `{` + role + `,"policy_arns":["arn:aws:iam::aws:policy/A","arn:aws:iam::aws:policy/A"]}`, field: "policy_arns[1]"},
		{name: "administrator", scope: `{` + role + `,"policy_arns":["arn:aws:iam::aws:policy/AdministratorAccess"]}`, field: "policy_arns[0]"},
		{name: "eleven policies", scope: `{` + role + `,"policy_arns":["a","b","c","d","e","f","g","h","i","j","k"]}`, field: "policy_arns"},
		{name: "our Sid", scope: statement(ok + `,"Sid":"MayflyEnd"`), field: "statements[0].Sid"},
		{name: "no effect", scope: statement(`"Action":"s3:GetObject","Resource":"*"`), field: "statements[0].Effect"},
		{name: "NotAction", scope: statement(`"Effect":"Allow","NotAction":"s3:GetObject","Resource":"*"`), field: "statements[0].NotAction"},
		{name: "NotResource", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","NotResource":"arn:aws:s3:::crm"`), field: "statements[0].NotResource"},
		{name: "no action", scope: statement(`"Effect":"Allow","Resource":"*"`), field: "statements[0].Action"},
		{name: "no resource", scope: statement(`"Effect":"Allow","Action":"s3:GetObject"`), field: "statements[0].Resource"},
		{name: "everything", scope: statement(`"Effect":"Allow","Action":"*","Resource":"*"`), field: "statements[0].Action[0]"},
		{name: "any service", scope: statement(`"Effect":"Allow","Action":"s*:GetObject","Resource":"*"`), field: "statements[0].Action[0]"},
		{name: "IAM", scope: statement(`"Effect":"Allow","Action":["s3:GetObject","IAM:PassRole"],"Resource":"*"`), field: "statements[0].Action[1]"},
		{name: "sts:*", scope: statement(`"Effect":"Allow","Action":"sts:*","Resource":"*"`), field: "statements[0].Action[0]"},
		{name: "sts:Assume*", scope: statement(`"Effect":"Allow","Action":"sts:Assume?ole","Resource":"*"`), field: "statements[0].Action[0]"},
		{name: "sts:AssumeRole", scope: statement(`"Effect":"Allow","Action":"STS:assumerole","Resource":"*"`), field: "statements[0].Action[0]"},
		{name: "no resource ARN", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"crm"`), field: "statements[0].Resource[0]"},
		{name: "a resource of another partition", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws-cn:s3:::crm"`), field: "statements[0].Resource[0]"},
		{name: "a resource of any service", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:*:::crm"`), field: "statements[0].Resource[0]"},
		{name: "a parameter as account", scope: statement(`"Effect":"Allow","Action":"sqs:SendMessage","Resource":"arn:aws:sqs:eu-central-1:${params.customer}:q"`), params: []broker.Param{customer}, field: "statements[0].Resource[0]"},
		{name: "a space", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::a b"`), field: "statements[0].Resource[0]"},
		{name: "no such parameter", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::${params.client}"`), params: []broker.Param{customer}, field: "statements[0].Resource[0]"},
		{name: "an optional parameter", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::${params.customer}"`), params: []broker.Param{optional}, field: "statements[0].Resource[0]"},
		{name: "an empty parameter", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::${params.customer}"`), params: []broker.Param{str("customer", "[a-z]{0,20}")}, field: "statements[0].Resource[0]"},
		{name: "a $ alone", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::a$b"`), field: "statements[0].Resource[0]"},
		{name: "an open reference", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::${params.customer"`), params: []broker.Param{customer}, field: "statements[0].Resource[0]"},
		{name: "a parameter as action", scope: statement(`"Effect":"Allow","Action":"s3:${params.customer}","Resource":"*"`), params: []broker.Param{customer}, field: "statements[0].Action[0]"},
		{name: "no operator", scope: statement(ok + `,"Condition":{"Likely":{"aws:SourceVpc":"x"}}`), field: "statements[0].Condition"},
		{name: "no key", scope: statement(ok + `,"Condition":{"StringEquals":{"vpc":"x"}}`), field: "statements[0].Condition.StringEquals"},
		{name: "no value", scope: statement(ok + `,"Condition":{"StringEquals":{"aws:SourceVpc":[]}}`), field: "statements[0].Condition.StringEquals.aws:SourceVpc"},
		{name: "a value out of Latin-1", scope: statement(ok + `,"Condition":{"StringEquals":{"aws:SourceVpc":"日"}}`), field: "statements[0].Condition.StringEquals.aws:SourceVpc"},
		{name: "too long", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::` + long(1900) + `"`), field: "statements"},
		{name: "too long with the longest value", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}/*"`), params: []broker.Param{str("customer", ".+")}, field: "statements"},
		{name: "too long when escaped", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}/*"`), params: []broker.Param{str("customer", "[a-z*]{1,480}")}, field: "statements"},
		{name: "as long, but nothing to escape", scope: statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}/*"`), params: []broker.Param{str("customer", "[a-z]{1,480}")}},
	} {
		if _, err := ParseScope(config(t), tool(test.scope, test.params...)); field(err) != test.field {
			t.Errorf("%s: %v, want an error of %q", test.name, err, test.field)
		}
	}
	hours := tool(statement(ok))
	hours.MaxTTL = 2 * time.Hour
	if _, err := ParseScope(config(t), hours); err == nil || !strings.Contains(err.Error(), "role chaining") {
		t.Errorf("a tool of two hours with chained credentials: %v", err)
	}
}

// TestEscape: what a value says is taken for itself; IAM's own matching of
// what is rendered admits exactly the value.
func TestEscape(t *testing.T) {
	scope, err := ParseScope(config(t), tool(statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}/x"`), str("customer", `(?s).{1,80}`)))
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		value := rapid.StringOfN(rapid.RuneFrom([]rune(`ab*?$\{}"/:é<&`)), 1, 60, -1).Draw(t, "value")
		text, err := scope.Policy(map[string]string{"customer": value}, time.Unix(1_800_000_000, 0))
		if err != nil {
			t.Fatal(err)
		}
		var d struct{ Statement []struct{ Resource []string } }
		if err := json.Unmarshal([]byte(text), &d); err != nil {
			t.Fatal(err)
		}
		pattern := d.Statement[0].Resource[0]
		if got, special := meaning(pattern); special || got != "arn:aws:s3:::crm/"+value+"/x" {
			t.Errorf("%q became %q, which means %q (wildcards: %t)", value, pattern, got, special)
		}
	})
}

// meaning is what IAM makes of a resource: variables replaced, and whether it
// has wildcards or variables beyond the three escapes.
func meaning(pattern string) (text string, special bool) {
	for pattern != "" {
		switch {
		case strings.HasPrefix(pattern, "${*}"), strings.HasPrefix(pattern, "${?}"), strings.HasPrefix(pattern, "${$}"):
			text += pattern[2:3]
			pattern = pattern[4:]
		case strings.HasPrefix(pattern, "*"), strings.HasPrefix(pattern, "?"), strings.HasPrefix(pattern, "${"):
			return text, true
		default:
			text += pattern[:1]
			pattern = pattern[1:]
		}
	}
	return text, false
}

// TestLongest: no value that a pattern admits takes more than was counted.
func TestLongest(t *testing.T) {
	patterns := []string{`[a-z]{1,20}`, `[a-z*?]{3}`, `(ab|cde)?f+`, `[^/]{1,9}`, `\$[0-9]{1,4}`, `(?i)abc`, `"x"{2,5}`, `.{4}`}
	rapid.Check(t, func(t *rapid.T) {
		pattern := rapid.SampledFrom(patterns).Draw(t, "pattern")
		p := str("p", pattern)
		value := rapid.StringMatching(pattern).Draw(t, "value")
		if p.Check(value) != nil || !inPolicy(value) {
			return
		}
		b, _ := json.Marshal(escape(value))
		raw := strings.NewReplacer(`\u003c`, "<", `\u003e`, ">", `\u0026`, "&").Replace(string(b))
		if n := len([]rune(raw)) - 2; n > longest(p) {
			t.Errorf("%q of %s takes %d characters, and %d were counted", value, pattern, n, longest(p))
		}
	})
	one, low, high := broker.Param{Type: broker.ParamString, OneOf: []string{"a*", "abc"}}, int64(-5), int64(12345)
	for _, test := range []struct {
		p    broker.Param
		want int
	}{
		{one, 5}, {broker.Param{Type: broker.ParamBoolean}, 5}, {broker.Param{Type: broker.ParamInteger, Min: &low, Max: &high}, 5}, {broker.Param{Type: broker.ParamInteger}, 20},
	} {
		if got := longest(test.p); got != test.want {
			t.Errorf("%+v: %d, want %d", test.p, got, test.want)
		}
	}
}

// TestCompatible: on a server that is not AWS tools have S3, no role, and no
// managed policies; and what may be a wildcard there is no value.
func TestCompatible(t *testing.T) {
	c, err := ParseConfig(json.RawMessage(`{"region":"us-east-1","endpoint_url":"http://127.0.0.1:1","credentials":{"method":"key_file","key_file":"/k"},"early_revoke":{"mode":"minio"}}`))
	if err != nil {
		t.Fatal(err)
	}
	for scope, want := range map[string]string{
		`{"statements":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/*"}]}`:            "",
		`{"statements":[{"Effect":"Allow","Action":"admin:ServerInfo","Resource":"arn:aws:s3:::crm/*"}]}`:        "statements[0].Action[0]",
		`{` + role + `,"statements":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm"}]}`: "role",
		`{"policy_arns":["arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess"]}`:                                     "policy_arns",
	} {
		if _, err := ParseScope(c, tool(scope)); field(err) != want {
			t.Errorf("%s: %v, want an error of %q", scope, err, want)
		}
	}
	s, err := ParseScope(c, tool(`{"statements":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}"}]}`, str("customer", ".{1,9}")))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.Policy(map[string]string{"customer": "acme"}, time.Unix(0, 0)); err != nil || !strings.Contains(got, `"Action":["s3:*"],"Resource":["arn:aws:s3:::*"],"Condition":{"DateGreaterThan"`) {
		t.Errorf("%s, %v", got, err)
	}
	for _, v := range []string{"a*", "a?", "${x}"} {
		if _, err := s.Policy(map[string]string{"customer": v}, time.Unix(0, 0)); err == nil {
			t.Errorf("%q was taken", v)
		}
	}
}

func TestPolicy(t *testing.T) {
	end := time.Date(2026, 11, 26, 10, 0, 0, 999, time.UTC)
	s, err := ParseScope(config(t), tool(statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/<${params.customer}>"`), str("customer", `.{1,40}`)))
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Policy(map[string]string{"customer": "a*"}, end)
	want := `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetObject"],"Resource":["arn:aws:s3:::crm/<a${*}>"]},` +
		`{"Sid":"MayflyNever","Effect":"Deny","Action":["sts:AssumeRole"],"Resource":["*"]},` +
		`{"Sid":"MayflyEnd","Effect":"Deny","Action":["*"],"Resource":["*"],"Condition":{"DateGreaterThan":{"aws:CurrentTime":["2026-11-26T10:00:00Z"]}}}]}`
	if err != nil || got != want {
		t.Errorf("%v\n%s\nwant\n%s", err, got, want)
	}
	if _, err := s.Policy(map[string]string{"customer": "日"}, end); err == nil {
		t.Error("a character that AWS does not take was taken")
	}
	m, err := ParseScope(config(t), tool(`{`+role+`,"policy_arns":["arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess"]}`))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := m.Policy(nil, end); err != nil || !strings.Contains(got, `"MayflyNever"`) || !strings.Contains(got, `"MayflyEnd"`) {
		t.Errorf("%s, %v", got, err)
	}
}

func TestNames(t *testing.T) {
	sourceForm := regexp.MustCompile(`^[\w+=,.@-]{2,64}$`)
	short, other := spiffeid.RequireFromString("spiffe://acme.test/agent/a"), spiffeid.RequireFromString("spiffe://acme.test/agent/b")
	long := spiffeid.RequireFromString("spiffe://acme.test/" + strings.Repeat("x", 300))
	if a, b := SourceIdentity(short), SourceIdentity(other); a == b || !sourceForm.MatchString(a) {
		t.Errorf("%s and %s", a, b)
	}
	for _, id := range []spiffeid.ID{short, long} {
		n := 0
		for _, tag := range Tags(id, "i1234567890123456789012345", strings.Repeat("t", 64)) {
			n += len(tag.Key) + len(tag.Value)
		}
		if n > tagRoom {
			t.Errorf("tags take %d characters, and %d were counted", n, tagRoom)
		}
	}
	if tags := Tags(short, "", "t"); len(tags) != 2 {
		t.Errorf("%v", tags)
	}
}

func TestWarnings(t *testing.T) {
	s, err := ParseScope(config(t), tool(`{`+role+`,"statements":[{"Sid":"Wide","Effect":"Allow","Action":["s3:*","lambda:UpdateFunctionCode"],"Resource":["*","arn:aws:s3:::crm/${params.customer}*","arn:aws:sqs:*:*:q"]}]}`, str("customer", "[a-z]{1,9}")))
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, f := range s.Warnings(config(t)) {
		all = append(all, f.Message)
		if f.Bad {
			t.Errorf("%+v is bad, and the tool is valid", f)
		}
	}
	text := strings.Join(all, "\n")
	for _, want := range []string{"may s3:*, lambda:UpdateFunctionCode on", "wildcard s3:*", "s3:putbucketpolicy", "function's role", "every resource", "right before *", "any region or account", "session by its ARN"} {
		if !strings.Contains(text, want) {
			t.Errorf("nothing is said of %q:\n%s", want, text)
		}
	}
	for known := range escalations {
		if !regexp.MustCompile(`^[a-z0-9-]+:[a-z0-9]+$`).MatchString(known) {
			t.Errorf("%s matches no action", known)
		}
	}
}

func ExampleScope_Policy() {
	c, _ := ParseConfig(json.RawMessage(`{` + good + `}`))
	s, _ := ParseScope(c, tool(statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/*"`)))
	policy, _ := s.Policy(nil, time.Date(2026, 11, 26, 10, 0, 0, 0, time.UTC))
	fmt.Println(len(policy))
	// Output: 345
}

// TestReferences: what stands in ${} is a parameter of the tool, or a variable
// that IAM has. Anything else would be taken for a variable that is never there,
// and a statement that denies by it would deny nothing.
func TestReferences(t *testing.T) {
	for resource, ok := range map[string]bool{
		"${params.customer}/*":                   true,
		"${aws:PrincipalTag/team}/*":             true,
		"${aws:PrincipalTag/team,'none'}/*":      true,
		"${cognito-identity.amazonaws.com:sub}":  true,
		"a${*}b${?}c${$}":                        true,
		"${$}${params.customer}":                 true,
		"${param.customer}/*":                    false,
		"${Params.customer}/*":                   false,
		"${customer}/*":                          false,
		"${}":                                    false,
		"${aws:PrincipalTag/${params.customer}}": false,
		"${x${params.other}}":                    false,
		"${*${params.customer}}":                 false,
		"$${params.customer}":                    false,
		"${ params.customer}":                    false,
	} {
		_, err := ParseScope(config(t), tool(statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/`+resource+`"`), str("customer", "[a-z]{1,9}")))
		if (err == nil) != ok {
			t.Errorf("%s: %v", resource, err)
		}
	}
}

// TestNever: no tool can have what makes another session, or a token that the
// lease's end does not reach, and every session policy denies it besides: a
// role that trusts anybody, or the session by its ARN, asks no session policy
// that is only silent.
func TestNever(t *testing.T) {
	for _, action := range []string{
		"sts:AssumeRole", "STS:assumeroot", "sts:Assume*", "sts:GetFederationToken", "sts:GetSessionToken", "sts:GetWebIdentityToken",
		"sts:GetDelegatedAccessToken", "sts:Get*", "sts:*Token", "sts:??????????", "iam:Get*", "IAM:*", "sts:" + strings.Repeat("*?", 12),
	} {
		if _, err := ParseScope(config(t), tool(statement(`"Effect":"Allow","Action":"`+action+`","Resource":"*"`))); err == nil {
			t.Errorf("%s was taken", action)
		}
	}
	for _, scope := range []string{statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"*"`), `{` + role + `,"policy_arns":["arn:aws:iam::123456789012:policy/all"]}`} {
		s, err := ParseScope(config(t), tool(scope))
		if err != nil {
			t.Fatal(err)
		}
		text, err := s.Policy(nil, time.Unix(0, 0))
		if err != nil {
			t.Fatal(err)
		}
		var d struct {
			Statement []struct {
				Effect           string
				Action, Resource []string
				Condition        map[string]any
			}
		}
		if err := json.Unmarshal([]byte(text), &d); err != nil {
			t.Fatal(err)
		}
		denied := []string{"sts:assumerole"}
		if s.PolicyARNs != nil {
			denied = append(slices.Clone(never), "iam:passrole")
		}
		for _, action := range denied {
			if !slices.ContainsFunc(d.Statement, func(st struct {
				Effect           string
				Action, Resource []string
				Condition        map[string]any
			}) bool {
				return st.Effect == "Deny" && st.Condition == nil && slices.ContainsFunc(st.Action, func(a string) bool { return matches(strings.ToLower(a), action) })
			}) {
				t.Errorf("%s is not denied by %s", action, text)
			}
		}
	}
}

// TestMatches: the pattern of an action matches as IAM has it, and as fast for
// one that is made to be slow.
func TestMatches(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pattern, text := rapid.StringMatching(`[ab*?]{0,8}`).Draw(t, "pattern"), rapid.StringMatching(`[ab]{0,8}`).Draw(t, "text")
		want := regexp.MustCompile("^" + strings.NewReplacer("*", ".*", "?", ".").Replace(pattern) + "$").MatchString(text)
		if got := matches(pattern, text); got != want {
			t.Errorf("%q matches %q: %t", pattern, text, got)
		}
	})
	begun := time.Now()
	if matches(strings.Repeat("*a", 60)+"b", strings.Repeat("a", 200)) {
		t.Error("it matches")
	}
	if took := time.Since(begun); took > time.Second {
		t.Errorf("it took %s", took)
	}
}

// TestMalformed: what AWS cannot read is refused before anything is minted.
func TestMalformed(t *testing.T) {
	const ok = `"Effect":"Allow","Action":"s3:GetObject","Resource":"*"`
	for _, operator := range []string{"StringEqual", "StringEqualsIfExist", "DateGreater", "ArnEqual", "NumericLess", "BoolIfExist", "StringLikes", "ForAnyValues:StringLike", "ForAllValues:Null", "NullIfExists"} {
		if _, err := ParseScope(config(t), tool(statement(ok+`,"Condition":{"`+operator+`":{"aws:SourceVpc":"x"}}`))); field(err) != "statements[0].Condition" {
			t.Errorf("%s: %v", operator, err)
		}
	}
	for _, operator := range []string{
		"StringEquals", "StringNotEquals", "StringEqualsIgnoreCase", "StringNotEqualsIgnoreCase", "StringLike", "StringNotLike",
		"NumericEquals", "NumericNotEquals", "NumericLessThan", "NumericLessThanEquals", "NumericGreaterThan", "NumericGreaterThanEquals",
		"DateEquals", "DateNotEquals", "DateLessThan", "DateLessThanEquals", "DateGreaterThan", "DateGreaterThanEquals",
		"Bool", "BinaryEquals", "IpAddress", "NotIpAddress", "ArnEquals", "ArnLike", "ArnNotEquals", "ArnNotLike", "Null",
		"StringLikeIfExists", "BoolIfExists", "NotIpAddressIfExists", "ForAnyValue:StringLike", "ForAllValues:StringEqualsIfExists",
	} {
		if _, err := ParseScope(config(t), tool(statement(ok+`,"Condition":{"`+operator+`":{"aws:SourceVpc":"x"}}`))); err != nil {
			t.Errorf("%s: %v", operator, err)
		}
	}
	twice := `{` + role + `,"statements":[{"Sid":"A",` + ok + `},{"Sid":"B",` + ok + `},{"Sid":"A",` + ok + `}]}`
	if _, err := ParseScope(config(t), tool(twice)); field(err) != "statements[2].Sid" {
		t.Errorf("a Sid that stands twice: %v", err)
	}
	for _, scope := range []string{
		`{` + role + `,"statements":[{"effect":"Allow","action":"s3:GetObject","resource":"*"}]}`,
		`{` + role + `,"statements":[{"Effect":"Allow","Action":"s3:GetObject","action":"s3:*","Resource":"*"}]}`,
		`{` + role + `,"statements":[{"Effect":"Allow","Principal":"*","Action":"s3:GetObject","Resource":"*"}]}`,
	} {
		if _, err := ParseScope(config(t), tool(scope)); err == nil {
			t.Errorf("%s was taken", scope)
		}
	}
}

// TestMissingValue: a lease without a value that its statements ask for would
// have others' permissions; it is refused, whoever let it come so far.
func TestMissingValue(t *testing.T) {
	s, err := ParseScope(config(t), tool(statement(`"Effect":"Allow","Action":"s3:ListBucket","Resource":"arn:aws:s3:::crm","Condition":{"StringLike":{"s3:prefix":"${params.customer}*"}}`), str("customer", "[a-z]{1,9}")))
	if err != nil {
		t.Fatal(err)
	}
	for _, params := range []map[string]string{nil, {}, {"client": "acme"}, {"customer": ""}} {
		var refused *broker.Error
		if text, err := s.Policy(params, time.Unix(0, 0)); !errors.As(err, &refused) || refused.Reason != broker.ReasonParameter {
			t.Errorf("%v: %s, %v", params, text, err)
		}
	}
}

// TestWarnConditions: what is to be known of conditions is told.
func TestWarnConditions(t *testing.T) {
	s, err := ParseScope(config(t), tool(statement(`"Effect":"Allow","Action":"s3express:CreateSession","Resource":"arn:aws:s3:::crm","Condition":{"StringLike":{"s3:prefix":"${params.customer}*"},"ForAllValues:StringEquals":{"aws:TagKeys":"team"},"StringEqualsIfExists":{"aws:SourceVpc":"vpc-1"}}`), str("customer", "[a-z]{1,9}")))
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, f := range s.Warnings(config(t)) {
		all = append(all, f.Message)
	}
	text := strings.Join(all, "\n")
	for _, want := range []string{"s3:prefix", "right before *", "ForAllValues:StringEquals", "StringEqualsIfExists", "s3express:createsession"} {
		if !strings.Contains(strings.ReplaceAll(text, "under its conditions: ForAllValues:StringEquals, StringEqualsIfExists", ""), want) {
			t.Errorf("nothing is said of %s:\n%s", want, text)
		}
	}
}
