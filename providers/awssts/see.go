package awssts

import (
	"context"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/iam"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// visible is how long IAM may show what was there before our own write.
const visible = time.Minute

// see reads what is in IAM.
func (p *provider) see(ctx context.Context, w *writer, leases map[broker.LeaseID]denylist.Known, cut denylist.Entry) error {
	what := "reading the policies of role " + w.role.Name
	names := map[string]bool{}
	var marker *string
	for {
		out, err := p.clients.iam.ListRolePolicies(ctx, &iam.ListRolePoliciesInput{RoleName: &w.role.Name, Marker: marker})
		if err != nil {
			return awsclient.FaultOf(ctx, what, err)
		}
		for _, name := range out.PolicyNames {
			names[name] = true
		}
		if !out.IsTruncated || out.Marker == nil {
			break
		}
		marker = out.Marker
	}
	for name := range w.list.Policies {
		if _, listed := names[name]; !listed {
			names[name] = false
		}
	}
	now, others := p.now(), 0
	maps.DeleteFunc(w.wrote, func(_ string, at time.Time) bool { return now.Sub(at) >= visible })
	for _, name := range slices.Sorted(maps.Keys(names)) {
		text, there := "", names[name]
		if there {
			out, err := p.clients.iam.GetRolePolicy(ctx, &iam.GetRolePolicyInput{RoleName: &w.role.Name, PolicyName: &name})
			err = awsclient.FaultOf(ctx, what, err)
			switch {
			case awsclient.KindOf(err) == awsclient.Missing:
				there = false
			case err != nil:
				return err
			default:
				if text, err = url.PathUnescape(aws.ToString(out.PolicyDocument)); err != nil {
					text = aws.ToString(out.PolicyDocument)
				}
			}
		}
		if !strings.HasPrefix(name, w.prefix) {
			if there {
				others += len(strings.Join(strings.Fields(text), ""))
			}
			continue
		}
		// What we wrote a moment ago may not be seen yet.
		pol := w.list.Policies[name]
		if _, ok := w.wrote[name]; ok {
			set, err := denylist.Parse(text)
			if pol == nil && there || pol != nil && (!there || err != nil || !set.Equal(pol.Stands)) {
				continue
			}
		}
		was := denylist.Set{}
		if pol != nil {
			was = pol.Stands
		}
		if err := w.list.Saw(name, text, there, now, now.Add(landing)); err != nil {
			p.log.Error("a policy of the deny list was changed by somebody else: what must stand is written again", "role", w.role.ARN, "policy", name, "error", err)
		}
		if now := w.list.Policies[name]; now != nil && now.Own && pol != nil && !now.Stands.Equal(was) {
			w.probe = nil // what it was written with may stand no more
			p.log.Error("the deny list in IAM is not what was written: it is written again", "role", w.role.ARN, "policy", name,
				"missing", len(was.Minus(now.Stands)), "more", len(now.Stands.Minus(was)))
		}
	}
	w.list.Others, w.seen = others, true
	w.doubt()
	p.keep(w, leases, cut)
	return nil
}
