package awssts

import (
	"context"
	"errors"
	"maps"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// probe is a session of the broker's own that is denied by the same writing as
// the leases. It can do one thing, which changes nothing and tells nothing: ask
// STS to decode a message that is none. It is seen to be allowed before the
// list is written; when it is denied explicitly afterwards, the list of that
// writing is in force: at STS, in the provider's region, at that moment. What
// other services and regions have by then it does not prove.
type probe struct {
	name    string
	client  *sts.Client
	expires time.Time
	covers  denylist.Set // what was written with it; nil before
	wrote   time.Time
	denied  time.Time // since when it is denied; zero if it is not
	next    time.Time // it is asked no sooner
}

const (
	probePolicy = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"sts:DecodeAuthorizationMessage","Resource":"*"}]}`
	probePause  = 500 * time.Millisecond
	probeSlow   = 15 * time.Second
	probeRest   = time.Minute
	// deniedByRole is what AWS says where a policy of the role denies. Where one
	// of another kind does, too, it may name that instead: then nothing is known.
	deniedByRole = "explicit deny in an identity-based policy"
)

func (b *probe) entry() denylist.Entry { return denylist.Entry{Kind: denylist.Probe, ID: b.name} }

// verdict is what became of a probe's call.
type verdict int

const (
	unclear verdict = iota
	allowed
	explicitly // denied by a statement of a policy of the role
)

// open makes the probe's session, of the role whose list it tells of.
func (b *probe) open(ctx context.Context, k *clients, role string) error {
	out, err := k.sts.AssumeRole(ctx, &sts.AssumeRoleInput{
		RoleArn: &role, RoleSessionName: &b.name, Policy: aws.String(probePolicy), DurationSeconds: aws.Int32(int32(ceilSeconds(awsscope.SessionMin))),
	})
	if err != nil {
		return awsclient.FaultOf(ctx, "making a probe's session", err)
	}
	if out.Credentials == nil {
		return errors.New("making a probe's session: the answer of AWS STS has no credentials")
	}
	b.client = k.as(out.Credentials)
	return nil
}

func (b *probe) ask(ctx context.Context) verdict {
	_, err := b.client.DecodeAuthorizationMessage(ctx, &sts.DecodeAuthorizationMessageInput{EncodedMessage: aws.String("mayfly")})
	err = awsclient.FaultOf(ctx, "asking STS with a probe", err)
	switch f := awsclient.AsFault(err); {
	case err == nil, strings.HasPrefix(f.Code, "InvalidAuthorizationMessage"):
		return allowed
	case f.Kind == awsclient.Denied && strings.Contains(f.Err.Error(), deniedByRole):
		return explicitly
	}
	return unclear
}

// arm puts a probe into a step that writes something new. Without one the step
// is done all the same, and what it ends is not verified.
func (p *provider) arm(ctx context.Context, w *writer, step *denylist.Step, must denylist.Set) bool {
	if p.config.Early.Verify != awsscope.VerifyProbe {
		return false
	}
	if w.probe != nil {
		// One that was made for this writing is in it. One that runs goes on, or
		// endings that follow each other would never be verified: the next is
		// for what is written meanwhile.
		return w.probe.covers == nil
	}
	if p.now().Before(w.rests) {
		return false
	}
	b := &probe{name: denylist.ProbePrefix + random(6)}
	with := maps.Clone(step.Set)
	with[b.entry()] = struct{}{}
	room := denylist.Quota - w.list.Used()
	if pol := w.list.Policies[step.Policy]; pol != nil {
		room += denylist.Size(pol.Stands)
	}
	if denylist.Size(with) > room {
		return false // there may be at the next writing
	}
	if err := b.open(ctx, p.clients, w.role.ARN); err != nil {
		w.rests = p.now().Add(probeRest)
		p.log.Warn("the deny list cannot be verified", "role", w.role.ARN, "error", err)
		return false
	}
	b.expires = p.now().Add(awsscope.SessionMin - time.Minute)
	if b.ask(ctx) != allowed {
		w.rests = p.now().Add(probeRest)
		p.log.Warn("the deny list cannot be verified: the role must allow sts:DecodeAuthorizationMessage", "role", w.role.ARN)
		return false
	}
	w.probe = b
	step.Set = with
	must[b.entry()] = struct{}{}
	return true
}

// look asks the probe, if it is time to, and notes what is proven.
func (p *provider) look(ctx context.Context, w *writer) {
	b := w.probe
	now := p.now()
	if b == nil || b.covers == nil || now.Before(b.next) {
		return
	}
	if !now.Before(b.expires) {
		w.probe = nil // it would be refused for another reason
		return
	}
	b.next = now.Add(min(max(now.Sub(b.wrote)/2, probePause), probeSlow))
	switch b.ask(ctx) {
	case allowed:
		b.denied = time.Time{}
	case explicitly:
		if b.denied.IsZero() {
			b.denied = now
		}
		if settled := b.denied.Add(p.config.Early.Settle); now.Before(settled) {
			b.next = settled // and it must be denied then, too
			return
		}
		for e := range b.covers {
			if _, already := w.proven[e]; !already {
				w.proven[e] = now
			}
		}
		w.probe = nil
		w.doubt() // only what stands still counts: a policy may have been written since
	}
}
