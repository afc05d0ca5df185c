package awsaccess

import (
	"errors"
	"strings"
	"testing"

	"github.com/mayfly-security/mayfly/providers"
)

// at is the field that an error is about; empty if there is none.
func at(err error) string {
	var f *providers.FieldError
	if errors.As(err, &f) {
		return f.Field
	}
	return ""
}

func TestAccess(t *testing.T) {
	for _, test := range []struct {
		access Access
		field  string
	}{
		{Access{Region: "eu-central-1", Account: "123456789012"}, ""},
		{Access{Region: "us-gov-west-1"}, ""},
		{Access{Account: "123456789012"}, "region"},
		{Access{Region: "nowhere", Account: "123456789012"}, "region"},
		{Access{Region: "eu-central-1", Account: "12345678901"}, "account"},
	} {
		if got := at(test.access.CheckPlace()); got != test.field {
			t.Errorf("%+v: wrong at %q, want %q", test.access, got, test.field)
		}
	}
	for _, test := range []struct {
		access Access
		url    string
		wrong  string // a word of what is told; empty: nothing is wrong
	}{
		{Access{}, "", ""},
		{Access{FIPS: true, DualStack: true}, "", ""},
		{Access{}, "https://aws.acme.test:9000", ""},
		{Access{}, "http://127.0.0.1:9000", ""},
		{Access{}, "http://[::1]:9000", ""},
		{Access{}, "http://localhost", ""},
		{Access{}, "http://aws.acme.test", "https"},
		{Access{}, "ftp://localhost", "https"},
		{Access{}, "https://aws.acme.test/x", "without a path, such as https://such.test"},
		{Access{}, "https://me@aws.acme.test", "without a path"},
		{Access{}, "https://aws.acme.test?x", "without a path"},
		{Access{}, "aws.acme.test", "without a path"},
		{Access{}, "https://" + strings.Repeat("a", MaxText), "without a path"},
		{Access{FIPS: true}, "https://aws.acme.test", "set either"},
		{Access{DualStack: true}, "https://aws.acme.test", "set either"},
	} {
		err := test.access.CheckEndpoint("endpoint_url", test.url, "https://such.test")
		if (err == nil) != (test.wrong == "") || err != nil && (at(err) != "endpoint_url" || !strings.Contains(err.Error(), test.wrong)) {
			t.Errorf("%s: %v", test.url, err)
		}
	}
}

func TestCredentials(t *testing.T) {
	const role = "arn:aws:iam::123456789012:role/mayfly-broker"
	for _, test := range []struct {
		credentials Credentials
		field       string
	}{
		{Credentials{Method: MethodDefault}, ""},
		{Credentials{Method: MethodWebIdentity, RoleARN: role}, ""},
		{Credentials{Method: MethodWebIdentity, RoleARN: role, Audience: "aws.acme.test"}, ""},
		{Credentials{Method: MethodKeyFile, KeyFile: "/etc/mayfly/keys"}, ""},
		{Credentials{Method: MethodWebIdentity}, "credentials.role_arn"},
		{Credentials{Method: MethodWebIdentity, RoleARN: "arn:aws:iam::123456789012:user/x"}, "credentials.role_arn"},
		{Credentials{Method: MethodWebIdentity, RoleARN: role, Audience: "a b"}, "credentials.audience"},
		{Credentials{Method: MethodWebIdentity, RoleARN: role, Audience: `a"b`}, "credentials.audience"},
		{Credentials{Method: MethodWebIdentity, RoleARN: role, Audience: strings.Repeat("a", 257)}, "credentials.audience"},
		{Credentials{Method: MethodWebIdentity, RoleARN: role, KeyFile: "/etc/mayfly/keys"}, "credentials.key_file"},
		{Credentials{Method: MethodDefault, RoleARN: role}, "credentials.role_arn"},
		{Credentials{Method: MethodDefault, Audience: "x"}, "credentials.audience"},
		{Credentials{Method: MethodKeyFile, KeyFile: "keys"}, "credentials.key_file"},
		{Credentials{Method: MethodKeyFile}, "credentials.key_file"},
	} {
		c := test.credentials
		if got := at(c.Check()); got != test.field {
			t.Errorf("%+v: wrong at %q, want %q", test.credentials, got, test.field)
		}
		if test.field == "" && c.Method == MethodWebIdentity && test.credentials.Audience == "" && c.Audience != "sts.amazonaws.com" {
			t.Errorf("the audience is %q", c.Audience)
		}
	}
}
