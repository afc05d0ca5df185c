package awssts

import (
	"context"
	"net/url"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/iam"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// fewLeases is how many leases of one role a check takes for too few: a tenth of
// what its deny list can end.
const fewLeases = 30

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
