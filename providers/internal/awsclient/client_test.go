package awsclient

import (
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/iam"
	"github.com/aws/aws-sdk-go-v2/service/secretsmanager"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

// TestAt: what the configuration says of endpoints and tries reaches the client
// of each service.
func TestAt(t *testing.T) {
	for _, fips := range []bool{false, true} {
		for _, dual := range []bool{false, true} {
			for _, once := range []bool{false, true} {
				k, err := Open(t.Context(), Config{Once: once, Access: awsaccess.Access{Region: "eu-central-1", FIPS: fips, DualStack: dual,
					Credentials: awsaccess.Credentials{Method: awsaccess.MethodDefault}}}, nil)
				if err != nil {
					t.Fatal(err)
				}
				type options struct {
					fips     aws.FIPSEndpointState
					dual     aws.DualStackEndpointState
					endpoint *string
					region   string
					tries    int
				}
				for _, endpoint := range []string{"", "https://aws.acme.test"} {
					want := options{region: "eu-central-1", tries: 3}
					if fips {
						want.fips = aws.FIPSEndpointStateEnabled
					}
					if dual {
						want.dual = aws.DualStackEndpointStateEnabled
					}
					if once {
						want.tries = 1
					}
					s, i, m := sts.NewFromConfig(k.At(endpoint)).Options(), iam.NewFromConfig(k.At(endpoint)).Options(), secretsmanager.NewFromConfig(k.At(endpoint)).Options()
					for service, have := range map[string]options{
						"sts":            {s.EndpointOptions.UseFIPSEndpoint, s.EndpointOptions.UseDualStackEndpoint, s.BaseEndpoint, s.Region, s.Retryer.MaxAttempts()},
						"iam":            {i.EndpointOptions.UseFIPSEndpoint, i.EndpointOptions.UseDualStackEndpoint, i.BaseEndpoint, i.Region, i.Retryer.MaxAttempts()},
						"secretsmanager": {m.EndpointOptions.UseFIPSEndpoint, m.EndpointOptions.UseDualStackEndpoint, m.BaseEndpoint, m.Region, m.Retryer.MaxAttempts()},
					} {
						if aws.ToString(have.endpoint) != endpoint || (have.endpoint == nil) != (endpoint == "") {
							t.Errorf("%s: the endpoint is %q, not %q", service, aws.ToString(have.endpoint), endpoint)
						}
						if have.endpoint = nil; have != want {
							t.Errorf("%s: %+v, want %+v", service, have, want)
						}
					}
				}
			}
		}
	}
}

// TestNothingToLogInWith: a nil identity is an error, and so is no method.
func TestNothingToLogInWith(t *testing.T) {
	for _, method := range []string{awsaccess.MethodWebIdentity, ""} {
		if _, err := Open(t.Context(), Config{Access: awsaccess.Access{Region: "eu-central-1", Credentials: awsaccess.Credentials{Method: method}}}, nil); err == nil {
			t.Errorf("method %q: it opens", method)
		}
	}
}
