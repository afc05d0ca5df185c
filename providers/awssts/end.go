package awssts

import (
	"context"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
)

// soon is how near a lease's own end must be for it to be left to it: a change
// in IAM takes longer to be in force everywhere.
const soon = 5 * time.Second

// Revoke implements providers.Provider.
func (p *provider) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	return p.end(ctx, endings, true)
}

// Confirm implements providers.Provider. It ends nothing that is not being
// ended; what is, it writes again where somebody took it away.
func (p *provider) Confirm(ctx context.Context, endings []providers.Ending) []providers.Death {
	return p.end(ctx, endings, false)
}

// at is one lease of a batch that AWS is to be asked about.
type at struct {
	i int // in the batch
	h handle
	e providers.Ending
}

func (p *provider) end(ctx context.Context, endings []providers.Ending, revoke bool) []providers.Death {
	deaths := make([]providers.Death, len(endings))
	roles := map[string][]at{}
	now := p.now()
	for i, e := range endings {
		if e.Handle == nil {
			// The handle is stored with the intent: without one nothing was asked for.
			deaths[i] = providers.Death{Progress: broker.ProgressVerified}
			continue
		}
		h, err := decodeHandle(e.Handle)
		if err != nil {
			deaths[i] = providers.Death{Err: err}
			continue
		}
		if !e.DiesAt.IsZero() && e.DiesAt.After(h.Dies) {
			h.Dies = e.DiesAt
		}
		switch {
		case !now.Before(h.Dies):
			deaths[i] = providers.Death{Progress: broker.ProgressVerified} // by AWS's own clock
		case p.config.Early.Mode == awsscope.EarlyOff, h.Role == "" && p.config.Early.Mode == awsscope.EarlyDenyList,
			h.Role != "" && p.config.Early.Mode == awsscope.EarlyMinIO:
			deaths[i] = p.asked(h, revoke)
		case p.config.Early.Mode == awsscope.EarlyDenyList && revoke && h.Dies.Sub(now) < soon:
			deaths[i] = p.asked(h, revoke)
		default:
			roles[h.Role] = append(roles[h.Role], at{i, h, e})
		}
	}
	var wg sync.WaitGroup
	for role, leases := range roles {
		wg.Go(func() {
			if p.config.Early.Mode == awsscope.EarlyMinIO {
				p.endAtMinIO(ctx, leases, deaths, revoke)
			} else {
				p.endByList(ctx, role, leases, deaths, revoke)
			}
		})
	}
	wg.Wait()
	return deaths
}

// asked is the answer where nothing can be done but to wait for the lease's own end.
func (p *provider) asked(h handle, revoke bool) providers.Death {
	d := providers.Death{RetryAt: h.Dies}
	if revoke {
		d.Progress = broker.ProgressRequested
	}
	return d
}

// endByList ends leases of one role.
func (p *provider) endByList(ctx context.Context, role string, leases []at, deaths []providers.Death, revoke bool) {
	w := p.writer(role)
	fail := func(err error) {
		for _, l := range leases {
			deaths[l.i] = providers.Death{Err: err}
		}
	}
	if revoke {
		var asked []denylist.Known
		for _, l := range leases {
			asked = append(asked, l.h.known())
		}
		p.begin(w, asked)
	}
	if err := w.take(ctx); err != nil {
		fail(err)
		return
	}
	defer w.leave()
	begun, err := p.begun(ctx, w, leases)
	if err != nil {
		fail(err)
		return
	}
	if !revoke {
		for _, l := range leases {
			deaths[l.i] = providers.Death{RetryAt: l.h.Dies} // unless somebody ended it
		}
	}
	if len(begun) == 0 {
		return
	}
	missing, unproven := false, false
	for _, l := range begun {
		k := l.h.known()
		missing = missing || !covers(w.list.Sure(), k)
		unproven = unproven || !covers(w.proven, k) && !(w.probe != nil && covers(w.probe.covers, k))
	}
	p.look(ctx, w)
	again := unproven && p.config.Early.Verify == awsscope.VerifyProbe && w.probe == nil && !p.now().Before(w.rests)
	var failed error
	if missing || !w.seen || again {
		failed = p.write(ctx, w, false, again)
		p.look(ctx, w)
	}
	w.doubt()
	sure := w.list.Sure()
	for _, l := range begun {
		deaths[l.i] = p.judge(w, l.h.known(), sure, failed)
	}
}
