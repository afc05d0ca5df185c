package lease

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

// A recovery is the way back in where the policies let nobody administer: on
// the broker's host, loud, for one principal and a short time. It stands in for
// `administer` alone: it lets nobody ask, approve or be given anything.

// maxRecovery is the longest that a recovery is open.
const maxRecovery = time.Hour

// recoveryPolicy stands where the names of policies do, in the evidence of what
// was done under a recovery.
const recoveryPolicy = "recovery"

// recoveryRecord is an open recovery.
type recoveryRecord struct {
	Principal broker.Principal
	Until     time.Time
	Reason    string
	OpenedBy  string // who reached the host, as audit.Event.Actor
}

// Recover lets a principal administer for a time whatever the policies say. It
// is called on the broker's host alone; who says who did. It ends by itself,
// and another takes its place.
func (e *Engine) Recover(ctx context.Context, p broker.Principal, d time.Duration, reason, who string) error {
	if err := requireReason(reason, "a recovery"); err != nil {
		return err
	}
	name, person := p.Person()
	_, workload := p.Workload()
	switch {
	case person && (name == "" || len(name) > broker.MaxPersonName || broker.CheckText("name", name, broker.MaxPersonName) != nil), !person && !workload:
		return broker.Refuse(broker.ReasonInvalidArgument, "the principal is neither a person nor a workload",
			`name a person as "person:NAME", or a workload by its SPIFFE ID`)
	case d <= 0 || d > maxRecovery:
		return broker.Refusef(broker.ReasonInvalidArgument, "ask for a shorter time, and repair the policies in it",
			"a recovery of %s was asked for; it can be open for up to %s", broker.Span(d), broker.Span(maxRecovery))
	case who == "":
		return broker.Refuse(broker.ReasonInvalidArgument, "a recovery needs somebody who opens it", "this is a fault of the caller within the broker")
	}
	now := e.clock.now()
	rec := recoveryRecord{Principal: p, Until: now.Add(d), Reason: reason, OpenedBy: who}
	err := e.update(ctx, now, func(t store.Txn) error {
		if err := put(t, keyRecovery, rec); err != nil {
			return err
		}
		if err := t.Put(keyHouse(rec.Until, houseRecovery, "recovery"), nil); err != nil {
			return err
		}
		return appendEvent(t, audit.Event{Time: now, Type: audit.RecoveryOpened, Actor: who, Reason: reason,
			Details: map[string]string{"principal": p.String(), "until": rec.Until.Format(time.RFC3339)}})
	})
	if err != nil {
		return err
	}
	e.house.dueAt(rec.Until)
	e.log.Error("RECOVERY IS OPEN: a principal may administer whatever the policies say", "principal", p.String(), "until", rec.Until, "opened_by", who)
	return nil
}

// recovers reports whether a recovery lets the principal administer.
func (e *Engine) recovers(ctx context.Context, p broker.Principal) (bool, error) {
	rec, open, err := e.recovery(ctx)
	return open && p != "" && rec.Principal == p, err
}

// recovery is the one that is open.
func (e *Engine) recovery(ctx context.Context) (rec recoveryRecord, open bool, err error) {
	err = e.view(ctx, func(r store.Reader) (err error) {
		rec, open, err = get[recoveryRecord](r, keyRecovery)
		return err
	})
	return rec, open && err == nil && e.clock.late().Before(rec.Until), err
}

// endRecovery takes the record of a recovery away whose end has come.
func (e *Engine) endRecovery(ctx context.Context, key string, now time.Time) error {
	late := e.clock.late()
	ended := false
	err := e.update(ctx, now, func(t store.Txn) error {
		ended = false
		if err := t.Delete(key); err != nil {
			return err
		}
		rec, ok, err := get[recoveryRecord](t, keyRecovery)
		if err != nil || !ok || late.Before(rec.Until) {
			return err // another has taken its place
		}
		if err := t.Delete(keyRecovery); err != nil {
			return err
		}
		ended = true
		return appendEvent(t, audit.Event{Time: now, Type: audit.RecoveryClosed, Actor: audit.Broker,
			Details: map[string]string{"principal": rec.Principal.String()}})
	})
	if err == nil && ended {
		e.log.Warn("the recovery is over")
	}
	return err
}

var recoveryDesc = prometheus.NewDesc("mayfly_recovery_open", "1 while somebody may administer whatever the policies say, on the word of the broker's host.", nil, nil)

// collectRecovery tells whether a recovery is open.
func (e *Engine) collectRecovery(ctx context.Context, ch chan<- prometheus.Metric) {
	_, open, err := e.recovery(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(recoveryDesc, err)
		return
	}
	value := 0.0
	if open {
		value = 1
	}
	ch <- prometheus.MustNewConstMetric(recoveryDesc, prometheus.GaugeValue, value)
}

// accessCollector reads what metrics tell of requests, recoveries and cut-offs.
type accessCollector struct{ e *Engine }

var waitingDesc = prometheus.NewDesc("mayfly_requests_waiting", "Requests that are pending.", nil, nil)

func (accessCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- recoveryDesc
	ch <- cutOffsDesc
	ch <- waitingDesc
}

func (c accessCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c.e.collectRecovery(ctx, ch)
	c.e.collectCutOffs(ctx, ch)
	n, err := c.e.countOf(ctx, prefixWaiting, func(store.Reader, string) (bool, error) { return true, nil })
	if err != nil {
		ch <- prometheus.NewInvalidMetric(waitingDesc, err)
		return
	}
	ch <- prometheus.MustNewConstMetric(waitingDesc, prometheus.GaugeValue, float64(n))
}
