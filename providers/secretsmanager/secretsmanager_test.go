package secretsmanager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"crypto/tls"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/providers/secretsmanager/fakesecrets"
)

const secretText = `{"username":"crm","password":"correct-horse-battery-staple","port":5432,"tls":true,"nested":{"a":1},"none":null}`

type world struct {
	t      *testing.T
	fake   *fakesecrets.Fake
	url    string
	secret *fakesecrets.Secret
	now    time.Time
	logged strings.Builder
	known  []providers.Known // what the store has
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, fake: fakesecrets.New(), now: time.Now()}
	server := httptest.NewServer(w.fake)
	t.Cleanup(server.Close)
	w.url = server.URL
	w.secret = w.fake.Add("crm/db", secretText)
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIAFAKE")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "fake")
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
	t.Setenv("AWS_MAX_ATTEMPTS", "1")
	return w
}

func (w *world) config() json.RawMessage {
	return fmt.Appendf(nil, `{"region":%q,"account":%q,"endpoint_url":%q,"credentials":{"method":"default"}}`, fakesecrets.Region, fakesecrets.Account, w.url)
}

func (w *world) open() *provider {
	p, err := Driver{}.Open(w.t.Context(), providers.Config{Name: "secrets", Installation: "m0000000000000000000000000", Raw: w.config(),
		Log: slog.New(slog.NewTextHandler(&w.logged, nil)), Now: func() time.Time { return w.now },
		Known: func(context.Context, bool) ([]providers.Known, error) { return w.known, nil }})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { p.Close() })
	return p.(*provider)
}

func tool(scope string, params ...broker.Param) broker.Tool {
	return broker.Tool{Name: "crm.db", Provider: "secrets", MaxTTL: time.Hour, Scope: json.RawMessage(scope), Params: params}
}

type made struct {
	minted   providers.Minted
	err      error
	recorded []providers.Handle
	ending   providers.Ending
}

func (w *world) mint(p *provider, t broker.Tool, params map[string]string) made {
	now := w.now
	req := providers.MintRequest{Lease: broker.NewLeaseID(now), Agent: spiffeid.RequireFromString("spiffe://acme.test/agent"), Tool: t, Params: params, Now: now, End: now.Add(time.Minute)}
	var m made
	m.minted, m.err = p.Mint(w.t.Context(), req, func(h providers.Handle) error { m.recorded = append(m.recorded, h); return nil })
	m.ending = providers.Ending{Lease: req.Lease, Tool: t.Name, Handle: m.minted.Handle}
	return m
}

// TestMint: the tool's fields of one version are given, as static; no more, and
// nowhere else.
func TestMint(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	for scope, want := range map[string]map[string]string{
		`{"secret":"crm/db"}`: {"value": secretText},
		`{"secret":"crm/db","fields":["username","password","port","tls"]}`:                         {"username": "crm", "password": "correct-horse-battery-staple", "port": "5432", "tls": "true"},
		`{"secret":"` + w.secret.ARN + `","fields":["password"],"rotate":true}`:                     {"password": "correct-horse-battery-staple"},
		`{"secret":"` + strings.TrimSuffix(w.secret.ARN, "-AbCdEf") + `","fields":["username"]}`:    {"username": "crm"},
		`{"secret":"crm/db","version_id":"` + strings.Repeat("0", 31) + `1","fields":["username"]}`: {"username": "crm"},
		`{"secret":"crm/db","version_stage":"AWSCURRENT","fields":["username"]}`:                    {"username": "crm"},
	} {
		m := w.mint(p, tool(scope), nil)
		if m.err != nil {
			t.Errorf("%s: %v", scope, m.err)
			continue
		}
		if diff := cmp.Diff(want, m.minted.Secret.RevealAll()); diff != "" {
			t.Errorf("%s: %s", scope, diff)
		}
		info, err := Driver{}.ValidateScope(w.config(), tool(scope))
		if err != nil || !info.Static || len(info.Fields) != len(want) || info.Survives != m.minted.Survives || info.Survives == "" {
			t.Errorf("%s: %+v, %v", scope, info, err)
		}
		if !m.minted.Static || !m.minted.DiesAt.IsZero() || len(m.recorded) != 1 || string(m.recorded[0]) != string(m.minted.Handle) {
			t.Errorf("%s: %+v, %d recorded", scope, m.minted, len(m.recorded))
		}
		for place, text := range map[string]string{"handle": string(m.minted.Handle), "log": w.logged.String(), "printed": fmt.Sprintf("%+v", m.minted)} {
			if found := providertest.FindLeak([]byte(text), m.minted.Secret, "username", "port", "tls"); found != "" {
				t.Errorf("%s: the secret is in the %s (%s)", scope, place, found)
			}
		}
	}
}

// TestMintParams: a parameter chooses among secrets of one place, and gets out of
// it with nothing.
func TestMintParams(t *testing.T) {
	w := newWorld(t)
	w.fake.Add("crm/acme/key", "acme's")
	w.fake.Add("admin/key", "the admin's")
	p := w.open()
	// A pattern that is too wide, as somebody may write it.
	chosen := tool(`{"secret":"crm/${params.customer}/key"}`, broker.Param{Name: "customer", Type: broker.ParamString, Pattern: regexp.MustCompile(`^.*$`)})
	if _, err := (Driver{}).ValidateScope(w.config(), chosen); err != nil {
		t.Fatal(err)
	}
	if m := w.mint(p, chosen, map[string]string{"customer": "acme"}); m.err != nil || m.minted.Secret.RevealAll()["value"] != "acme's" {
		t.Errorf("%v", m.err)
	}
	calls := w.fake.Count("GetSecretValue")
	for _, value := range []string{"../admin", "acme/key/x", "a/b", "", "*", "${params.customer}", "a b", "acme\n"} {
		m := w.mint(p, chosen, map[string]string{"customer": value})
		wantRefused(t, m.err, broker.ReasonParameter)
	}
	if w.fake.Count("GetSecretValue") != calls {
		t.Error("AWS was asked")
	}
}

func wantRefused(t *testing.T, err error, reason broker.Reason) {
	t.Helper()
	var told *broker.Error
	if !errors.Is(err, providers.ErrNothingMade) || !errors.Is(err, providers.ErrRefused) || !errors.As(err, &told) || told.Reason != reason {
		t.Errorf("%v, want a refusal for %s", err, reason)
	}
}

// TestMintRefused: what is not as the tool says is refused in our own words, and
// what may pass is not.
func TestMintRefused(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	plain := tool(`{"secret":"crm/db","fields":["password"]}`)
	for scope, why := range map[string]string{
		`{"secret":"crm/nothing"}`:                            "is not there",
		`{"secret":"crm/db","version_stage":"AWSPREVIOUS"}`:   "is not there",
		`{"secret":"crm/db","fields":["password","missing"]}`: "not as the catalog says",
		`{"secret":"crm/db","fields":["nested"]}`:             "not as the catalog says",
		`{"secret":"crm/db","fields":["none"]}`:               "not as the catalog says",
		// AWS takes this for the beginning of crm/db's ARN.
		`{"secret":"arn:aws:secretsmanager:eu-central-1:123456789012:secret:crm/d"}`: "not as the catalog says",
	} {
		m := w.mint(p, tool(scope), nil)
		wantRefused(t, m.err, broker.ReasonProviderRefused)
		var told *broker.Error
		if errors.As(m.err, &told) && !strings.Contains(told.Message, why) {
			t.Errorf("%s: %s", scope, told.Message)
		}
		if len(m.recorded) != 0 || !m.minted.Secret.IsZero() {
			t.Errorf("%s: %d recorded", scope, len(m.recorded))
		}
	}
	w.fake.Set(func() { w.secret.Binary = true })
	wantRefused(t, w.mint(p, plain, nil).err, broker.ReasonProviderRefused)
	w.fake.Set(func() {
		w.secret.Binary = false
		w.secret.Versions[w.secret.Stages[stageCurrent]] = "no JSON, and secret"
	})
	m := w.mint(p, plain, nil)
	wantRefused(t, m.err, broker.ReasonProviderRefused)
	if strings.Contains(fmt.Sprint(m.err), "and secret") {
		t.Error("the secret is in the error")
	}
	for code, away := range map[string]bool{
		"AccessDeniedException": false, codeInvalid: false, "DecryptionFailure": false, "ResourceNotFoundException": false, "InternalServiceError": false, "ThrottlingException": true, "ExpiredTokenException": true, "InvalidSignatureException": true,
	} {
		w.fake.Set(func() { w.fake.Fail = code })
		m := w.mint(p, plain, nil)
		refused := code != "InternalServiceError" && !away
		var told *broker.Error
		if !errors.Is(m.err, providers.ErrNothingMade) || errors.Is(m.err, providers.ErrRefused) != refused || errors.Is(m.err, providers.ErrAway) != away ||
			!errors.As(m.err, &told) || strings.Contains(told.Message, "as the test wants") {
			t.Errorf("%s: %v", code, m.err)
		}
	}
}

func (w *world) revoke(p *provider, m made) providers.Death {
	return p.Revoke(w.t.Context(), []providers.Ending{m.ending})[0]
}

func (w *world) confirm(p *provider, m made) providers.Death {
	return p.Confirm(w.t.Context(), []providers.Ending{m.ending})[0]
}

// TestLapses: without a rotation nothing is asked, and nobody is told that the
// secret is dead.
func TestLapses(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	m := w.mint(p, tool(`{"secret":"crm/db"}`), nil)
	if d := w.confirm(p, m); d != (providers.Death{}) {
		t.Errorf("not ended: %+v", d)
	}
	if d := w.revoke(p, m); d != (providers.Death{Progress: broker.ProgressRequested, Lapsed: true}) {
		t.Errorf("%+v", d)
	}
	if w.fake.Count("RotateSecret") != 0 {
		t.Error("it was rotated")
	}
}

// TestRotates: the end begins a rotation, once for all leases of a version, and
// tells how far it came; never that the lease is dead.
func TestRotates(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	rotating := tool(`{"secret":"crm/db","fields":["password"],"rotate":true}`)
	a, b := w.mint(p, rotating, nil), w.mint(p, rotating, nil)
	if d := w.confirm(p, a); d != (providers.Death{}) || w.fake.Count("RotateSecret") != 0 {
		t.Errorf("not ended: %+v", d)
	}
	for _, m := range []made{a, b, a} {
		if d := w.revoke(p, m); d.Err != nil || d.Progress != broker.ProgressRequested || d.Lapsed || !d.RetryAt.After(w.now) {
			t.Errorf("begun: %+v", d)
		}
	}
	if d := w.confirm(p, a); d.Err != nil || d.Progress != broker.ProgressRequested || d.Lapsed {
		t.Errorf("under way: %+v", d)
	}
	w.fake.Finish(w.secret, `{"password":"new"}`)
	for _, m := range []made{a, b} {
		if d := w.confirm(p, m); d.Err != nil || d.Progress != broker.ProgressWritten || !d.Lapsed || !strings.Contains(d.Left, "rotation function") {
			t.Errorf("rotated: %+v", d)
		}
	}
	if len(w.secret.Versions) != 2 {
		t.Errorf("%d versions", len(w.secret.Versions))
	}
	// A lease whose version was rotated meanwhile needs no other rotation.
	c := w.mint(p, rotating, nil)
	w.fake.Set(func() { w.secret.Stages[stagePending] = strings.Repeat("f", 32) })
	w.fake.Finish(w.secret, `{"password":"newer"}`)
	calls := w.fake.Count("RotateSecret")
	if d := w.revoke(p, c); d.Progress != broker.ProgressWritten || !d.Lapsed || w.fake.Count("RotateSecret") != calls {
		t.Errorf("rotated by others: %+v", d)
	}
}

// TestRotationFails: a rotation that AWS does not begin is an error, is asked for
// again, and does not lapse; one that hangs or fails is asked for again, too.
func TestRotationFails(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	m := w.mint(p, tool(`{"secret":"crm/db","rotate":true}`), nil)
	w.fake.Set(func() { w.secret.Rotates = false })
	for range 2 {
		if d := w.revoke(p, m); d.Err == nil || d.Lapsed || d.Progress != broker.ProgressNone || !strings.Contains(d.Err.Error(), "rotation function") {
			t.Errorf("no rotation: %+v", d)
		}
	}
	w.fake.Set(func() { w.fake.Fail = "ThrottlingException" })
	if d := w.revoke(p, m); !errors.Is(d.Err, providers.ErrAway) || d.Lapsed {
		t.Errorf("throttled: %+v", d)
	}
	w.fake.Set(func() { w.fake.Fail, w.secret.Rotates = "", true })
	if d := w.revoke(p, m); d.Progress != broker.ProgressRequested {
		t.Errorf("%+v", d)
	}
	// The function fails, and the label is gone: the rotation did not happen.
	w.fake.Set(func() { delete(w.secret.Stages, stagePending) })
	if d := w.confirm(p, m); d != (providers.Death{}) {
		t.Errorf("failed: %+v", d)
	}
	if d := w.revoke(p, m); d.Progress != broker.ProgressRequested {
		t.Errorf("%+v", d)
	}
	// It hangs: after a while it is asked for again, also by a broker that has
	// forgotten when it asked.
	w.now = w.now.Add(rotationLimit + time.Second)
	if d := w.confirm(p, m); d != (providers.Death{}) {
		t.Errorf("hangs: %+v", d)
	}
	calls := w.fake.Count("RotateSecret")
	if d := w.revoke(p, m); d.Progress != broker.ProgressRequested || w.fake.Count("RotateSecret") != calls+1 {
		t.Errorf("%+v", d)
	}
	if d := w.confirm(w.open(), m); d != (providers.Death{}) {
		t.Errorf("another broker: %+v", d)
	}
	// One that hangs for longer, which AWS says with each request, is told of.
	w.fake.Set(func() { w.secret.Stages[stagePending] = strings.Repeat("e", 32) })
	w.now = w.now.Add(rotationLimit + time.Second)
	if d := w.revoke(p, m); d.Err == nil || d.Progress != broker.ProgressRequested || d.Lapsed || !strings.Contains(d.Err.Error(), "rotation function's log") {
		t.Errorf("hangs for long: %+v", d)
	}
	// Somebody else's rotation is under way.
	w.fake.Set(func() { w.secret.Stages[stagePending] = strings.Repeat("f", 32) })
	if d := w.revoke(p, m); d.Err != nil || d.Progress != broker.ProgressRequested {
		t.Errorf("another's: %+v", d)
	}
	// The secret is deleted: there is nothing to rotate.
	w.fake.Set(func() { w.secret.Deleted = true })
	if d := w.confirm(p, m); !d.Lapsed || d.Progress != broker.ProgressRequested || d.Left == "" {
		t.Errorf("to be deleted: %+v", d)
	}
	w.fake.Delete(w.secret)
	if d := w.revoke(p, m); !d.Lapsed || d.Progress != broker.ProgressRequested {
		t.Errorf("deleted: %+v", d)
	}
}

// TestEndings: one death for each, in order; a handle that is not of this
// provider's is an error.
func TestEndings(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	m := w.mint(p, tool(`{"secret":"crm/db"}`), nil)
	of := func(h string) providers.Ending {
		return providers.Ending{Lease: broker.NewLeaseID(w.now), Handle: providers.Handle(h)}
	}
	foreign := strings.Replace(string(m.minted.Handle), fakesecrets.Account, "999999999999", 1)
	endings := []providers.Ending{of("{}"), {Lease: broker.NewLeaseID(w.now)}, m.ending, of("\x00"), of(`{"v":99}`), of(foreign)}
	for name, ask := range map[string]func(context.Context, []providers.Ending) []providers.Death{"Revoke": p.Revoke, "Confirm": p.Confirm} {
		deaths := ask(t.Context(), endings)
		if len(deaths) != len(endings) {
			t.Fatalf("%s: %d deaths", name, len(deaths))
		}
		for i, d := range deaths {
			if bad := i != 1 && i != 2; (d.Err != nil) != bad || (d.Progress == broker.ProgressVerified) != (i == 1) {
				t.Errorf("%s, ending %d: %+v", name, i, d)
			}
		}
		if len(ask(t.Context(), nil)) != 0 {
			t.Errorf("%s: deaths of nothing", name)
		}
	}
	// What could not be recorded is not given.
	refusal := errors.New("the store is away")
	now := w.now
	minted, err := p.Mint(t.Context(), providers.MintRequest{Lease: broker.NewLeaseID(now), Tool: tool(`{"secret":"crm/db"}`), Now: now, End: now.Add(time.Minute)},
		func(providers.Handle) error { return refusal })
	if !errors.Is(err, refusal) || !errors.Is(err, providers.ErrNothingMade) || !minted.Secret.IsZero() {
		t.Errorf("%v", err)
	}
}

// open is a lease as the store has it.
func (m made) open() providers.Known { return providers.Known{Ending: m.ending} }

// TestOneAtATime: a lease whose end rotates the secret stands alone: it is refused
// beside any other lease of the secret that has not ended, with nothing read, and
// one that is given stays the only one of those that rotate.
func TestOneAtATime(t *testing.T) {
	w := newWorld(t)
	w.fake.Add("crm/other", "x")
	p := w.open()
	rotating, plain := tool(`{"secret":"crm/db","rotate":true}`), tool(`{"secret":"crm/db"}`)
	for name, first := range map[string]broker.Tool{"rotating": rotating, "plain": plain, "by its ARN": tool(`{"secret":"` + w.secret.ARN + `"}`)} {
		w.known = nil
		m := w.mint(p, first, nil)
		if m.err != nil {
			t.Fatalf("%s: %v", name, m.err)
		}
		w.known = []providers.Known{m.open()}
		reads := w.fake.Count("GetSecretValue")
		next := w.mint(p, rotating, nil)
		wantLater(t, next.err)
		if len(next.recorded) != 0 || w.fake.Count("GetSecretValue") != reads {
			t.Errorf("%s: it was read, and %d handles were recorded", name, len(next.recorded))
		}
	}
	// One that does not rotate takes nothing from anybody, and neither does another secret's.
	for _, other := range []broker.Tool{plain, tool(`{"secret":"crm/other","rotate":true}`)} {
		if m := w.mint(p, other, nil); m.err != nil {
			t.Error(m.err)
		}
	}
	// Two at once: each sees what the other has recorded, or is refused by it.
	w.known = nil
	now := w.now
	req := providers.MintRequest{Lease: broker.NewLeaseID(now), Tool: rotating, Now: now, End: now.Add(time.Minute)}
	_, err := p.Mint(t.Context(), req, func(h providers.Handle) error {
		w.known = []providers.Known{{Ending: providers.Ending{Lease: req.Lease, Handle: h}}, {Ending: providers.Ending{Lease: broker.NewLeaseID(now), Handle: h}}}
		return nil
	})
	wantLater(t, err)
	// Its own record is no other lease, and neither is one that nothing was recorded of.
	_, err = p.Mint(t.Context(), req, func(h providers.Handle) error {
		w.known = []providers.Known{{Ending: providers.Ending{Lease: req.Lease, Handle: h}}, {Ending: providers.Ending{Lease: broker.NewLeaseID(now)}}}
		return nil
	})
	if err == nil {
		t.Error("the record of the two is still there")
	}
	w.known = nil
	if _, err = p.Mint(t.Context(), req, func(h providers.Handle) error {
		w.known = []providers.Known{{Ending: providers.Ending{Lease: req.Lease, Handle: h}}, {Ending: providers.Ending{Lease: broker.NewLeaseID(now)}}}
		return nil
	}); err != nil {
		t.Error(err)
	}
	// A store that cannot be asked gives no lease.
	away := errors.New("the store is away")
	p.known = func(context.Context, bool) ([]providers.Known, error) { return nil, away }
	if m := w.mint(p, rotating, nil); !errors.Is(m.err, away) || !errors.Is(m.err, providers.ErrNothingMade) || !m.minted.Secret.IsZero() {
		t.Errorf("%v", m.err)
	}
}

// wantLater is a refusal that is over by itself.
func wantLater(t *testing.T, err error) {
	t.Helper()
	if broker.ReasonOf(err) != broker.ReasonConflict || !errors.Is(err, providers.ErrNothingMade) || errors.Is(err, providers.ErrRefused) {
		t.Errorf("%v", err)
	}
}

// TestRotatable: what could not be rotated at its end, or is being rotated now, is
// not given to a tool that says that it is rotated.
func TestRotatable(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	rotating := tool(`{"secret":"crm/db","rotate":true}`)
	for name, spoil := range map[string]func(){
		"no rotation":   func() { w.secret.Rotates = false },
		"to be deleted": func() { w.secret.Deleted = true },
		"denied":        func() { w.fake.Fail = "AccessDeniedException" },
	} {
		w.fake.Set(spoil)
		m := w.mint(p, rotating, nil)
		if wantRefused(t, m.err, broker.ReasonProviderRefused); len(m.recorded) != 0 {
			t.Errorf("%s: recorded", name)
		}
		w.fake.Set(func() { w.secret.Rotates, w.secret.Deleted, w.fake.Fail = true, false, "" })
	}
	w.fake.Set(func() { w.secret.Stages[stagePending] = strings.Repeat("f", 32) })
	wantLater(t, w.mint(p, rotating, nil).err)
	if m := w.mint(p, tool(`{"secret":"crm/db"}`), nil); m.err != nil {
		t.Error(m.err)
	}
	// After a rotation the label may be on the current version still.
	w.fake.Finish(w.secret, secretText)
	w.fake.Set(func() { w.secret.Stages[stagePending] = w.secret.Stages[stageCurrent] })
	if m := w.mint(p, rotating, nil); m.err != nil {
		t.Error(m.err)
	}
	// AWS takes this for the beginning of crm/db's ARN.
	reads := w.fake.Count("GetSecretValue")
	wantRefused(t, w.mint(p, tool(`{"secret":"arn:aws:secretsmanager:eu-central-1:123456789012:secret:crm/d","rotate":true}`), nil).err, broker.ReasonProviderRefused)
	if w.fake.Count("GetSecretValue") != reads {
		t.Error("it was read")
	}
}

// TestExactlyOneVersion: an answer with something else than was asked for is not
// given, and nothing of it is in the error.
func TestExactlyOneVersion(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	byID := `{"secret":"crm/db","version_id":"` + strings.Repeat("0", 31) + `1"}`
	for name, test := range map[string]struct {
		scope string
		twist func(map[string]any)
	}{
		"another version": {byID, func(a map[string]any) { a["VersionId"] = strings.Repeat("0", 31) + "2" }},
		"another label":   {`{"secret":"crm/db"}`, func(a map[string]any) { a["VersionStages"] = []string{"AWSPREVIOUS"} }},
		"no label":        {`{"secret":"crm/db"}`, func(a map[string]any) { delete(a, "VersionStages") }},
		"no version":      {`{"secret":"crm/db"}`, func(a map[string]any) { delete(a, "VersionId") }},
		"another name":    {`{"secret":"crm/db"}`, func(a map[string]any) { a["Name"] = "crm/db2" }},
		"another account": {`{"secret":"crm/db"}`, func(a map[string]any) {
			a["ARN"] = strings.Replace(a["ARN"].(string), fakesecrets.Account, "999999999999", 1)
		}},
		"another region": {`{"secret":"crm/db"}`, func(a map[string]any) {
			a["ARN"] = strings.Replace(a["ARN"].(string), fakesecrets.Region, "us-east-1", 1)
		}},
		"larger than can be": {`{"secret":"crm/db"}`, func(a map[string]any) { a["SecretString"] = secretText + strings.Repeat(" ", maxSecret) }},
		"no text":            {`{"secret":"crm/db"}`, func(a map[string]any) { a["SecretString"] = map[string]string{"x": secretText} }},
	} {
		w.fake.Set(func() { w.fake.Twist = test.twist })
		m := w.mint(p, tool(test.scope), nil)
		if m.err == nil || !errors.Is(m.err, providers.ErrNothingMade) || len(m.recorded) != 0 || !m.minted.Secret.IsZero() {
			t.Errorf("%s: %v", name, m.err)
			continue
		}
		if strings.Contains(m.err.Error(), "correct-horse") {
			t.Errorf("%s: the secret is in the error", name)
		}
	}
	w.fake.Set(func() { w.fake.Twist = func(a map[string]any) { a["SecretString"] = strings.Repeat("x", maxSecret) } })
	if m := w.mint(p, tool(`{"secret":"crm/db"}`), nil); m.err != nil {
		t.Errorf("the largest: %v", m.err)
	}
}

// TestAwayAsksOnce: of many leases, one finds out that nobody answers.
func TestAwayAsksOnce(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	m := w.mint(p, tool(`{"secret":"crm/db","rotate":true}`), nil)
	w.fake.Set(func() { w.fake.Fail = "ThrottlingException" })
	calls := w.fake.Count("DescribeSecret")
	w.revoke(p, m)
	one := w.fake.Count("DescribeSecret") - calls // with the SDK's own tries
	calls += one
	deaths := p.Revoke(t.Context(), []providers.Ending{m.ending, m.ending, m.ending})
	for i, d := range deaths {
		if !errors.Is(d.Err, providers.ErrAway) || d.Lapsed {
			t.Errorf("%d: %+v", i, d)
		}
	}
	if n := w.fake.Count("DescribeSecret") - calls; n != one || one == 0 || len(deaths) != 3 {
		t.Errorf("%d calls for %d, and %d for one", n, len(deaths), one)
	}
}

// login stands in for the broker's identity.
type login struct{}

func (login) JWTSVID(_ context.Context, audience string) (string, time.Time, error) {
	return "svid-for-" + audience, time.Now().Add(time.Minute), nil
}

func (login) ClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return nil, errors.New("not used")
}

// TestWebIdentity: the broker logs in with its SVID, and keeps no key (I9).
func TestWebIdentity(t *testing.T) {
	w := newWorld(t)
	raw := fmt.Appendf(nil, `{"region":%q,"account":%q,"endpoint_url":%q,"sts_endpoint_url":%q,"credentials":{"method":"web_identity","role_arn":"arn:aws:iam::123456789012:role/mayfly-broker"}}`,
		fakesecrets.Region, fakesecrets.Account, w.url, w.url)
	config := providers.Config{Name: "secrets", Raw: raw, Log: slog.New(slog.DiscardHandler), Now: time.Now,
		Known: func(context.Context, bool) ([]providers.Known, error) { return nil, nil }}
	p, err := Driver{Login: login{}}.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for range 3 {
		if m := w.mint(p.(*provider), tool(`{"secret":"crm/db"}`), nil); m.err != nil {
			t.Fatal(m.err)
		}
	}
	if diff := cmp.Diff([]string{"arn:aws:iam::123456789012:role/mayfly-broker svid-for-sts.amazonaws.com"}, w.fake.Logins); diff != "" {
		t.Error(diff)
	}
	if _, err := (Driver{}).Open(t.Context(), config); err == nil {
		t.Error("it opens with nothing to log in with")
	}
}

func TestConfig(t *testing.T) {
	const good = `"region":"eu-central-1","account":"123456789012","credentials":{"method":"default"}`
	if err := (Driver{}).ValidateConfig(json.RawMessage("{" + good + "}")); err != nil {
		t.Fatal(err)
	}
	for raw, field := range map[string]string{
		`{"account":"123456789012","credentials":{"method":"default"}}`:                                                                                             "region",
		`{"region":"nowhere","account":"123456789012","credentials":{"method":"default"}}`:                                                                          "region",
		`{"region":"eu-central-1","credentials":{"method":"default"}}`:                                                                                              "account",
		`{"region":"eu-central-1","account":"123456789012"}`:                                                                                                        "credentials.method",
		`{"region":"eu-central-1","account":"123456789012","credentials":{"method":"key_file"}}`:                                                                    "credentials.method",
		`{"region":"eu-central-1","account":"123456789012","credentials":{"method":"web_identity"}}`:                                                                "credentials.role_arn",
		`{"region":"eu-central-1","account":"123456789012","credentials":{"method":"default","audience":"x"}}`:                                                      "credentials.audience",
		`{"region":"eu-central-1","account":"123456789012","credentials":{"method":"web_identity","role_arn":"arn:aws:iam::123456789012:role/x","audience":"a b"}}`: "credentials.audience",
		`{` + good + `,"endpoint_url":"http://secrets.acme.test"}`:                                                                                                  "endpoint_url",
		`{` + good + `,"endpoint_url":"https://secrets.acme.test/x"}`:                                                                                               "endpoint_url",
		`{` + good + `,"endpoint_url":"https://secrets.acme.test","use_fips_endpoint":true}`:                                                                        "endpoint_url",
		`{` + good + `,"sts_endpoint_url":"https://sts.acme.test"}`:                                                                                                 "sts_endpoint_url",
		`{` + good + `,"unknown":1}`: "unknown",
		`[]`:                         "",
	} {
		var f *providers.FieldError
		if err := (Driver{}).ValidateConfig(json.RawMessage(raw)); !errors.As(err, &f) || f.Field != field {
			t.Errorf("%s: %v, want it at %s", raw, err, field)
		}
	}
}

func TestScope(t *testing.T) {
	config := json.RawMessage(`{"region":"eu-central-1","account":"123456789012","credentials":{"method":"default"}}`)
	customer := broker.Param{Name: "customer", Type: broker.ParamString, OneOf: []string{"acme"}}
	maybe := customer
	maybe.Optional = true
	for _, test := range []struct {
		scope  string
		params []broker.Param
		field  string
	}{
		{`{}`, nil, "secret"},
		{`{"secret":"has space"}`, nil, "secret"},
		{`{"secret":"crm/*"}`, nil, "secret"},
		{`{"secret":"arn:aws:s3:::bucket"}`, nil, "secret"},
		{`{"secret":"arn:aws:secretsmanager:us-east-1:123456789012:secret:x"}`, nil, "secret"},
		{`{"secret":"arn:aws:secretsmanager:eu-central-1:999999999999:secret:x"}`, nil, "secret"},
		{`{"secret":"arn:aws:secretsmanager:eu-central-1:123456789012:secret:${params.customer}"}`, []broker.Param{customer}, "secret"},
		{`{"secret":"crm/${params.customer}"}`, nil, "secret"},
		{`{"secret":"crm/${params.customer}"}`, []broker.Param{maybe}, "secret"},
		{`{"secret":"crm/x"}`, []broker.Param{customer}, "secret"},
		{`{"secret":"crm/${other}"}`, nil, "secret"},
		{`{"secret":"x","version_id":"short"}`, nil, "version_id"},
		{`{"secret":"x","version_id":"00000000000000000000000000000001","version_stage":"AWSCURRENT"}`, nil, "version_id"},
		{`{"secret":"x","version_stage":"a b"}`, nil, "version_stage"},
		{`{"secret":"x","version_stage":"AWSPREVIOUS","rotate":true}`, nil, "rotate"},
		{`{"secret":"x","version_id":"00000000000000000000000000000001","rotate":true}`, nil, "rotate"},
		{`{"secret":"x","fields":["a b"]}`, nil, "fields[0]"},
		{`{"secret":"x","fields":["a","a"]}`, nil, "fields[1]"},
		{`{"secret":"x","rotat":true}`, nil, "rotat"},
	} {
		var f *providers.FieldError
		if _, err := (Driver{}).ValidateScope(config, tool(test.scope, test.params...)); !errors.As(err, &f) || f.Field != test.field {
			t.Errorf("%s: %v, want it at %s", test.scope, err, test.field)
		}
		if found := (Driver{}).Warnings(config, tool(test.scope, test.params...)); found != nil {
			t.Errorf("%s: %v", test.scope, found)
		}
	}
	for scope, word := range map[string]string{`{"secret":"x"}`: "cannot be revoked", `{"secret":"x","rotate":true}`: "one lease of it at a time"} {
		if found := (Driver{}).Warnings(config, tool(scope)); len(found) != 1 || found[0].Bad || !strings.Contains(found[0].Message, word) {
			t.Errorf("%s: %v", scope, found)
		}
	}
}
