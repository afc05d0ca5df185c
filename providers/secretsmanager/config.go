package secretsmanager

import (
	"encoding/json"
	"strings"

	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

// config is a provider's configuration, complete: what was left out has its
// default.
type config struct {
	awsaccess.Access        // the account is required
	endpoint         string // of Secrets Manager; empty: AWS's
	stsEndpoint      string // of STS, for web_identity; empty: AWS's
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
	own := in.Credentials
	c := config{
		Access: awsaccess.Access{Region: in.Region, Account: in.Account, FIPS: in.FIPS, DualStack: in.DualStack,
			Credentials: awsaccess.Credentials{Method: own.Method, RoleARN: own.RoleARN, Audience: own.Audience}},
		endpoint: strings.TrimSuffix(in.Endpoint, "/"), stsEndpoint: strings.TrimSuffix(in.STSEndpoint, "/"),
	}
	if err := c.CheckPlace(); err != nil {
		return config{}, err
	}
	if c.Account == "" {
		return config{}, providers.FieldErrorf("account", "is missing: the twelve digits of the AWS account that the secrets are in")
	}
	for _, e := range []struct{ field, url string }{{"endpoint_url", c.endpoint}, {"sts_endpoint_url", c.stsEndpoint}} {
		if err := c.CheckEndpoint(e.field, e.url, "https://secrets.acme.test"); err != nil {
			return config{}, err
		}
	}
	switch {
	case own.Method != awsaccess.MethodWebIdentity && own.Method != awsaccess.MethodDefault:
		return config{}, providers.FieldErrorf("credentials.method", "is %q; it must be web_identity (the broker logs in with a JWT-SVID) or default (the AWS SDK's default chain)", own.Method)
	case own.Method != awsaccess.MethodWebIdentity && c.stsEndpoint != "":
		return config{}, providers.FieldErrorf("sts_endpoint_url", "is for method web_identity only")
	}
	if err := c.Credentials.Check(); err != nil {
		return config{}, err
	}
	return c, nil
}
