package awssts

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// minioPause is the pause between two looks at a session that MinIO has not
// ended though it said so.
const minioPause = 2 * time.Second

// noSuchAccount is in what MinIO says of an access key that it does not have.
const noSuchAccount = "temporary account does not exist"

// revokable has MinIO remember the session by its lease, so that it can be
// revoked alone. AWS knows no such field, and is not sent it.
func (p *provider) revokable(lease broker.LeaseID) func(*sts.Options) {
	if p.config.Early.Mode != awsscope.EarlyMinIO {
		return func(*sts.Options) {}
	}
	return func(o *sts.Options) {
		o.APIOptions = append(o.APIOptions, func(stack *middleware.Stack) error {
			return stack.Serialize.Add(middleware.SerializeMiddlewareFunc("mayfly.TokenRevokeType",
				func(ctx context.Context, in middleware.SerializeInput, next middleware.SerializeHandler) (middleware.SerializeOutput, middleware.Metadata, error) {
					r, ok := in.Request.(*smithyhttp.Request)
					if !ok {
						return middleware.SerializeOutput{}, middleware.Metadata{}, fmt.Errorf("adding the lease to a request of type %T", in.Request)
					}
					body, err := io.ReadAll(r.GetStream())
					if err != nil {
						return middleware.SerializeOutput{}, middleware.Metadata{}, fmt.Errorf("adding the lease to the request: %w", err)
					}
					body = append(body, "&TokenRevokeType="+url.QueryEscape(string(lease))...)
					if in.Request, err = r.SetStream(bytes.NewReader(body)); err != nil {
						return middleware.SerializeOutput{}, middleware.Metadata{}, fmt.Errorf("adding the lease to the request: %w", err)
					}
					return next.HandleSerialize(ctx, in)
				}), middleware.After)
		})
	}
}

// endAtMinIO ends sessions at MinIO. Its answers are not believed: it says yes
// to what it does not know, and after a restart to what it has not loaded. So a
// session is looked at before, which loads it, and again afterwards, and is dead
// if MinIO says that there is none such.
func (p *provider) endAtMinIO(ctx context.Context, leases []at, deaths []providers.Death, revoke bool) {
	for _, l := range leases {
		deaths[l.i] = p.oneAtMinIO(ctx, l, revoke)
	}
}

func (p *provider) oneAtMinIO(ctx context.Context, l at, revoke bool) providers.Death {
	now := p.now()
	if l.h.Key == "" {
		// The answer to AssumeRole was lost, and its keys with it. What may have
		// been made is revoked by its lease; that it is gone nobody can tell.
		if !revoke {
			return providers.Death{RetryAt: l.h.Dies}
		}
		if err := p.minioRevoke(ctx, l.h.Session); err != nil {
			return providers.Death{Err: err}
		}
		return providers.Death{Progress: broker.ProgressRequested, RetryAt: l.h.Dies}
	}
	there, err := p.minioHas(ctx, l.h.Key)
	switch {
	case err != nil:
		return providers.Death{Err: err}
	case !there:
		return providers.Death{Progress: broker.ProgressVerified}
	case !revoke:
		return providers.Death{RetryAt: l.h.Dies}
	}
	if err := p.minioRevoke(ctx, l.h.Session); err != nil {
		return providers.Death{Err: err}
	}
	if there, err = p.minioHas(ctx, l.h.Key); err != nil {
		return providers.Death{Err: err}
	}
	if there {
		return providers.Death{Err: fmt.Errorf("MinIO said that it revoked the session of lease %s, and it is still there", l.h.Session), RetryAt: now.Add(minioPause)}
	}
	return providers.Death{Progress: broker.ProgressVerified}
}

func (p *provider) minioRevoke(ctx context.Context, lease string) error {
	// Without a user MinIO revokes what was made with the very keys that ask.
	status, code, _, err := p.minio(ctx, http.MethodPost, "/minio/admin/v3/revoke-tokens/builtin", url.Values{"tokenRevokeType": {lease}})
	if err == nil && status != http.StatusNoContent && status != http.StatusOK {
		err = &awsclient.Fault{Kind: minioKind(status), What: "revoking at MinIO", Code: code, Err: fmt.Errorf("MinIO answered %d %s", status, code)}
	}
	return err
}

// minioHas asks whether MinIO has a temporary account with that access key. It
// makes MinIO load it.
func (p *provider) minioHas(ctx context.Context, key string) (bool, error) {
	status, code, message, err := p.minio(ctx, http.MethodGet, "/minio/admin/v3/temporary-account-info", url.Values{"accessKey": {key}})
	switch {
	case err != nil:
		return false, err
	case status == http.StatusOK:
		return true, nil
	case status >= 400 && strings.Contains(message, noSuchAccount):
		return false, nil // it has no code of its own, and comes as an internal error
	}
	return false, &awsclient.Fault{Kind: minioKind(status), What: "looking for the session at MinIO", Code: code, Err: fmt.Errorf("MinIO answered %d %s", status, code)}
}

func minioKind(status int) awsclient.Kind {
	switch {
	case status == http.StatusForbidden:
		return awsclient.Denied
	case status == http.StatusServiceUnavailable, status == http.StatusTooManyRequests:
		return awsclient.Throttled
	case status >= 500:
		return awsclient.Failed
	}
	return awsclient.Bad
}

// minio makes one call to MinIO's admin API with the broker's keys.
func (p *provider) minio(ctx context.Context, method, path string, query url.Values) (status int, code, message string, err error) {
	what := "calling MinIO's " + path[strings.LastIndexByte(path, '/')+1:]
	keys, err := p.clients.Keys.Retrieve(ctx)
	if err != nil {
		return 0, "", "", awsclient.FaultOf(ctx, what, err)
	}
	r, err := http.NewRequestWithContext(ctx, method, p.config.Endpoint+path+"?"+query.Encode(), nil)
	if err != nil {
		return 0, "", "", fmt.Errorf("%s: %w", what, err)
	}
	sum := sha256.Sum256(nil)
	r.Header.Set("X-Amz-Content-Sha256", hex.EncodeToString(sum[:]))
	if err := v4.NewSigner().SignHTTP(ctx, keys, r, hex.EncodeToString(sum[:]), "s3", p.config.Region, time.Now()); err != nil {
		return 0, "", "", fmt.Errorf("%s: signing: %w", what, err)
	}
	answer, err := p.clients.HTTP.Do(r)
	if err != nil {
		return 0, "", "", awsclient.FaultOf(ctx, what, err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
	if err != nil {
		return 0, "", "", awsclient.FaultOf(ctx, what, err)
	}
	var said struct{ Code, Message string }
	_ = json.Unmarshal(body, &said) // a success has another body
	return answer.StatusCode, broker.Clean(broker.Shorten(said.Code, 80)), said.Message, nil
}
