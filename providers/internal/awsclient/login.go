package awsclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

const (
	maxKeyFile   = 4 << 10
	loginSession = "mayfly-broker"
	renewBefore  = 5 * time.Minute // of the end of what web_identity gave
)

// loginError is that the broker has no credentials to call with.
type loginError struct{ err error }

func (e *loginError) Error() string { return "getting the broker's own credentials: " + e.err.Error() }
func (e *loginError) Unwrap() error { return e.err }

// own are the broker's own credentials. Where it gets none, that is told apart
// from what comes of the call.
func (k *Client) own(ctx context.Context, c Config, login attestation.LoginSource) (aws.CredentialsProvider, error) {
	inner, err := k.method(ctx, c, login)
	if err != nil {
		return nil, err
	}
	return aws.CredentialsProviderFunc(func(ctx context.Context) (aws.Credentials, error) {
		got, err := inner.Retrieve(ctx)
		if err != nil {
			return got, &loginError{err}
		}
		return got, nil
	}), nil
}

func (k *Client) method(ctx context.Context, c Config, login attestation.LoginSource) (aws.CredentialsProvider, error) {
	own := c.Credentials
	switch own.Method {
	case awsaccess.MethodWebIdentity:
		if login == nil {
			return nil, errors.New("there is nothing to log in with")
		}
		anonymous := k.At(c.STSEndpoint)
		anonymous.Credentials = aws.AnonymousCredentials{}
		role := stscreds.NewWebIdentityRoleProvider(sts.NewFromConfig(anonymous), own.RoleARN, jwt{login, own.Audience},
			func(o *stscreds.WebIdentityRoleOptions) { o.RoleSessionName = loginSession })
		return aws.NewCredentialsCache(role, func(o *aws.CredentialsCacheOptions) { o.ExpiryWindow = renewBefore }), nil
	case awsaccess.MethodDefault:
		loaded, err := config.LoadDefaultConfig(ctx, config.WithRegion(c.Region), config.WithHTTPClient(k.HTTP))
		if err != nil {
			return nil, fmt.Errorf("reading the SDK's configuration: %w", err)
		}
		return loaded.Credentials, nil
	case awsaccess.MethodKeyFile:
		if _, err := readKeys(own.KeyFile); err != nil {
			return nil, err
		}
		return aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return readKeys(own.KeyFile) }), nil
	}
	return nil, fmt.Errorf("there is no method %q of getting credentials", own.Method)
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
