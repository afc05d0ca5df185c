package providertest

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// Mode is how a System's credentials are named and ended, after the three
// kinds of real providers.
type Mode string

// The modes.
const (
	// Planned: the external name follows from the lease (a PostgreSQL role).
	// An ending works at once. A create that lands after the ending lives.
	Planned Mode = "planned"
	// Recorded: an inert session is opened first, under a name that the System
	// chooses, and the credential is created under it (a Vault token and its
	// accessor). An ending works at once, and nothing can be created under an
	// ended session.
	Recorded Mode = "recorded"
	// Asked: named as in Planned, but an ending is only asked for, and works
	// after SystemConfig.Settle (a policy that has to propagate). It covers
	// what was created before it was asked for, and nothing later.
	Asked Mode = "asked"
)

// SystemConfig is what a System is made with. The zero value is useful.
type SystemConfig struct {
	Now    func() time.Time // the System's own clock; nil means time.Now
	Settle time.Duration    // mode Asked: how long an ending takes to work; negative means that it never does
	MaxTTL time.Duration    // the longest that a credential lives, whatever is asked; 0 means no such limit
	Script Script
}

// System is an outside system that makes credentials. It is what really is:
// tests compare it with what a broker says. All methods may be called from
// many goroutines.
type System struct {
	now    func() time.Time
	settle time.Duration
	maxTTL time.Duration
	faults faults

	mu          sync.Mutex
	serial      int
	byAccessor  map[string]*session
	byToken     map[string]*session
	credentials []*Credential
	bySecret    map[string]*Credential
	byHandle    map[string][]*Credential // by external name, or by accessor in mode Recorded
	history     []Event
}

// Credential is one credential that was made.
type Credential struct {
	Name      string // the external name
	Accessor  string // mode Recorded: the session that it belongs to
	Secret    string
	CreatedAt time.Time
	DiesAt    time.Time // by itself
	AskedAt   time.Time // mode Asked: when its ending was first asked for; zero before
	EndedAt   time.Time // when an ending works or will work; zero where there is none
}

// Lease is the lease that the credential was made for.
func (c Credential) Lease() broker.LeaseID {
	return broker.LeaseID(c.Name[max(0, len(c.Name)-leaseIDLength):])
}

const leaseIDLength = 26

// Works reports whether c is accepted at now.
func (c Credential) Works(now time.Time) bool {
	return now.Before(c.DiesAt) && (c.EndedAt.IsZero() || now.Before(c.EndedAt))
}

// Event is one effect on a System.
type Event struct {
	At   time.Time
	Op   Op // OpSession, OpCreate or OpEnd
	Name string
}

type session struct {
	accessor string
	diesAt   time.Time
	ended    bool
}

func (s *session) closed(now time.Time) bool { return s.ended || !now.Before(s.diesAt) }

// NewSystem makes a System with nothing in it.
func NewSystem(config SystemConfig) *System {
	if config.Now == nil {
		config.Now = time.Now
	}
	return &System{
		now:        config.Now,
		settle:     config.Settle,
		maxTTL:     config.MaxTTL,
		faults:     faults{script: config.Script, calls: make(map[Op]int), came: make(chan struct{})},
		byAccessor: make(map[string]*session),
		byToken:    make(map[string]*session),
		bySecret:   make(map[string]*Credential),
		byHandle:   make(map[string][]*Credential),
	}
}

// SetScript replaces the Script from the next request on. The numbers of
// requests go on.
func (s *System) SetScript(script Script) {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	s.faults.script = script
}

// ReleaseLate performs what was held (Fault.Held) and says how much that was.
func (s *System) ReleaseLate() int { return s.faults.release() }

// Pending is the number of late commits that are still to come.
func (s *System) Pending() int {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	return s.faults.late
}

// AwaitPending waits until there is a late commit that is still to come.
func (s *System) AwaitPending(ctx context.Context) error { return s.faults.awaitLate(ctx) }

// Works reports whether the secret is accepted now.
func (s *System) Works(secret string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.bySecret[secret]
	return ok && c.Works(s.now())
}

// Live returns the credentials that work now, by name.
func (s *System) Live() []Credential {
	now := s.now()
	return slices.DeleteFunc(s.All(), func(c Credential) bool { return !c.Works(now) })
}

// All returns every credential that was ever made, by name.
func (s *System) All() []Credential {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Credential, len(s.credentials))
	for i, c := range s.credentials {
		all[i] = *c
	}
	slices.SortStableFunc(all, func(a, b Credential) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// History returns every effect, in order.
func (s *System) History() []Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.history)
}

type sessionRequest struct {
	Name   string    `json:"name"`
	DiesAt time.Time `json:"dies_at"`
}

type sessionAnswer struct {
	Accessor string `json:"accessor"` // ends the session and nothing else
	Token    string `json:"token"`    // creates a credential under the session
}

type createRequest struct {
	Name   string    `json:"name"`
	Token  string    `json:"token,omitempty"` // mode Recorded
	DiesAt time.Time `json:"dies_at"`
}

type createAnswer struct {
	Secret string    `json:"secret"`
	DiesAt time.Time `json:"dies_at"`
}

type handlesRequest struct {
	Mode    Mode     `json:"mode"`
	Handles []string `json:"handles"` // external names, or accessors in mode Recorded
}

type statusAnswer struct {
	Progress broker.Progress `json:"progress"`
	RetryAt  time.Time       `json:"retry_at,omitzero"`
}

func (s *System) session(ctx context.Context, r sessionRequest) (sessionAnswer, error) {
	return request(ctx, &s.faults, OpSession, []string{r.Name}, func() (sessionAnswer, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		answer := sessionAnswer{Accessor: s.unique("accessor", r.Name), Token: s.unique("token", r.Name)}
		opened := &session{accessor: answer.Accessor, diesAt: r.DiesAt}
		s.byAccessor[answer.Accessor] = opened
		s.byToken[answer.Token] = opened
		s.log(OpSession, r.Name)
		return answer, nil
	})
}

func (s *System) create(ctx context.Context, r createRequest) (createAnswer, error) {
	return request(ctx, &s.faults, OpCreate, []string{r.Name}, func() (createAnswer, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		now := s.now()
		c := &Credential{Name: r.Name, CreatedAt: now, DiesAt: r.DiesAt}
		if s.maxTTL != 0 && now.Add(s.maxTTL).Before(c.DiesAt) {
			c.DiesAt = now.Add(s.maxTTL)
		}
		handle := r.Name
		if r.Token != "" {
			under, ok := s.byToken[r.Token]
			if !ok || under.closed(now) {
				return createAnswer{}, errRefused
			}
			c.Accessor, handle = under.accessor, under.accessor
		}
		c.Secret = s.unique("secret", r.Name)
		s.credentials = append(s.credentials, c)
		s.bySecret[c.Secret] = c
		s.byHandle[handle] = append(s.byHandle[handle], c)
		s.log(OpCreate, r.Name)
		return createAnswer{Secret: c.Secret, DiesAt: c.DiesAt}, nil
	})
}

func (s *System) end(ctx context.Context, r handlesRequest) ([]statusAnswer, error) {
	return request(ctx, &s.faults, OpEnd, r.Handles, func() ([]statusAnswer, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		now := s.now()
		for _, handle := range r.Handles {
			if under, ok := s.byAccessor[handle]; ok {
				under.ended = true
			}
			for _, c := range s.byHandle[handle] {
				s.endOne(c, r.Mode, now)
			}
			s.log(OpEnd, handle)
		}
		return s.statuses(r.Handles, now), nil
	})
}

func (s *System) endOne(c *Credential, mode Mode, now time.Time) {
	if !c.EndedAt.IsZero() || !c.AskedAt.IsZero() {
		return
	}
	if mode != Asked {
		c.EndedAt = now
		return
	}
	c.AskedAt = now
	if s.settle >= 0 {
		c.EndedAt = now.Add(s.settle)
	}
}

func (s *System) status(ctx context.Context, r handlesRequest) ([]statusAnswer, error) {
	return request(ctx, &s.faults, OpStatus, r.Handles, func() ([]statusAnswer, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.statuses(r.Handles, s.now()), nil
	})
}

// statuses tells how far each handle's ending has come: as far as that of its
// least ended credential.
func (s *System) statuses(handles []string, now time.Time) []statusAnswer {
	answers := make([]statusAnswer, len(handles))
	for i, handle := range handles {
		answers[i] = statusAnswer{Progress: broker.ProgressVerified}
		for _, c := range s.byHandle[handle] {
			if a := s.statusOf(c, now); rank(a.Progress) < rank(answers[i].Progress) {
				answers[i] = a
			}
		}
		// A session that has not ended can still get a credential.
		if under, ok := s.byAccessor[handle]; ok && !under.closed(now) {
			answers[i] = statusAnswer{}
		}
	}
	return answers
}

func (s *System) statusOf(c *Credential, now time.Time) statusAnswer {
	switch {
	case !c.Works(now):
		return statusAnswer{Progress: broker.ProgressVerified}
	case c.AskedAt.IsZero():
		return statusAnswer{}
	case s.settle < 0:
		return statusAnswer{Progress: broker.ProgressRequested, RetryAt: c.DiesAt}
	}
	if written := c.AskedAt.Add(s.settle / 2); now.Before(written) {
		return statusAnswer{Progress: broker.ProgressRequested, RetryAt: written}
	}
	retry := c.EndedAt
	if c.DiesAt.Before(retry) {
		retry = c.DiesAt
	}
	return statusAnswer{Progress: broker.ProgressWritten, RetryAt: retry}
}

func rank(p broker.Progress) int {
	return slices.Index([]broker.Progress{
		broker.ProgressNone, broker.ProgressRequested, broker.ProgressWritten, broker.ProgressVerified}, p)
}

// unique makes a name or secret that is never made again, and is the same in
// every run with the same requests. It is no secret but in a test.
func (s *System) unique(kind, name string) string {
	s.serial++
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%s/%d", kind, name, s.serial))
	return kind + "-" + hex.EncodeToString(sum[:16])
}

func (s *System) log(op Op, name string) {
	s.history = append(s.history, Event{At: s.now(), Op: op, Name: name})
}

// isAccessor reports whether s has the form of an accessor.
func isAccessor(s string) bool {
	digits, ok := strings.CutPrefix(s, "accessor-")
	if _, err := hex.DecodeString(digits); err != nil || len(digits) != 32 {
		return false
	}
	return ok
}
