package awssts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/iam"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
)

const (
	callLimit    = 15 * time.Second // for one call
	maxKeyFile   = 4 << 10
	loginSession = "mayfly-broker"
)

// clients are the calls to AWS. None is sent more than once by itself: who sends
// a write twice does not know which of them lands last.
type clients struct {
	sts  *sts.Client
	iam  *iam.Client
	keys aws.CredentialsProvider // the broker's own
	base aws.Config
	http *awshttp.BuildableClient
	c    awsscope.Config
}

// loginError is that the broker has no credentials to call with.
type loginError struct{ err error }

func (e *loginError) Error() string { return "getting the broker's own credentials: " + e.err.Error() }
func (e *loginError) Unwrap() error { return e.err }

func openClients(ctx context.Context, c awsscope.Config, login attestation.LoginSource) (*clients, error) {
	k := &clients{c: c, http: awshttp.NewBuildableClient().WithTimeout(callLimit)}
	k.base = aws.Config{Region: c.Region, HTTPClient: k.http, Retryer: func() aws.Retryer { return aws.NopRetryer{} }}
	var inner aws.CredentialsProvider
	switch c.Credentials.Method {
	case awsscope.MethodWebIdentity:
		if login == nil {
			return nil, errors.New("there is nothing to log in with")
		}
		anonymous := k.base
		anonymous.Credentials = aws.AnonymousCredentials{}
		client := sts.NewFromConfig(anonymous, k.stsOptions)
		inner = aws.NewCredentialsCache(stscreds.NewWebIdentityRoleProvider(client, c.Credentials.RoleARN, jwt{login, c.Credentials.Audience},
			func(o *stscreds.WebIdentityRoleOptions) { o.RoleSessionName = loginSession }),
			func(o *aws.CredentialsCacheOptions) { o.ExpiryWindow = 5 * time.Minute })
	case awsscope.MethodDefault:
		loaded, err := config.LoadDefaultConfig(ctx, config.WithRegion(c.Region), config.WithHTTPClient(k.http))
		if err != nil {
			return nil, fmt.Errorf("reading the SDK's configuration: %w", err)
		}
		inner = loaded.Credentials
	case awsscope.MethodKeyFile:
		if _, err := readKeys(c.Credentials.KeyFile); err != nil {
			return nil, err
		}
		inner = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return readKeys(c.Credentials.KeyFile) })
	}
	k.keys = aws.CredentialsProviderFunc(func(ctx context.Context) (aws.Credentials, error) {
		got, err := inner.Retrieve(ctx)
		if err != nil {
			return got, &loginError{err}
		}
		return got, nil
	})
	k.base.Credentials = k.keys
	k.sts = sts.NewFromConfig(k.base, k.stsOptions)
	k.iam = iam.NewFromConfig(k.base, k.iamOptions)
	return k, nil
}

func (k *clients) stsOptions(o *sts.Options) {
	if k.c.Endpoint != "" {
		o.BaseEndpoint = &k.c.Endpoint
	}
	if k.c.FIPS {
		o.EndpointOptions.UseFIPSEndpoint = aws.FIPSEndpointStateEnabled
	}
	if k.c.DualStack {
		o.EndpointOptions.UseDualStackEndpoint = aws.DualStackEndpointStateEnabled
	}
}

func (k *clients) iamOptions(o *iam.Options) {
	if endpoint := k.c.IAMEndpoint; endpoint != "" {
		o.BaseEndpoint = &endpoint
	} else if k.c.Endpoint != "" {
		o.BaseEndpoint = &k.c.Endpoint
	}
	if k.c.FIPS {
		o.EndpointOptions.UseFIPSEndpoint = aws.FIPSEndpointStateEnabled
	}
	if k.c.DualStack {
		o.EndpointOptions.UseDualStackEndpoint = aws.DualStackEndpointStateEnabled
	}
}

// as is STS for whoever has these keys.
func (k *clients) as(keys aws.Credentials) *sts.Client {
	base := k.base
	base.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return keys, nil })
	return sts.NewFromConfig(base, k.stsOptions)
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

// readKeys reads static keys. The file is a secret, so nobody else may read it.
func readKeys(path string) (aws.Credentials, error) {
	info, err := os.Stat(path)
	if err != nil {
		return aws.Credentials{}, fmt.Errorf("reading the key file: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 || !info.Mode().IsRegular() || info.Size() > maxKeyFile {
		return aws.Credentials{}, fmt.Errorf("the key file %s must be a small file that nobody but its owner may read (mode 0600)", path)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return aws.Credentials{}, fmt.Errorf("reading the key file: %w", err)
	}
	var keys struct {
		AccessKeyID     string `json:"access_key_id"`
		SecretAccessKey string `json:"secret_access_key"`
	}
	if json.Unmarshal(raw, &keys) != nil || keys.AccessKeyID == "" || keys.SecretAccessKey == "" {
		return aws.Credentials{}, fmt.Errorf("the key file %s must be JSON with access_key_id and secret_access_key", path)
	}
	return aws.Credentials{AccessKeyID: keys.AccessKeyID, SecretAccessKey: keys.SecretAccessKey, Source: "mayfly key_file"}, nil
}
