package awssts

import (
	"cmp"
	"context"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/iam"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// clients are the calls to AWS. None is sent more than once by itself.
type clients struct {
	*awsclient.Client
	sts      *sts.Client
	iam      *iam.Client
	endpoint string // of STS
}

func openClients(ctx context.Context, c awsscope.Config, login attestation.LoginSource) (*clients, error) {
	k, err := awsclient.Open(ctx, awsclient.Config{Access: c.Access, STSEndpoint: c.Endpoint, Once: true}, login)
	if err != nil {
		return nil, err
	}
	return &clients{
		Client: k, endpoint: c.Endpoint,
		sts: sts.NewFromConfig(k.At(c.Endpoint)), iam: iam.NewFromConfig(k.At(cmp.Or(c.IAMEndpoint, c.Endpoint))),
	}, nil
}

// as is STS for a session of the broker's own.
func (k *clients) as(c *types.Credentials) *sts.Client {
	base := k.At(k.endpoint)
	base.Credentials = credentials.NewStaticCredentialsProvider(aws.ToString(c.AccessKeyId), aws.ToString(c.SecretAccessKey), aws.ToString(c.SessionToken))
	return sts.NewFromConfig(base)
}
