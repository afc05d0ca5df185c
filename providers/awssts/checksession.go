package awssts

import (
	"context"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// Whose sessions the check's are: nobody's.
var checkAgent = spiffeid.RequireFromString("spiffe://check.invalid/mayfly")

const checkIncident broker.IncidentID = "i0000000000000000000000000"

// ask is how a session is asked for beside its policy.
type ask struct {
	tags, source bool
	lives        time.Duration
}

// session makes a session of a tool's that is over before it begins, and returns
// how much of what AWS takes its policy and tags take, in percent.
func (c *check) session(ctx context.Context, t scoped, r *checked, a *ask) (packed int, err error) {
	policy, err := t.scope.Largest(time.Unix(0, 0))
	if err != nil {
		return 0, err
	}
	in := &sts.AssumeRoleInput{
		RoleArn: aws.String(noRole), RoleSessionName: &c.name, Policy: &policy,
		DurationSeconds: aws.Int32(int32(ceilSeconds(awsscope.SessionMin))),
	}
	if r != nil {
		in.RoleArn = &r.role.ARN
		in.DurationSeconds = aws.Int32(int32(ceilSeconds(max(a.lives, awsscope.SessionMin))))
		in.PolicyArns = policies(t.scope)
		if a.tags {
			in.Tags = sessionTags(checkAgent, checkIncident, t.tool.Name)
		}
		if a.source {
			in.SourceIdentity = aws.String(awsscope.SourceIdentity(checkAgent))
		}
	}
	out, err := c.clients.sts.AssumeRole(ctx, in)
	if err = awsclient.FaultOf(ctx, "making a session for the check", err); err != nil {
		return 0, err
	}
	//lint:ignore SA1019 what takes its place tells of the token's size, and not of what a tool's statements take
	return int(aws.ToInt32(out.PackedPolicySize)), nil
}

// compatible sees that a server that is not AWS makes sessions of the tools'.
func (c *check) compatible(ctx context.Context) error {
	c.note("", "", "the provider is a server that is not AWS: looked whether it makes sessions, and at nothing else")
	for _, t := range c.tools {
		if _, err := c.session(ctx, t, nil, nil); err != nil {
			if unanswered(err) {
				return err
			}
			c.bad(t.tool.Name, "", "no session can be made %s", said(err))
		}
	}
	return nil
}

// sessions makes a session of the role for each tool. Of a pool one role shows
// what the tool's policy takes; the others are seen with one tool. ok is false
// where none can be made.
func (c *check) sessions(ctx context.Context, r *checked, lives time.Duration) (ok bool, err error) {
	for i, t := range r.tools {
		if i > 0 && t.scope.Roles[0].ARN != r.role.ARN {
			continue
		}
		own := max(min(t.tool.MaxTTL, lives), awsscope.SessionMin)
		packed, err := c.session(ctx, t, r, &ask{tags: true, source: true, lives: own})
		switch awsclient.KindOf(err) {
		case awsclient.None:
			ok = true
			if packed >= 80 {
				c.note(t.tool.Name, "shorten its statements, or bound its parameters", "policy and tags of its sessions take up to %d %% of what AWS takes", packed)
			}
		case awsclient.Denied:
			return false, c.whatIsDenied(ctx, t, r, err)
		case awsclient.TooLarge:
			ok = true
			c.bad(t.tool.Name, "shorten its statements, or bound its parameters", "policy and tags of its sessions are larger than AWS takes %s", said(err))
		case awsclient.Malformed:
			ok = true
			c.bad(t.tool.Name, "correct its statements", "AWS cannot read its session policy %s", said(err))
		default:
			if unanswered(err) {
				return false, err
			}
			c.bad(t.tool.Name, "lower max_ttl or raise the role's MaxSessionDuration, if it says so", "no session of %s can be made %s", own, said(err))
		}
	}
	return ok, nil
}

// whatIsDenied finds which of the three permissions is missing.
func (c *check) whatIsDenied(ctx context.Context, t scoped, r *checked, cause error) error {
	var lacks []string
	for _, try := range []struct {
		action string
		ask    ask
	}{{"sts:AssumeRole", ask{}}, {"sts:TagSession", ask{tags: true}}, {"sts:SetSourceIdentity", ask{source: true}}} {
		_, err := c.session(ctx, t, r, &try.ask)
		if unanswered(err) {
			return err
		}
		if awsclient.KindOf(err) == awsclient.Denied {
			lacks = append(lacks, try.action)
			if try.action == "sts:AssumeRole" {
				break // without it nothing else can be seen
			}
		}
	}
	if len(lacks) == 0 {
		lacks = []string{"sts:TagSession and sts:SetSourceIdentity together"}
	}
	c.bad("", fixTrust, "%s: the broker is not allowed %s %s", r, strings.Join(lacks, ", nor "), said(cause))
	return nil
}

// probes sees whether a session of the role's may ask what a probe asks.
func (c *check) probes(ctx context.Context, r *checked) error {
	b := &probe{name: c.name}
	if err := b.open(ctx, c.clients, r.role.ARN); err != nil {
		if unanswered(err) {
			return err
		}
		c.bad("", fixTrust, "%s: no session can be made for a probe, which has no tags and no source identity, so that no early end is verified %s", r, said(err))
		return nil
	}
	if b.ask(ctx) != allowed {
		c.bad("", fixProbe, "%s: a probe may not ask sts:DecodeAuthorizationMessage: leases that are ended early stay written, and are never verified before their end", r)
	}
	return nil
}
