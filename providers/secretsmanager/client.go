package secretsmanager

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	sm "github.com/aws/aws-sdk-go-v2/service/secretsmanager"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

const (
	callLimit    = 15 * time.Second // for one call
	loginSession = "mayfly-broker"
)

type clients struct {
	sm   *sm.Client
	http *awshttp.BuildableClient
}

// loginError is that the broker has no credentials to call with.
type loginError struct{ err error }

func (e *loginError) Error() string { return "getting the broker's own credentials: " + e.err.Error() }
func (e *loginError) Unwrap() error { return e.err }

func openClients(ctx context.Context, c config, login attestation.LoginSource) (*clients, error) {
	k := &clients{http: awshttp.NewBuildableClient().WithTimeout(callLimit)}
	base := aws.Config{Region: c.region, HTTPClient: k.http}
	var inner aws.CredentialsProvider
	switch c.method {
	case methodWebIdentity:
		if login == nil {
			return nil, errors.New("there is nothing to log in with")
		}
		anonymous := base
		anonymous.Credentials = aws.AnonymousCredentials{}
		client := sts.NewFromConfig(anonymous, func(o *sts.Options) {
			if c.stsEndpoint != "" {
				o.BaseEndpoint = &c.stsEndpoint
			}
			o.EndpointOptions.UseFIPSEndpoint, o.EndpointOptions.UseDualStackEndpoint = fips(c.fips), dualStack(c.dualStack)
		})
		inner = aws.NewCredentialsCache(stscreds.NewWebIdentityRoleProvider(client, c.roleARN, jwt{login, c.audience},
			func(o *stscreds.WebIdentityRoleOptions) { o.RoleSessionName = loginSession }),
			func(o *aws.CredentialsCacheOptions) { o.ExpiryWindow = 5 * time.Minute })
	default:
		loaded, err := awsconfig.LoadDefaultConfig(ctx, awsconfig.WithRegion(c.region), awsconfig.WithHTTPClient(k.http))
		if err != nil {
			return nil, fmt.Errorf("reading the SDK's configuration: %w", err)
		}
		inner = loaded.Credentials
	}
	base.Credentials = aws.CredentialsProviderFunc(func(ctx context.Context) (aws.Credentials, error) {
		got, err := inner.Retrieve(ctx)
		if err != nil {
			return got, &loginError{err}
		}
		return got, nil
	})
	k.sm = sm.NewFromConfig(base, func(o *sm.Options) {
		if c.endpoint != "" {
			o.BaseEndpoint = &c.endpoint
		}
		o.EndpointOptions.UseFIPSEndpoint, o.EndpointOptions.UseDualStackEndpoint = fips(c.fips), dualStack(c.dualStack)
	})
	return k, nil
}

func fips(on bool) aws.FIPSEndpointState {
	if on {
		return aws.FIPSEndpointStateEnabled
	}
	return aws.FIPSEndpointStateUnset
}

func dualStack(on bool) aws.DualStackEndpointState {
	if on {
		return aws.DualStackEndpointStateEnabled
	}
	return aws.DualStackEndpointStateUnset
}

func (k *clients) close() {
	if t := k.http.GetTransport(); t != nil {
		t.CloseIdleConnections()
	}
}

// jwt fetches the broker's JWT-SVID for the SDK.
type jwt struct {
	login    attestation.LoginSource
	audience string
}

// GetIdentityToken implements stscreds.IdentityTokenRetriever.
func (j jwt) GetIdentityToken() ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	token, _, err := j.login.JWTSVID(ctx, j.audience)
	return []byte(token), err
}

// The codes of errors that matter here.
const (
	codeNotFound = "ResourceNotFoundException"
	codeInvalid  = "InvalidRequestException" // a state that excludes it: deleted, without rotation, rotating
	codeDecrypt  = "DecryptionFailure"
)

// fault is an error of one call. Its text is for operators, and AWS puts no
// secret into its errors.
type fault struct {
	what string
	code string // AWS's; empty if it did not answer
	away bool   // nobody would be answered now
	err  error
}

func (f *fault) Error() string {
	return f.what + ": " + broker.Clean(broker.Shorten(f.err.Error(), 600))
}

func (f *fault) Unwrap() []error {
	if f.away {
		return []error{f.err, providers.ErrAway}
	}
	return []error{f.err}
}

// faultOf tells what an error of the SDK means.
func faultOf(what string, err error) *fault {
	if err == nil {
		return nil
	}
	f := &fault{what: what, err: err}
	var own *loginError
	var api smithy.APIError
	var op *net.OpError
	var certificate *tls.CertificateVerificationError
	switch {
	case errors.As(err, &own):
		f.away = true
	case errors.As(err, &api):
		switch f.code = api.ErrorCode(); f.code {
		case "ThrottlingException", "TooManyRequestsException", "RequestLimitExceeded",
			"ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException", "IncompleteSignature", "MissingAuthenticationToken", "InvalidClientTokenId":
			f.away = true
		}
	case errors.As(err, &op) && op.Op == "dial", errors.As(err, &certificate), strings.Contains(err.Error(), "TLS handshake timeout"):
		f.away = true
	}
	return f
}
