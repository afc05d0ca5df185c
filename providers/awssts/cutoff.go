package awssts

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/iam"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

const (
	// askLimit bounds the wait for AWS's time: a cut-off is for an emergency.
	askLimit = 5 * time.Second
	// cutMargin is how much later than AWS's time, as it was just told in whole
	// seconds, a cut-off reaches: the clocks of IAM and STS may differ.
	cutMargin = 3 * time.Second
)

// Roles implements providers.CutOff.
func (p *provider) Roles(tool broker.Tool) (arns []string) {
	s, err := awsscope.ParseScope(p.config, tool)
	if err != nil {
		return nil
	}
	for _, r := range s.Roles {
		arns = append(arns, r.ARN)
	}
	return arns
}

// RoleOf implements providers.CutOff.
func (p *provider) RoleOf(e providers.Ending) string {
	h, err := decodeHandle(e.Handle)
	if err != nil {
		return ""
	}
	return h.Role
}

// cuttable is the role of that ARN, if this provider writes its deny list.
func (p *provider) cuttable(arn string) (awsaccess.Role, error) {
	if p.config.Early.Mode != awsscope.EarlyDenyList {
		return awsaccess.Role{}, broker.Refusef(broker.ReasonConflict, "set early_revoke of the provider to deny_list, or deny the role's older sessions at AWS by hand",
			"provider %s writes no deny lists (early_revoke: %s), and can cut no role off", p.name, p.config.Early.Mode)
	}
	r, err := awsaccess.ParseRole(arn)
	if err != nil || r.Account != p.config.Account || !strings.HasPrefix(r.Path, p.config.RolePath) {
		return awsaccess.Role{}, broker.Refusef(broker.ReasonInvalidArgument, "name a role of the provider's tools by its ARN, as the catalog does",
			"%q is no role whose deny list provider %s writes", broker.Clean(broker.Shorten(arn, 200)), p.name)
	}
	return r, nil
}

// PlanCutOff implements providers.CutOff. What is cut off is measured by AWS's
// own time, if AWS tells it: ours may be wrong in either direction.
func (p *provider) PlanCutOff(ctx context.Context, role string) (providers.Cut, error) {
	r, err := p.cuttable(role)
	if err != nil {
		return providers.Cut{}, err
	}
	cut := providers.Cut{Role: role,
		Others: "every session of " + role + " that was made up to then, whoever made it: other brokers, people, services of AWS"}
	server, err := p.ask(ctx, r)
	now := p.now()
	switch {
	case awsclient.KindOf(err) == awsclient.Missing:
		return providers.Cut{}, broker.Refusef(broker.ReasonNotFound, "compare the name with the role in AWS; a role that was deleted has no sessions that work",
			"AWS has no role %s (provider %s)", r.Name, p.name).Because(err)
	case err != nil:
		p.log.Warn("AWS does not tell its time: a cut-off is measured by ours, and reaches a minute further", "role", role, "error", err)
		cut.Before, cut.Ours = now.Add(planSkew), true
		cut.Clear = cut.Before.Add(planSkew + skew)
	default:
		cut.Before = server.Add(cutMargin)
		// TokenIssueTime has whole seconds: the next one is the first that is not denied.
		cut.Clear = now.Add(cutMargin + time.Second + skew)
	}
	cut.Before = time.Unix(denylist.CutOffAt(cut.Before).Before, 0).UTC()
	cut.Clear = cut.Clear.UTC()
	cut.Until = cut.Clear.Add(keepForeign)
	return cut, nil
}

// ask is AWS's time, by IAM, which is also asked whether there is such a role.
func (p *provider) ask(ctx context.Context, r awsaccess.Role) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	out, err := p.clients.iam.ListRolePolicies(ctx, &iam.ListRolePoliciesInput{RoleName: &r.Name, MaxItems: aws.Int32(1)})
	if err := awsclient.FaultOf(ctx, "asking IAM for its time", err); err != nil {
		return time.Time{}, err
	}
	server, ok := awsmiddleware.GetServerTime(out.ResultMetadata)
	if !ok {
		return time.Time{}, errors.New("the answer of IAM has no time")
	}
	return server, nil
}

// cutAt takes a cut-off into account, whatever the store says. The latest of a
// role denies what the earlier do.
func (p *provider) cutAt(w *writer, cut providers.Cut) {
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	if cut.Before.After(w.cut.Before) {
		w.cut = cut
	}
}

// cutOf is the entry of the role's cut-off, as the store has it or as was asked
// for; the zero Entry if none must stand.
func (p *provider) cutOf(ctx context.Context, w *writer) (denylist.Entry, error) {
	if p.cuts != nil {
		all, err := p.cuts(ctx)
		if err != nil {
			return denylist.Entry{}, fmt.Errorf("reading what is cut off: %w", err)
		}
		for _, cut := range all {
			if cut.Role == w.role.ARN {
				p.cutAt(w, cut)
			}
		}
	}
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	if w.cut.Role == "" || !p.now().Before(w.cut.Until) {
		return denylist.Entry{}, nil
	}
	return denylist.CutOffAt(w.cut.Before), nil
}

// seedCuts takes the cut-offs that the store knows into account, so that the
// lists of their roles are looked after.
func (p *provider) seedCuts(ctx context.Context) error {
	if p.cuts == nil {
		return nil
	}
	all, err := p.cuts(ctx)
	if err != nil {
		return fmt.Errorf("reading what is cut off: %w", err)
	}
	for _, cut := range all {
		if _, err := p.cuttable(cut.Role); err == nil {
			p.cutAt(p.writer(cut.Role), cut)
		}
	}
	return nil
}

// before notes what stood before a cut-off that is not in force everywhere yet,
// and is needed until it is.
func (w *writer) before(cut denylist.Entry, leases []denylist.Known, now time.Time) {
	w.list.Needed = nil
	if cut.Kind != denylist.CutOff || w.list.Settled(now).Has(cut) {
		return
	}
	w.list.Needed, _ = denylist.Required(leases, denylist.Entry{}, now)
	for e := range w.list.Stands() {
		if e.Kind == denylist.CutOff {
			w.list.Needed[e] = struct{}{}
		}
	}
}

// reaches reports whether a set has a cut-off that goes as far as cut.
func reaches[V any, S ~map[denylist.Entry]V](s S, cut providers.Cut) bool {
	_, ok := reaching(s, cut)
	return ok
}

// reaching is such a cut-off.
func reaching[V any, S ~map[denylist.Entry]V](s S, cut providers.Cut) (denylist.Entry, bool) {
	want := denylist.CutOffAt(cut.Before).Before
	for e := range s {
		if e.Kind == denylist.CutOff && e.Before >= want {
			return e, true
		}
	}
	return denylist.Entry{}, false
}

// CutOff implements providers.CutOff: the role's policy denies every session
// that was made up to an instant. It stands until the longest of them has ended.
func (p *provider) CutOff(ctx context.Context, cut providers.Cut) providers.Death {
	if _, err := p.cuttable(cut.Role); err != nil {
		return providers.Death{Err: err}
	}
	if !p.now().Before(cut.Until) {
		return providers.Death{Progress: broker.ProgressVerified, Left: "every session that was made up to then has died by itself"}
	}
	w := p.writer(cut.Role)
	p.cutAt(w, cut)
	if err := w.take(ctx); err != nil {
		return providers.Death{Err: err}
	}
	defer w.leave()
	p.look(ctx, w)
	unproven := !reaches(w.proven, cut) && !(w.probe != nil && reaches(w.probe.covers, cut))
	again := unproven && p.config.Early.Verify == awsscope.VerifyProbe && w.probe == nil && !p.now().Before(w.rests)
	var failed error
	if !reaches(w.list.Sure(), cut) || !w.seen || again {
		failed = p.write(ctx, w, false, again)
		p.look(ctx, w)
	}
	w.doubt()
	sure := w.list.Sure()
	e, verified := reaching(w.proven, cut)
	switch {
	case !reaches(sure, cut):
		if failed == nil {
			failed = errors.New("the deny list was not written")
		}
		return providers.Death{Err: failed}
	case verified:
		return providers.Death{Progress: broker.ProgressVerified, Left: fmt.Sprintf(
			"the role's policy denies them, as STS in %s was seen to do at %s; a service that has not taken the policy over yet may accept one until it has",
			p.config.Region, awsscope.Instant(w.proven[e]))}
	}
	return p.written(w, cut.Until)
}
