package awssts

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/iam"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// fewLeases is how many leases of one role a check takes for too few: a tenth of
// what its deny list can end.
const fewLeases = 30

// Whose sessions the check's are: nobody's.
var checkAgent = spiffeid.RequireFromString("spiffe://check.invalid/mayfly")

const checkIncident broker.IncidentID = "i0000000000000000000000000"

// sessionTags are a session's tags as the SDK has them.
func sessionTags(agent spiffeid.ID, incident broker.IncidentID, tool string) (all []types.Tag) {
	for _, t := range awsscope.Tags(agent, incident, tool) {
		all = append(all, types.Tag{Key: aws.String(t.Key), Value: aws.String(t.Value)})
	}
	return all
}

func descriptor(arn string) types.PolicyDescriptorType {
	return types.PolicyDescriptorType{Arn: aws.String(arn)}
}

// role looks at one role. An error means that AWS does not answer.
func (c *check) role(ctx context.Context, r *checked) error {
	lives, there, err := c.about(ctx, r)
	if err != nil || !there {
		return err
	}
	if c.config.Early.Mode == awsscope.EarlyDenyList {
		ok, err := c.quota(ctx, r)
		if err != nil {
			return err
		}
		if ok {
			if err := c.writes(ctx, r); err != nil {
				return err
			}
		}
	}
	ok, err := c.sessions(ctx, r, lives)
	if err != nil || !ok || c.config.Early.Verify != awsscope.VerifyProbe {
		return err
	}
	return c.probes(ctx, r)
}

// about compares the role itself. lives is the longest session to ask for.
func (c *check) about(ctx context.Context, r *checked) (lives time.Duration, there bool, err error) {
	lives = r.longest()
	out, err := c.clients.iam.GetRole(ctx, &iam.GetRoleInput{RoleName: &r.role.Name})
	err = awsclient.FaultOf(ctx, "reading role "+r.role.Name, err)
	switch {
	case awsclient.KindOf(err) == awsclient.Missing:
		c.bad("", fixSetup, "%s is not there", r)
		return 0, false, nil
	case awsclient.KindOf(err) == awsclient.Denied:
		c.note("", fmt.Sprintf(fixRead, r.role.Name), "%s: its path, boundary, longest session and trust policy were not compared: the broker may not read them", r)
		return lives, true, nil
	case err != nil:
		return 0, false, err
	}
	role := out.Role
	if arn := aws.ToString(role.Arn); arn != r.role.ARN {
		c.bad("", "name the role in the catalog as IAM does, or make it anew below role_path", "%s: the catalog names %s, and what IAM has by that name is %s", r, r.role.ARN, arn)
		return 0, false, nil
	}
	const bound = "attach the boundary (deploy/aws has one): what tools are for, no IAM, no sts:AssumeRole"
	switch b := role.PermissionsBoundary; {
	case b != nil && aws.ToString(b.PermissionsBoundaryArn) != "":
		c.note("", "", "%s: its boundary is %s; what that allows is what a broker that was taken over could bring about, and was not looked at", r, aws.ToString(b.PermissionsBoundaryArn))
	case c.config.Early.Mode == awsscope.EarlyDenyList:
		c.bad("", bound, "%s has no permissions boundary: the broker writes its policies, and nothing bounds what they can allow", r)
	default:
		c.note("", bound, "%s has no permissions boundary", r)
	}
	if longest := time.Duration(aws.ToInt32(role.MaxSessionDuration)) * time.Second; longest > 0 && longest < lives {
		c.bad("", fmt.Sprintf("aws iam update-role --role-name %s --max-session-duration %d, or lower max_ttl", r.role.Name, int(lives.Seconds())),
			"%s: its sessions live at most %s (MaxSessionDuration), and a tool's max_ttl is %s", r, longest, lives)
		lives = longest
	}
	c.trust(r, aws.ToString(role.AssumeRolePolicyDocument))
	return lives, true, nil
}

// trust tells who else can make sessions of the role: they are no leases, have
// all that the role allows, and nobody ends them.
func (c *check) trust(r *checked, raw string) {
	text, err := url.PathUnescape(raw)
	if err != nil {
		text = raw
	}
	var doc struct{ Statement json.RawMessage }
	type statement struct {
		Effect    string
		Principal json.RawMessage
		Condition json.RawMessage
	}
	var all []statement
	var one statement
	if json.Unmarshal([]byte(text), &doc) == nil {
		if json.Unmarshal(doc.Statement, &all) != nil && json.Unmarshal(doc.Statement, &one) == nil {
			all = []statement{one}
		}
	}
	if len(all) == 0 {
		c.note("", "", "%s: its trust policy cannot be read here, so that nothing is said of who else it trusts", r)
		return
	}
	const fix = "trust the broker's role alone"
	for _, s := range all {
		if s.Effect != "Allow" {
			continue
		}
		for _, p := range principals(s.Principal) {
			switch {
			case p == "*" && len(s.Condition) == 0:
				c.bad("", fix, "%s trusts everybody (*) in every account", r)
			case p == "*":
				c.note("", fix, "%s trusts everybody (*) under conditions: whoever meets them makes sessions that are no leases", r)
			case c.isCaller(p):
			case strings.HasSuffix(p, ":root") || len(p) == 12:
				c.note("", fix, "%s trusts the whole account (%s): whoever in it is allowed sts:AssumeRole makes sessions that are no leases", r, p)
			default:
				c.note("", fix, "%s also trusts %s: sessions that it makes are no leases", r, broker.Clean(broker.Shorten(p, 200)))
			}
		}
	}
}

// principals are all principals of a statement; what is no text is told as it is.
func principals(raw json.RawMessage) (all []string) {
	var one string
	if json.Unmarshal(raw, &one) == nil {
		return []string{one}
	}
	var kinds map[string]json.RawMessage
	if json.Unmarshal(raw, &kinds) != nil {
		return []string{string(raw)}
	}
	for _, values := range kinds {
		var many []string
		if json.Unmarshal(values, &one) == nil {
			many = []string{one}
		} else if json.Unmarshal(values, &many) != nil {
			many = []string{string(values)}
		}
		all = append(all, many...)
	}
	slices.Sort(all)
	return all
}

// isCaller reports whether a principal is who the check looks as: the ARN of a
// session has its role's name, and not the path.
func (c *check) isCaller(principal string) bool {
	if principal == c.caller || principal == c.config.Credentials.RoleARN {
		return true
	}
	role, err := awsaccess.ParseRole(principal)
	parts := strings.Split(c.caller, ":")
	return err == nil && len(parts) == 6 && parts[4] == role.Account && strings.HasPrefix(parts[5], "assumed-role/"+role.Name+"/")
}

// quota looks at the role's inline policies. ok is false where they cannot be read.
func (c *check) quota(ctx context.Context, r *checked) (ok bool, err error) {
	lists, others := 0, 0
	var names []string
	pages := iam.NewListRolePoliciesPaginator(c.clients.iam, &iam.ListRolePoliciesInput{RoleName: &r.role.Name})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		err = awsclient.FaultOf(ctx, "listing the policies of role "+r.role.Name, err)
		switch {
		case awsclient.KindOf(err) == awsclient.Missing:
			c.bad("", fixSetup, "%s is not there", r)
			return false, nil
		case awsclient.KindOf(err) == awsclient.Denied:
			c.bad("", fixList, "%s: the broker may not list its policies %s", r, said(err))
			return false, nil
		case err != nil:
			return false, err
		}
		names = append(names, page.PolicyNames...)
	}
	var foreign []string
	for _, name := range append(names, c.name) { // the last is not there, and shows whether one may be read
		out, err := c.clients.iam.GetRolePolicy(ctx, &iam.GetRolePolicyInput{RoleName: &r.role.Name, PolicyName: &name})
		err = awsclient.FaultOf(ctx, "reading the policies of role "+r.role.Name, err)
		switch {
		case awsclient.KindOf(err) == awsclient.Missing:
			continue
		case awsclient.KindOf(err) == awsclient.Denied:
			c.bad("", fixList, "%s: the broker may not read its policies %s", r, said(err))
			return false, nil
		case err != nil:
			return false, err
		}
		text, err := url.PathUnescape(aws.ToString(out.PolicyDocument))
		if err != nil {
			text = aws.ToString(out.PolicyDocument)
		}
		n := len(strings.Join(strings.Fields(text), ""))
		if !strings.HasPrefix(name, denyPrefix) {
			others += n
			foreign = append(foreign, name)
			continue
		}
		lists += n
		if _, err := denylist.Parse(text); err != nil {
			c.note("", "the broker writes its own again; remove it if no broker of yours has written it", "%s: its policy %s has the name of a deny list, and is none that Mayfly writes", r, broker.Clean(name))
		}
	}
	if others > 0 {
		room := max((denylist.Quota-kept-others)/sessionCost, 0)
		tell, fix := c.note, "make managed policies of them"
		if room < fewLeases {
			tell = c.bad
		}
		tell("", fix, "%s: its inline policies (%s) take %d of the %d characters that the deny list has: at most %d leases of it can be open, where there could be %d",
			r, broker.Clean(broker.Shorten(strings.Join(foreign, ", "), 200)), others, denylist.Quota, room, (denylist.Quota-kept)/sessionCost)
	}
	if lists > 0 {
		c.note("", "", "%s: deny lists take %d of %d characters now", r, lists, denylist.Quota)
	}
	return true, nil
}

// writes sees whether the broker may write and delete policies of the role. IAM is
// asked to take a text that is no policy, and to delete one that is not there. AWS
// does not promise to look at who asks before it looks at what is asked: so a
// refusal is told as one, and that there was none is told to nobody as a proof.
func (c *check) writes(ctx context.Context, r *checked) error {
	_, err := c.clients.iam.DeleteRolePolicy(ctx, &iam.DeleteRolePolicyInput{RoleName: &r.role.Name, PolicyName: &c.name})
	err = awsclient.FaultOf(ctx, "deleting a policy of role "+r.role.Name, err)
	if unanswered(err) {
		return err
	}
	if awsclient.KindOf(err) == awsclient.Denied {
		c.bad("", fixWrite, "%s: the broker may not delete its policies, so that its deny list is never cleared %s", r, said(err))
	}
	_, err = c.clients.iam.PutRolePolicy(ctx, &iam.PutRolePolicyInput{RoleName: &r.role.Name, PolicyName: &c.name, PolicyDocument: aws.String("{}")})
	err = awsclient.FaultOf(ctx, "writing a policy of role "+r.role.Name, err)
	switch awsclient.KindOf(err) {
	case awsclient.None: // not seen of AWS; what it would have taken says nothing, and goes
		_, err = c.clients.iam.DeleteRolePolicy(ctx, &iam.DeleteRolePolicyInput{RoleName: &r.role.Name, PolicyName: &c.name})
		return awsclient.FaultOf(ctx, "deleting the check's policy of role "+r.role.Name, err)
	case awsclient.Denied:
		c.bad("", fixWrite, "%s: the broker may not write its policies, so that no lease of it can be ended early %s", r, said(err))
	case awsclient.Malformed:
	default:
		if unanswered(err) {
			return err
		}
		c.note("", "", "%s: whether the broker may write its policies is not known %s", r, said(err))
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
	out, err := c.clients.sts.AssumeRole(ctx, &sts.AssumeRoleInput{
		RoleArn: &r.role.ARN, RoleSessionName: &c.name, Policy: aws.String(probePolicy), DurationSeconds: aws.Int32(int32(ceilSeconds(awsscope.SessionMin))),
	})
	if err = awsclient.FaultOf(ctx, "making a probe's session", err); err != nil {
		if unanswered(err) {
			return err
		}
		c.bad("", fixTrust, "%s: no session can be made for a probe, which has no tags and no source identity, so that no early end is verified %s", r, said(err))
		return nil
	}
	b := &probe{client: c.clients.as(out.Credentials)}
	if b.ask(ctx) != allowed {
		c.bad("", fixProbe, "%s: a probe may not ask sts:DecodeAuthorizationMessage: leases that are ended early stay written, and are never verified before their end", r)
	}
	return nil
}
