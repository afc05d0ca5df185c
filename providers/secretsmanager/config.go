package secretsmanager

import (
	"encoding/json"
	"net/netip"
	"net/url"
	"regexp"
	"strings"

	"github.com/mayfly-security/mayfly/providers"
)

// How the broker gets the credentials that it reads secrets with.
const (
	methodWebIdentity = "web_identity" // AssumeRoleWithWebIdentity, with a JWT-SVID
	methodDefault     = "default"      // the SDK's default chain
)

const (
	defaultAudience = "sts.amazonaws.com"
	maxText         = 512 // bytes of a URL or name
)

var (
	regionForm  = regexp.MustCompile(`^[a-z]{2,4}(-[a-z]+)+-[0-9]{1,2}$`)
	accountForm = regexp.MustCompile(`^[0-9]{12}$`)
	roleForm    = regexp.MustCompile(`^arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]{1,512}$`)
)

// config is a provider's configuration, complete: what was left out has its
// default.
type config struct {
	region      string // required
	account     string // twelve digits; required
	endpoint    string // of Secrets Manager; empty: AWS's
	stsEndpoint string // of STS, for web_identity; empty: AWS's
	fips        bool
	dualStack   bool
	method      string
	roleARN     string // web_identity
	audience    string // web_identity: of the JWT-SVID; "sts.amazonaws.com"
}

// parseConfig reads and checks a provider's configuration. Its errors are
// *providers.FieldError.
func parseConfig(raw json.RawMessage) (config, error) {
	var in struct {
		Region      string `json:"region"`
		Account     string `json:"account"`
		Endpoint    string `json:"endpoint_url"`
		STSEndpoint string `json:"sts_endpoint_url"`
		FIPS        bool   `json:"use_fips_endpoint"`
		DualStack   bool   `json:"use_dualstack_endpoint"`
		Credentials struct {
			Method   string `json:"method"`
			RoleARN  string `json:"role_arn"`
			Audience string `json:"audience"`
		} `json:"credentials"`
	}
	if err := providers.Decode(raw, &in); err != nil {
		return config{}, err
	}
	c := config{
		region: in.Region, account: in.Account, fips: in.FIPS, dualStack: in.DualStack,
		endpoint: strings.TrimSuffix(in.Endpoint, "/"), stsEndpoint: strings.TrimSuffix(in.STSEndpoint, "/"),
		method: in.Credentials.Method, roleARN: in.Credentials.RoleARN, audience: in.Credentials.Audience,
	}
	if !regionForm.MatchString(c.region) {
		return config{}, providers.FieldErrorf("region", "is %q; it is an AWS region, such as eu-central-1", c.region)
	}
	if !accountForm.MatchString(c.account) {
		return config{}, providers.FieldErrorf("account", "is %q; it is the twelve digits of the AWS account that the secrets are in", c.account)
	}
	for _, e := range []struct{ field, value string }{{"endpoint_url", c.endpoint}, {"sts_endpoint_url", c.stsEndpoint}} {
		if err := checkEndpoint(e.field, e.value, c.fips || c.dualStack); err != nil {
			return config{}, err
		}
	}
	switch c.method {
	case methodWebIdentity:
		if !roleForm.MatchString(c.roleARN) {
			return config{}, providers.FieldErrorf("credentials.role_arn", "is %q, which is no ARN of an IAM role, such as arn:aws:iam::123456789012:role/mayfly-broker", c.roleARN)
		}
		if c.audience == "" {
			c.audience = defaultAudience
		}
		if len(c.audience) > 256 || strings.ContainsFunc(c.audience, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
			return config{}, providers.FieldErrorf("credentials.audience", "must be one audience: a URL or name without spaces and quotes")
		}
	case methodDefault:
		for _, f := range []struct{ field, value string }{
			{"credentials.role_arn", c.roleARN}, {"credentials.audience", c.audience}, {"sts_endpoint_url", c.stsEndpoint},
		} {
			if f.value != "" {
				return config{}, providers.FieldErrorf(f.field, "is for method web_identity only")
			}
		}
	default:
		return config{}, providers.FieldErrorf("credentials.method", "is %q; it must be web_identity (the broker logs in with a JWT-SVID) or default (the AWS SDK's default chain)", c.method)
	}
	return c, nil
}

func checkEndpoint(field, endpoint string, chosen bool) error {
	if endpoint == "" {
		return nil
	}
	u, err := url.Parse(endpoint)
	if err != nil || len(endpoint) > maxText || u.Host == "" || u.User != nil || u.Path != "" || strings.ContainsAny(endpoint, "?#") {
		return providers.FieldErrorf(field, "must be a URL without a path, such as https://secrets.acme.test")
	}
	if u.Scheme != "https" && !(u.Scheme == "http" && loopback(u.Hostname())) {
		return providers.FieldErrorf(field, "must be an https URL; only a loopback host may have http")
	}
	if chosen {
		return providers.FieldErrorf(field, "takes the place of AWS's endpoints, among which use_fips_endpoint and use_dualstack_endpoint choose; set either")
	}
	return nil
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
