package awssts

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

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
	ch := &check{config: c, name: "mayfly-check-" + random(6), roles: map[string]*checked{}}
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
