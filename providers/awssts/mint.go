package awssts

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

const (
	// skew is what AWS's clock, which is read in whole seconds, may add to an
	// instant beyond how far it was seen to be behind ours when the lease was made.
	skew = 2 * time.Second
	// planSkew is the same before AWS's clock was seen.
	planSkew = time.Minute
)

// noRole is asked for at a compatible server: the SDK requires one, and it has no
// meaning there.
const noRole = "arn:aws:iam::000000000000:role/none"

// Plan implements providers.Planner: role and session name are fixed before AWS
// is asked. It refuses what could not be ended early later.
func (p *provider) Plan(req providers.MintRequest) (providers.Handle, error) {
	s, err := p.scope(req.Tool)
	if err != nil {
		return nil, err
	}
	h, err := p.plan(s, req)
	if err != nil {
		return nil, err
	}
	return h.encode()
}

// scope is what the tool may do. The catalog has read it before, and refused what
// cannot be read.
func (p *provider) scope(tool broker.Tool) (awsscope.Scope, error) {
	s, err := awsscope.ParseScope(p.config, tool)
	if err != nil {
		return s, providers.SayRefused("the scope of tool %s cannot be read", tool.Name).Because(err)
	}
	return s, nil
}

func (p *provider) plan(s awsscope.Scope, req providers.MintRequest) (handle, error) {
	h := handle{
		Version: handleVersion, Session: string(req.Lease), Agent: awsscope.SourceIdentity(req.Agent), Incident: req.Incident,
		Issued: req.Now.Add(mintLimit + lateBound + planSkew).UTC(), Dies: end(req).Add(planSkew + skew).UTC(),
	}
	if p.config.Compatible() {
		return h, nil
	}
	role, err := p.choose(s.Roles, req)
	h.Role = role
	return h, err
}

// end is when the session policy ends the session: whole seconds, never later
// than was asked.
func end(req providers.MintRequest) time.Time { return req.End.Truncate(time.Second) }

// Mint implements providers.Provider: one AssumeRole, sent once.
func (p *provider) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	s, err := p.scope(req.Tool)
	if err != nil {
		return providers.Minted{}, providers.Refused(err)
	}
	h, err := p.plan(s, req)
	if err != nil {
		return providers.Minted{}, providers.Refused(err)
	}
	policy, err := s.Policy(req.Params, end(req))
	if err != nil {
		return providers.Minted{}, providers.Refused(err)
	}
	p.acquaint(ctx, h.Role)
	if err := p.reserve(h.Role, req); err != nil {
		return providers.Minted{}, fmt.Errorf("%w: %w", providers.ErrNothingMade, err) // there may be room soon
	}
	in := &sts.AssumeRoleInput{
		RoleSessionName: &h.Session, Policy: &policy,
		DurationSeconds: aws.Int32(int32(p.life(req) / time.Second)),
	}
	if p.config.Compatible() {
		in.RoleArn = aws.String(noRole)
	} else {
		in.RoleArn, in.SourceIdentity = &h.Role, &h.Agent
		in.Tags, in.PolicyArns = sessionTags(req.Agent, req.Incident, req.Tool.Name), policies(s)
	}
	out, err := p.clients.sts.AssumeRole(ctx, in, p.revokable(req.Lease))
	now := p.now()
	if err := awsclient.FaultOf(ctx, "assuming the role for lease "+h.Session, err); err != nil {
		if awsclient.AsFault(err).Refused() {
			p.vacate(h)
			return providers.Minted{}, p.nothingMade(req.Tool.Name, err)
		}
		return providers.Minted{}, fmt.Errorf("the outcome is not known: %w", err)
	}
	return p.take(req, s, h, out, now)
}

// sessionTags are a session's tags as the SDK has them.
func sessionTags(agent spiffeid.ID, incident broker.IncidentID, tool string) (all []types.Tag) {
	for _, t := range awsscope.Tags(agent, incident, tool) {
		all = append(all, types.Tag{Key: aws.String(t.Key), Value: aws.String(t.Value)})
	}
	return all
}

// policies are the managed policies of a scope as the SDK has them.
func policies(s awsscope.Scope) (all []types.PolicyDescriptorType) {
	for _, arn := range s.PolicyARNs {
		all = append(all, types.PolicyDescriptorType{Arn: aws.String(arn)})
	}
	return all
}

// life is for how long AWS is asked to let the session live: whole seconds.
func (p *provider) life(req providers.MintRequest) time.Duration {
	ttl := time.Duration(ceilSeconds(req.End.Sub(req.Now))) * time.Second
	return min(max(ttl, awsscope.SessionMin), p.config.MaxSession)
}

// take makes the lease of AWS's answer.
func (p *provider) take(req providers.MintRequest, s awsscope.Scope, h handle, out *sts.AssumeRoleOutput, now time.Time) (providers.Minted, error) {
	k := out.Credentials
	if k == nil || aws.ToString(k.AccessKeyId) == "" || aws.ToString(k.SecretAccessKey) == "" || aws.ToString(k.SessionToken) == "" || k.Expiration == nil {
		return providers.Minted{}, errors.New("the outcome is not known: the answer of AWS STS has no credentials")
	}
	// The list tells sessions by when AWS's clock says that they were made.
	issued := latest(now, k.Expiration.Add(-p.life(req)))
	lag := behind(out, now)
	minted := providers.Minted{DiesAt: end(req).Add(skew + lag), Survives: s.Survives(p.config)}
	// AWS's own expiry is a second end. It comes first only where the lease's
	// end is as far away as AWS lets a session live.
	ends := *k.Expiration
	if ends.Before(end(req)) {
		minted.Ends = ends
		minted.DiesAt = earliest(minted.DiesAt, ends.Add(skew+lag))
	}
	h.Dies, h.Issued = minted.DiesAt.UTC(), issued.Add(skew).UTC()
	if p.config.Compatible() {
		h.Key = *k.AccessKeyId
	}
	//lint:ignore SA1019 what takes its place tells of the token's size, and not of what a tool's statements take
	packed := out.PackedPolicySize
	if used := aws.ToInt32(packed); used >= 80 {
		p.log.Warn("a tool is close to what AWS takes as permissions of a session", "tool", req.Tool.Name, "packed_percent", used)
	}
	var err error
	if minted.Handle, err = h.encode(); err != nil {
		return providers.Minted{}, err
	}
	p.occupy(h)
	minted.Secret = broker.NewSecret(map[string]string{
		awsscope.FieldAccessKeyID: *k.AccessKeyId, awsscope.FieldSecretAccessKey: *k.SecretAccessKey,
		awsscope.FieldSessionToken: *k.SessionToken, awsscope.FieldExpiration: awsscope.Instant(earliest(ends, end(req))),
	})
	return minted, nil
}

// behind is how far the server's clock, by which the session ends, is behind
// ours at most: that much later than we think it ends.
func behind(out *sts.AssumeRoleOutput, now time.Time) time.Duration {
	server, ok := awsmiddleware.GetServerTime(out.ResultMetadata)
	if !ok {
		return planSkew
	}
	// It is told in whole seconds, of which skew has room for one.
	return max(now.Sub(server)-time.Second, 0)
}

func ceilSeconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func earliest(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
