package awssts

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

var _ providers.LiveChecker = (*Driver)(nil)

// What the findings of a check advise.
const (
	fixSetup = "set the account up as deploy/aws does (docs/aws.md, Setting it up)"
	fixTrust = "allow the broker sts:AssumeRole, sts:TagSession and sts:SetSourceIdentity in the role's trust policy, and on the role in the broker's own"
	fixList  = "allow the broker iam:ListRolePolicies and iam:GetRolePolicy on the roles below role_path"
	fixWrite = "allow the broker iam:PutRolePolicy and iam:DeleteRolePolicy on the roles below role_path that have the boundary (iam:PermissionsBoundary)"
	fixRead  = "allow the broker iam:GetRole on the roles below role_path; or look yourself: aws iam get-role --role-name %s"
	fixProbe = "allow the role, and its boundary, sts:DecodeAuthorizationMessage; or set early_revoke.verify to none"
)

// CheckLive implements providers.LiveChecker. It asks AWS with the broker's own
// credentials whether what leases need is there. Nothing in IAM changes by it.
// It makes sessions, as the only way to know that they can be made: they have the
// tools' policies with an end that is past, so that they can do nothing; and one
// a role that can do what a probe can. It asks IAM to write what IAM cannot
// take, and to delete what is not there, and looks only at who is refused.
func (d *Driver) CheckLive(ctx context.Context, config providers.Config, tools []broker.Tool) ([]providers.Finding, error) {
	c, err := awsscope.ParseConfig(config.Raw)
	if err != nil {
		return nil, err
	}
	var id [6]byte
	_, _ = rand.Read(id[:]) // never fails
	ch := &check{config: c, name: "mayfly-check-" + hex.EncodeToString(id[:]), roles: map[string]*checked{}}
	for _, t := range tools {
		s, err := awsscope.ParseScope(c, t)
		if err != nil {
			return nil, fmt.Errorf("reading the scope of tool %s: %w", t.Name, err)
		}
		ch.tools = append(ch.tools, scoped{t, s})
	}
	slices.SortFunc(ch.tools, func(a, b scoped) int { return strings.Compare(a.tool.Name, b.tool.Name) })
	if ch.clients, err = openClients(ctx, c, d.login); err != nil {
		return nil, fmt.Errorf("opening AWS: %w", err)
	}
	defer ch.clients.Close()
	if c.Compatible() {
		return ch.findings, ch.compatible(ctx)
	}
	if ok, err := ch.login(ctx); !ok || err != nil {
		return ch.findings, err
	}
	for _, t := range ch.tools {
		for _, r := range t.scope.Roles {
			if ch.roles[r.ARN] == nil {
				ch.roles[r.ARN] = &checked{role: r}
			}
			ch.roles[r.ARN].tools = append(ch.roles[r.ARN].tools, t)
		}
	}
	for _, r := range slices.SortedFunc(maps.Values(ch.roles), func(a, b *checked) int { return strings.Compare(a.role.ARN, b.role.ARN) }) {
		if err := ch.role(ctx, r); err != nil {
			return nil, err
		}
	}
	return ch.findings, nil
}

// check is one live check under way.
type check struct {
	config   awsscope.Config
	name     string // of the check's own sessions, and of a policy that is never there
	tools    []scoped
	roles    map[string]*checked // by ARN
	clients  *clients
	caller   string // ARN
	findings []providers.Finding
}

// scoped is a tool with its scope.
type scoped struct {
	tool  broker.Tool
	scope awsscope.Scope
}

// checked is one role with the tools whose leases are its sessions.
type checked struct {
	role  awsaccess.Role
	tools []scoped
}

// String names the role and its tools.
func (r *checked) String() string {
	names := make([]string, len(r.tools))
	for i, t := range r.tools {
		names[i] = t.tool.Name
	}
	of := "tool"
	if len(names) > 1 {
		of = "tools"
	}
	return fmt.Sprintf("role %s (of %s %s)", r.role.Name, of, strings.Join(names, ", "))
}

// longest is the longest session that a tool of the role's needs.
func (r *checked) longest() (d time.Duration) {
	for _, t := range r.tools {
		d = max(d, t.tool.MaxTTL)
	}
	return d
}

func (c *check) bad(tool, fix, format string, args ...any) {
	c.findings = append(c.findings, providers.Finding{Tool: tool, Bad: true, Message: fmt.Sprintf(format, args...), Fix: fix})
}

func (c *check) note(tool, fix, format string, args ...any) {
	c.findings = append(c.findings, providers.Finding{Tool: tool, Message: fmt.Sprintf(format, args...), Fix: fix})
}

// unanswered reports that AWS has said neither yes nor no, so that there is
// nothing to find.
func unanswered(err error) bool {
	switch awsclient.KindOf(err) {
	case awsclient.Away, awsclient.Throttled, awsclient.Failed, awsclient.Late, awsclient.Cut:
		return true
	}
	return false
}

// said is what AWS itself says, in brackets.
func said(err error) string {
	if f := awsclient.AsFault(err); f != nil {
		return "(" + f.Error() + ")"
	}
	return "(" + err.Error() + ")"
}

// login tells as whom the check looks. ok is false where the broker cannot log
// in, with a finding.
func (c *check) login(ctx context.Context) (ok bool, err error) {
	out, err := c.clients.sts.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err = awsclient.FaultOf(ctx, "asking AWS who the broker is", err); err != nil {
		if unanswered(err) || awsclient.KindOf(err) == awsclient.Region {
			return false, err
		}
		return false, c.noLogin(err)
	}
	c.caller = aws.ToString(out.Arn)
	chained := strings.Contains(c.caller, ":assumed-role/")
	if c.config.Credentials.Method == awsaccess.MethodDefault {
		c.note("", "", "looked as %s: with method default these are the credentials of who runs the check, which need not be the broker's", c.caller)
	} else {
		c.note("", "", "looked as %s", c.caller)
	}
	if account := aws.ToString(out.Account); account != c.config.Account {
		if c.config.Early.Mode == awsscope.EarlyDenyList {
			c.bad("", "give the broker a role in account "+c.config.Account, "the broker is of account %s, and the tools' roles are in account %s: IAM writes policies of its caller's own account alone, so that no deny list can be written", account, c.config.Account)
			return false, nil
		}
		c.note("", "", "the broker is of account %s, and the tools' roles are in account %s", account, c.config.Account)
	}
	switch {
	case strings.HasSuffix(c.caller, ":root"):
		c.bad("", fixSetup, "the broker's credentials are those of the account's root user")
	case chained && !c.config.Chained:
		c.bad("", "leave chained out, and set max_session and max_ttl to 1h at most", "credentials.chained is false, and the broker's credentials are a role's: AWS gives them sessions of at most 1h")
	case !chained:
		c.note("", "prefer web_identity, or a role", "the broker's credentials are static keys, of a user: whoever has them is the broker until they are changed")
	}
	return true, nil
}

// noLogin tells why the broker cannot log in.
func (c *check) noLogin(err error) error {
	f := awsclient.AsFault(err)
	text := f.Error()
	fix := "see that the credentials of method " + c.config.Credentials.Method + " are there and are valid"
	if c.config.Credentials.Method == awsaccess.MethodWebIdentity {
		fix = "compare the broker's role with deploy/aws"
		switch {
		case strings.Contains(text, "InvalidIdentityToken"):
			fix = fmt.Sprintf("see that IAM has an OIDC provider for the issuer of the broker's JWT-SVIDs, with the audience %s, and that the issuer's discovery document has the keys that sign them", c.config.Credentials.Audience)
		case strings.Contains(text, "IDPCommunicationError"):
			fix = "AWS must reach the issuer's discovery document, over the internet and with a certificate that it trusts"
		case strings.Contains(text, "AccessDenied"):
			fix = fmt.Sprintf("the trust policy of %s must allow sts:AssumeRoleWithWebIdentity to the broker's SPIFFE ID (sub) and the audience %s (aud)", c.config.Credentials.RoleARN, c.config.Credentials.Audience)
		case !strings.Contains(text, "api error"):
			return err // nobody at AWS was asked, or answered
		}
	}
	c.bad("", fix, "the broker cannot log in %s", said(err))
	return nil
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
		RoleArn: aws.String("arn:aws:iam::000000000000:role/none"), RoleSessionName: &c.name, Policy: &policy,
		DurationSeconds: aws.Int32(int32(ceilSeconds(awsscope.SessionMin))),
	}
	if r != nil {
		in.RoleArn = &r.role.ARN
		in.DurationSeconds = aws.Int32(int32(ceilSeconds(max(a.lives, awsscope.SessionMin))))
		for _, arn := range t.scope.PolicyARNs {
			in.PolicyArns = append(in.PolicyArns, descriptor(arn))
		}
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
