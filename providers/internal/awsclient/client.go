// Package awsclient is what the drivers for AWS have of its SDK alike: a
// configuration to make a service's client of, with the broker's own
// credentials, and what an error of a call means.
package awsclient

import (
	"context"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

// callLimit is for one call, and one try of it.
const callLimit = 15 * time.Second

// Config says where AWS is asked, as whom, and how.
type Config struct {
	awsaccess.Access
	// STSEndpoint is where web_identity logs in; empty means AWS's.
	STSEndpoint string
	// Once sends no call more than once by itself: who sends a write twice does
	// not know which of them lands last. Otherwise the SDK tries again as it does.
	Once bool
}

// Client is what calls of AWS have in common, whatever the service.
type Client struct {
	Keys aws.CredentialsProvider // the broker's own
	HTTP *awshttp.BuildableClient
	base aws.Config
}

// Open makes a Client. It asks AWS for nothing. login may be nil where the method
// of the credentials needs none.
func Open(ctx context.Context, c Config, login attestation.LoginSource) (*Client, error) {
	k := &Client{HTTP: awshttp.NewBuildableClient().WithTimeout(callLimit)}
	k.base = aws.Config{Region: c.Region, HTTPClient: k.HTTP, ConfigSources: []any{endpoints(c.Access)}}
	if c.Once {
		k.base.Retryer = func() aws.Retryer { return aws.NopRetryer{} }
	}
	var err error
	if k.Keys, err = k.own(ctx, c, login); err != nil {
		return nil, err
	}
	k.base.Credentials = k.Keys
	return k, nil
}

// endpoints chooses among AWS's own, in the SDK's words.
func endpoints(a awsaccess.Access) (o config.LoadOptions) {
	if a.FIPS {
		o.UseFIPSEndpoint = aws.FIPSEndpointStateEnabled
	}
	if a.DualStack {
		o.UseDualStackEndpoint = aws.DualStackEndpointStateEnabled
	}
	return o
}

// At is for the client of a service that is at an endpoint; empty means AWS's.
// It calls with the broker's own credentials.
func (k *Client) At(endpoint string) aws.Config {
	c := k.base.Copy()
	if endpoint != "" {
		c.BaseEndpoint = &endpoint
	}
	return c
}

// Close lets go of the connections.
func (k *Client) Close() {
	if t := k.HTTP.GetTransport(); t != nil {
		t.CloseIdleConnections()
	}
}
