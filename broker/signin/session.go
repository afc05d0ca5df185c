package signin

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/store"
)

// The store's layout, beside the engine's:
//
//	session|SHA-256 of the token   the session
//	sessions|principal|ID          the SHA-256 of the token of a person's session
//	sessioncut|principal           see cut.go
const (
	prefixSession  = "session|"
	prefixSessions = "sessions|"
)

func keySession(d digest) string { return prefixSession + hex.EncodeToString(d[:]) }

func digestOfKey(key string) (d digest, err error) {
	b, err := hex.DecodeString(strings.TrimPrefix(key, prefixSession))
	if err != nil || len(b) != len(d) {
		return d, fmt.Errorf("%s is no session", key)
	}
	return digest(b), nil
}

func prefixSessionsOf(p broker.Principal) string { return prefixSessions + p.String() + "|" }

func keySessionOf(p broker.Principal, id broker.SessionID) string {
	return prefixSessionsOf(p) + string(id)
}

// tokenPrefix makes a session's token known for what it is, to people and to
// what looks for secrets in files.
const tokenPrefix = "mayfly_session_"

// Session is a session that was made. Its token is in memory here, and never again.
type Session struct {
	Token     broker.Secret // field "token"
	Person    broker.Person // with the session's ID
	ExpiresAt time.Time
	digest    digest
}

// sessionRecord is a session as the store has it.
type sessionRecord struct {
	Person    broker.Person
	StartedAt time.Time
	ExpiresAt time.Time
}

const recordVersion = 1

type envelope struct {
	Version int           `json:"v"`
	Record  sessionRecord `json:"r"`
}

func encode(r sessionRecord) ([]byte, error) { return json.Marshal(envelope{recordVersion, r}) }

func decode(value []byte) (sessionRecord, error) {
	var e envelope
	if err := json.Unmarshal(value, &e); err != nil {
		return sessionRecord{}, fmt.Errorf("decoding a session: %w", err)
	}
	if e.Version > recordVersion {
		return sessionRecord{}, fmt.Errorf("a session has version %d, and this broker reads up to %d: it was written by a newer Mayfly", e.Version, recordVersion)
	}
	return e.Record, nil
}

type getter interface {
	Get(key string) ([]byte, bool, error)
}

func get(r getter, d digest) (rec sessionRecord, ok bool, err error) {
	value, ok, err := r.Get(keySession(d))
	if err != nil || !ok {
		return rec, false, err
	}
	rec, err = decode(value)
	return rec, err == nil, err
}

func put(t store.Txn, d digest, rec sessionRecord) error {
	value, err := encode(rec)
	if err != nil {
		return fmt.Errorf("encoding a session: %w", err)
	}
	return t.Put(keySession(d), value)
}

func appendEvent(t store.Txn, e audit.Event) error {
	value, err := audit.Encode(e)
	if err != nil {
		return err
	}
	return t.Append(audit.Log, value)
}

// checkPerson refuses a person whom nothing could be kept of.
func (m *Manager) checkPerson(p broker.Person) error {
	if p.Name == "" || len(p.Name) > broker.MaxPersonName || strings.Contains(p.Name, "|") || broker.Clean(p.Name) != p.Name ||
		p.Issuer == "" || p.Subject == "" {
		return failed("the identity provider gives no name for this person that can be used")
	}
	return nil
}

// start makes a session. The engine hears of the person first, and the session
// is in the store, with its evidence, before its token is given away.
func (m *Manager) start(ctx context.Context, p broker.Person, correlation broker.CorrelationID) (Session, error) {
	if err := m.cfg.PersonSeen(ctx, p); err != nil {
		m.metrics.signIn(p.Method, "refused")
		return Session{}, err
	}
	now := m.cfg.Now()
	p.Session = broker.NewSessionID(now)
	token := tokenPrefix + newSecret()
	s := Session{
		Token: broker.NewSecret(map[string]string{"token": token}), Person: p,
		ExpiresAt: now.Add(m.cfg.SessionTTL), digest: digestOf(token),
	}
	others, err := m.sessionsOf(ctx, p.Principal())
	if err != nil {
		return Session{}, storeRefusal(err)
	}
	err = m.cfg.Store.Update(ctx, func(t store.Txn) error {
		if err := m.regroup(t, others, p, now); err != nil {
			return err
		}
		if err := put(t, s.digest, sessionRecord{Person: p, StartedAt: now, ExpiresAt: s.ExpiresAt}); err != nil {
			return err
		}
		if err := t.Put(keySessionOf(p.Principal(), p.Session), s.digest[:]); err != nil {
			return err
		}
		return appendEvent(t, started(p, now, s.ExpiresAt, correlation))
	})
	if err != nil {
		return Session{}, storeRefusal(err)
	}
	m.metrics.signIn(p.Method, "ok")
	return s, nil
}

func started(p broker.Person, now, until time.Time, correlation broker.CorrelationID) audit.Event {
	details := map[string]string{
		"session": string(p.Session), "method": string(p.Method), "issuer": broker.Shorten(p.Issuer, 500),
		"until": until.UTC().Format(time.RFC3339), "groups": broker.Shorten(strings.Join(p.Groups, " "), 1000),
	}
	if !p.AuthTime.IsZero() {
		details["auth_time"] = p.AuthTime.UTC().Format(time.RFC3339)
	}
	if p.ACR != "" {
		details["acr"] = broker.Shorten(p.ACR, 200)
	}
	return audit.Event{Time: now, Type: audit.SessionStarted, Actor: p.Principal().String(), Correlation: correlation, Details: details}
}

// regroup gives a person's other sessions the groups that the identity provider
// tells now, so that an older session does not keep a group that was lost; and
// it ends the oldest, where there are more than one person may have.
func (m *Manager) regroup(t store.Txn, others []digest, p broker.Person, now time.Time) error {
	for i, d := range others {
		rec, ok, err := get(t, d)
		if err != nil {
			return err
		}
		switch {
		case !ok:
		case len(others)-i >= MaxSessions:
			if err := endIn(t, d, rec, now, ending{actor: actorBroker, cause: "too_many"}); err != nil {
				return err
			}
		case !slices.Equal(rec.Person.Groups, p.Groups):
			rec.Person.Groups = p.Groups
			if err := put(t, d, rec); err != nil {
				return err
			}
		}
	}
	return nil
}

// sessionsOf lists a person's sessions, the oldest first. There are no more of
// them than one transaction takes: start keeps it so.
func (m *Manager) sessionsOf(ctx context.Context, p broker.Principal) (found []digest, err error) {
	err = m.cfg.Store.View(ctx, func(r store.Reader) error {
		found = nil
		from, to := store.Prefix(prefixSessionsOf(p))
		for e, err := range r.Scan(from, to) {
			if err != nil {
				return err
			}
			if len(e.Value) != len(digest{}) {
				return fmt.Errorf("%s is no session", e.Key)
			}
			if found = append(found, digest(e.Value)); len(found) >= 2*MaxSessions {
				break
			}
		}
		return nil
	})
	return found, err
}

// IsSession reports whether a bearer token has the form of a session's.
func IsSession(token string) bool { return strings.HasPrefix(token, tokenPrefix) }

// Authenticate finds out who shows a bearer token (RFC 6750): a session's, or
// one of the identity provider's for the broker's audience. It is asked anew for
// each request. until is when the token is over.
func (m *Manager) Authenticate(ctx context.Context, token string) (p broker.Person, until time.Time, err error) {
	switch {
	case token == "":
		return p, until, broker.Refuse(broker.ReasonUnauthenticated, "there is no bearer token", "sign in with `mayfly login`")
	case len(token) > MaxToken:
		return p, until, broker.Refuse(broker.ReasonTokenInvalid, "the bearer token is too long to be one", "sign in with `mayfly login`")
	case IsSession(token):
		return m.session(ctx, token)
	}
	return m.bearer(ctx, token)
}

func sessionOver() *broker.Error {
	return broker.Refuse(broker.ReasonSessionOver, "the session is over", "sign in again with `mayfly login`")
}

func (m *Manager) session(ctx context.Context, token string) (p broker.Person, until time.Time, err error) {
	d := digestOf(token)
	if m.isOver(d) {
		return p, until, sessionOver()
	}
	var rec sessionRecord
	var ok bool
	if err := m.cfg.Store.View(ctx, func(r store.Reader) (err error) {
		rec, ok, err = get(r, d)
		return err
	}); err != nil {
		return p, until, storeRefusal(err)
	}
	if !ok || !m.cfg.Late().Before(rec.ExpiresAt) {
		return p, until, sessionOver()
	}
	return rec.Person, rec.ExpiresAt, nil
}

func (m *Manager) bearer(ctx context.Context, token string) (p broker.Person, until time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, exchangeTime)
	defer cancel()
	now := m.cfg.Now()
	if p, until, err = m.cfg.Provider.VerifyBearer(ctx, token, now); err != nil {
		return broker.Person{}, time.Time{}, err
	}
	p.Method, p.Session = broker.SignInBearer, ""
	if err := m.checkPerson(p); err != nil {
		return broker.Person{}, time.Time{}, err
	}
	if until, err = m.current(ctx, p, until); err != nil {
		return broker.Person{}, time.Time{}, err
	}
	if _, known := m.bearers.get(token, now); !known {
		if err := m.cfg.PersonSeen(ctx, p); err != nil {
			return broker.Person{}, time.Time{}, err
		}
		m.bearers.add(token, struct{}{}, "", now)
	}
	return p, until, nil
}

// storeRefusal turns the store's own errors into a refusal that a caller may see.
func storeRefusal(err error) error {
	if errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrUnknown) || errors.Is(err, store.ErrClosed) {
		return broker.Refuse(broker.ReasonStore, "the broker cannot use its store",
			"try again later; operators see the cause in the log").Because(err)
	}
	return err
}
