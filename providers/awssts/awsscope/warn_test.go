package awsscope

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// TestWarnsOf: what a statement reaches is told in words, and what is wide in it.
func TestWarnsOf(t *testing.T) {
	one, nine := int64(1), int64(9)
	allow := func(fields string) string { return statement(`"Effect":"Allow",` + fields) }
	for _, test := range []struct {
		name, scope string
		says        string
		silent      bool // it does not say it
	}{
		{"role", allow(`"Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/*"`), "sessions of arn:aws:iam::123456789012:role/mayfly/crm", false},
		{"parameter", allow(`"Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}/*"`), "customer matches [a-z]{1,9};", false},
		{"size", allow(`"Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/*"`), "up to 345 of 2048 characters", false},
		{"condition", allow(`"Action":"s3:ListBucket","Resource":"arn:aws:s3:::crm","Condition":{"StringLike":{"s3:prefix":["a/*","b/*"]},"Bool":{"aws:SecureTransport":true}}`),
			"may s3:ListBucket on arn:aws:s3:::crm, if aws:SecureTransport Bool true and s3:prefix StringLike a/* or b/*", false},
		{"condition before *", allow(`"Action":"s3:ListBucket","Resource":"arn:aws:s3:::crm","Condition":{"StringLike":{"s3:prefix":"${params.customer}*"}}`), "in the condition on s3:prefix a parameter stands right before *", false},
		{"condition before /", allow(`"Action":"s3:ListBucket","Resource":"arn:aws:s3:::crm","Condition":{"StringLike":{"s3:prefix":"${params.customer}/*"}}`), "right before", true},
		{"before * and more", allow(`"Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}*/x"`), "a parameter stands right before *", false},
		{"all buckets", allow(`"Action":"s3:GetObject","Resource":"arn:aws:s3:::*"`), "every resource of its kind", false},
		{"all objects", allow(`"Action":"s3:GetObject","Resource":"arn:aws:s3:::*/*"`), "every resource of its kind", false},
		{"some buckets", allow(`"Action":"s3:GetObject","Resource":"arn:aws:s3:::crm-*/x"`), "every bucket whose name fits", false},
		{"one bucket", allow(`"Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/*"`), "is for every", true},
		{"somebody's bucket", allow(`"Action":"s3:PutObject","Resource":"arn:aws:s3:::${params.customer}/x"`), "which may be of another account", false},
		{"our bucket", allow(`"Action":"s3:PutObject","Resource":"arn:aws:s3:::${params.customer}/x","Condition":{"StringEquals":{"aws:ResourceAccount":"123456789012"}}`), "which may be of another account", true},
		{"all tables", allow(`"Action":"dynamodb:GetItem","Resource":"arn:aws:dynamodb:eu-central-1:123456789012:table/*"`), "every resource of its kind", false},
		{"one table", allow(`"Action":"dynamodb:GetItem","Resource":"arn:aws:dynamodb:eu-central-1:123456789012:table/crm*"`), "every resource of its kind", true},
		{"a function", allow(`"Action":"lambda:InvokeFunction","Resource":"arn:aws:lambda:eu-central-1:123456789012:function:x"`), "the function does what its role may do", false},
		{"an integer", allow(`"Action":"dynamodb:GetItem","Resource":"arn:aws:dynamodb:eu-central-1:123456789012:table/crm-${params.n}"`), "n is from 1 to 9;", false},
		{"a managed policy", `{` + role + `,"policy_arns":["arn:aws:iam::aws:policy/AmazonS3FullAccess"]}`, "can do what the policies and the role both allow", false},
		{"a wide managed policy", `{` + role + `,"policy_arns":["arn:aws:iam::aws:policy/AmazonS3FullAccess"]}`, "everything of a service", false},
		{"a managed policy that reads all", `{` + role + `,"policy_arns":["arn:aws:iam::aws:policy/ReadOnlyAccess"]}`, "reads nearly everything", false},
		{"a managed policy that reads some", `{` + role + `,"policy_arns":["arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess"]}`, "reads nearly everything", true},
		{"boundary", allow(`"Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/*"`), "more than the role's boundary", false},
		{"deny", statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/*"},{"Effect":"Deny","Action":"s3:*","Resource":"*"`), "wildcard", true},
	} {
		s, err := ParseScope(config(t), tool(test.scope, str("customer", "[a-z]{1,9}"), broker.Param{Name: "n", Type: broker.ParamInteger, Min: &one, Max: &nine}))
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		var all []string
		for _, f := range s.Warnings(config(t)) {
			all = append(all, f.Message)
		}
		if text := strings.Join(all, "\n"); strings.Contains(text, test.says) == test.silent {
			t.Errorf("%s: of %q it says:\n%s", test.name, test.says, text)
		}
	}
}

// TestWarnsWhole: what a service's wildcard brings is told in one line that is shown whole.
func TestWarnsWhole(t *testing.T) {
	services := map[string]bool{}
	for known := range escalations {
		service, _, _ := strings.Cut(known, ":")
		services[service] = true
	}
	for service := range services {
		each := Statement{Effect: "Allow", Action: []string{service + ":*"}, Resource: []string{"*"}}
		told := 0
		each.warn("statement ExampleOfALongSidWithFortyCharactersXX", func(_, format string, args ...any) {
			if text := fmt.Sprintf(format, args...); strings.Contains(text, "more can be done") {
				if told++; len(text) > 1000 {
					t.Errorf("%d bytes are cut at 1000: %s", len(text), text)
				}
			}
		})
		if told != 1 {
			t.Errorf("%s: %d lines", service, told)
		}
	}
}

// TestLargest: the largest policy is as long as the check reckons, and over at its end.
func TestLargest(t *testing.T) {
	s, err := ParseScope(config(t), tool(statement(`"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}/*"`), str("customer", "[a-z]{1,9}")))
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Largest(time.Unix(0, 0))
	longest, err2 := s.Policy(map[string]string{"customer": "abcdefghi"}, time.Unix(0, 0))
	if err := errors.Join(err, err2); err != nil || len(got) != len(longest) || !strings.Contains(got, `"1970-01-01T00:00:00Z"`) || strings.Contains(got, "params") {
		t.Errorf("%v: %s, and not %s", err, got, longest)
	}
}

// TestOtherAccount: IAM writes policies of its caller's own account alone.
func TestOtherAccount(t *testing.T) {
	other := strings.Replace(good, "::123456789012:role/mayfly-broker", "::210987654321:role/mayfly-broker", 1)
	_, err := ParseConfig(json.RawMessage(`{` + other + `}`))
	if field(err) != "early_revoke.mode" || !strings.Contains(err.Error(), "210987654321") {
		t.Errorf("a deny list in another account: %v", err)
	}
	if _, err := ParseConfig(json.RawMessage(`{` + strings.Replace(other, "deny_list", "off", 1) + `}`)); err != nil {
		t.Errorf("without a deny list: %v", err)
	}
}
