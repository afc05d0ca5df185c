package awssts

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

func TestMint(t *testing.T) {
	w := newWorld(t)
	w.clock.behind = 3 * time.Second
	p := w.open()
	l := w.mint(p, 90*time.Second, "i1234567890123456789012345")
	s := w.fake.Session(l.key)
	if s.Name != string(l.req.Lease) || s.Source != awsscope.SourceIdentity(agent) || s.Role != "crm0" {
		t.Errorf("%+v", s)
	}
	if s.Tags[awsscope.TagAgent] != agent.String() || s.Tags[awsscope.TagIncident] != "i1234567890123456789012345" || s.Tags[awsscope.TagTool] != "crm.read" {
		t.Errorf("tags %v", s.Tags)
	}
	if got := s.Expires.Sub(s.Issued); got != 15*time.Minute {
		t.Errorf("AWS was asked for %s", got)
	}
	if !strings.Contains(s.Policy, awsscope.Instant(l.req.End)) {
		t.Errorf("the session does not end by itself: %s", s.Policy)
	}
	if got, _ := l.minted.Secret.Reveal(awsscope.FieldExpiration); got != awsscope.Instant(l.req.End) {
		t.Errorf("expiration %s", got)
	}
	// AWS's clock is behind ours: that much later the session dies.
	if late := l.minted.DiesAt.Sub(l.req.End); late < 3*time.Second || late > 6*time.Second {
		t.Errorf("it dies %s after its end", late)
	}
	w.clock.Set(l.req.End)
	if !w.fake.Works(l.key) {
		t.Error("AWS's clock is behind, and it is dead already")
	}
	w.clock.Set(l.minted.DiesAt)
	if w.fake.Works(l.key) {
		t.Error("it works at DiesAt")
	}
	if d := p.Confirm(t.Context(), []providers.Ending{l.ending})[0]; d.Progress != broker.ProgressVerified {
		t.Errorf("%+v", d)
	}
}

// TestLongLease: where the lease is as long as AWS lets a session live, AWS's
// expiry is the end.
func TestLongLease(t *testing.T) {
	w := newWorld(t)
	w.clock.behind = 30 * time.Second
	p := w.open()
	l := w.mint(p, time.Hour, "")
	if want := l.req.End.Add(-30 * time.Second); !l.minted.Ends.Equal(want) {
		t.Errorf("it ends at %s, AWS ends it at %s", l.minted.Ends, want)
	}
}

func TestMintRefused(t *testing.T) {
	for _, test := range []struct {
		code   string
		status int
		reason broker.Reason
		made   bool // something may have been made
		away   bool
		text   string
	}{
		{"AccessDenied", 403, broker.ReasonProviderRefused, false, false, "trust policy"},
		{"PackedPolicyTooLarge", 400, broker.ReasonProviderRefused, false, false, "the catalog's tool crm.read"},
		{"MalformedPolicyDocument", 400, broker.ReasonProviderRefused, false, false, "statements"},
		{"RegionDisabledException", 403, broker.ReasonProviderRefused, false, false, "region"},
		{"ValidationError", 400, broker.ReasonProviderRefused, false, false, "refuses"},
		{"Throttling", 400, broker.ReasonProvider, false, true, "no more requests"},
		{"ExpiredToken", 403, broker.ReasonProvider, false, true, "log in"},
		{"InternalFailure", 500, "", true, false, ""},
		{"ServiceUnavailable", 503, "", true, false, ""},
	} {
		t.Run(test.code, func(t *testing.T) {
			w := newWorld(t, faking(func(c *fakeaws.Config) { c.Fail = func(string, int) (string, int) { return test.code, test.status } }))
			_, err := w.try(w.open(), time.Minute, "")
			var told *broker.Error
			switch {
			case err == nil:
				t.Fatal("it was made")
			case test.made == errors.Is(err, providers.ErrNothingMade), test.away != errors.Is(err, providers.ErrAway):
				t.Errorf("%v", err)
			case test.made:
				return
			case !errors.As(err, &told) || told.Reason != test.reason || !strings.Contains(told.Message, test.text) || strings.Contains(told.Message, "as the test wants it"):
				t.Errorf("told %v", told)
			case (test.reason == broker.ReasonProviderRefused) != errors.Is(err, providers.ErrRefused):
				t.Errorf("%v", err)
			}
		})
	}
}

func TestMintWithoutAnswer(t *testing.T) {
	t.Run("cut after it was made", func(t *testing.T) {
		w := newWorld(t, faking(func(c *fakeaws.Config) { c.Quiet = func(action string, _ int) bool { return action == "AssumeRole" } }))
		p := w.open()
		l, err := w.try(p, time.Minute, "")
		if err == nil || errors.Is(err, providers.ErrNothingMade) {
			t.Fatalf("%v", err)
		}
		if n := w.fake.Count("AssumeRole"); n != 1 {
			t.Errorf("AssumeRole was sent %d times", n)
		}
		// What was made is denied like any other, by the handle of the plan.
		made := w.fake.Named(string(l.req.Lease))
		if len(made) != 1 || !w.fake.Works(made[0].Key) {
			t.Fatalf("%v", made)
		}
		if d := w.revoke(p, l, broker.CauseMintFailed); d.Err != nil || w.fake.Works(made[0].Key) {
			t.Errorf("%+v", d)
		}
	})
	t.Run("nobody there", func(t *testing.T) {
		w := newWorld(t)
		p := w.open()
		w.server.Close()
		if _, err := w.try(p, time.Minute, ""); !errors.Is(err, providers.ErrNothingMade) || !errors.Is(err, providers.ErrAway) {
			t.Errorf("%v", err)
		}
	})
	t.Run("late", func(t *testing.T) {
		stop := make(chan struct{})
		w := newWorld(t, faking(func(c *fakeaws.Config) { c.Hold = func(string, url.Values) { <-stop } }))
		defer close(stop)
		p := w.open()
		req := w.request(time.Minute, "")
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := p.Mint(ctx, req, nil); err == nil || errors.Is(err, providers.ErrNothingMade) || awsclient.KindOf(err) != awsclient.Late {
			t.Errorf("%v", err)
		}
	})
}

// TestRoom: no lease is made that the list could not deny beside all others.
func TestRoom(t *testing.T) {
	w := newWorld(t, roles(2))
	p := w.open()
	made, used := 0, map[string]int{}
	for {
		l, err := w.try(p, 10*time.Minute, "")
		if err != nil {
			var told *broker.Error
			if !errors.As(err, &told) || told.Reason != broker.ReasonProvider || !strings.Contains(told.Message, "deny lists") {
				t.Fatal(err)
			}
			break
		}
		used[w.fake.Session(l.key).Role]++
		made++
	}
	if made < 600 || made > 652 || used["crm0"] != used["crm1"] {
		t.Errorf("%d leases: %v", made, used)
	}
	// All of them can be ended early, one by one.
	all, _ := w.store.Known(t.Context(), false)
	var endings []providers.Ending
	for _, k := range all {
		k.Begun, k.Cause = true, broker.CauseRevoked
		w.store.put(k)
		endings = append(endings, k.Ending)
	}
	for _, d := range p.Revoke(t.Context(), endings) {
		if d.Err != nil || d.Progress != broker.ProgressWritten {
			t.Fatalf("%+v", d)
		}
	}
	if w.fake.Most() > fakeaws.Quota {
		t.Errorf("the policies had %d characters", w.fake.Most())
	}
	// A restarted broker knows how much room there is; room comes back with time.
	w.driver = New(nil)
	again := w.open()
	if _, err := w.try(again, time.Minute, ""); err == nil {
		t.Error("there was room after a restart")
	}
	w.clock.Advance(12 * time.Minute)
	if _, err := w.try(again, time.Minute, ""); err != nil {
		t.Error(err)
	}
}

// TestRoomComesBack: what was planned and not made gives its room back.
func TestRoomComesBack(t *testing.T) {
	w := newWorld(t, faking(func(c *fakeaws.Config) {
		c.Fail = func(action string, _ int) (string, int) { return "AccessDenied", 403 }
	}))
	p := w.open()
	for range 400 {
		if _, err := w.try(p, time.Minute, ""); !errors.Is(err, providers.ErrRefused) {
			t.Fatal(err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	w := newWorld(t)
	good := providers.Config{Name: "aws", Installation: installation, Raw: w.config(), Log: slog.New(slog.DiscardHandler), Now: time.Now, Known: w.store.Known}
	for name, change := range map[string]func(*providers.Config){
		"no log":          func(c *providers.Config) { c.Log = nil },
		"no clock":        func(c *providers.Config) { c.Now = nil },
		"no store":        func(c *providers.Config) { c.Known = nil },
		"no installation": func(c *providers.Config) { c.Installation = "" },
		"bad config":      func(c *providers.Config) { c.Raw = []byte(`{}`) },
		"no login": func(c *providers.Config) {
			c.Raw = []byte(`{"region":"eu-central-1","account":"123456789012","credentials":{"method":"web_identity","role_arn":"arn:aws:iam::123456789012:role/b"},"early_revoke":{"mode":"off"}}`)
		},
		"a store that fails": func(c *providers.Config) {
			c.Known = func(context.Context, bool) ([]providers.Known, error) { return nil, errors.New("no store") }
		},
	} {
		c := good
		change(&c)
		if p, err := w.driver.Open(t.Context(), c); err == nil {
			p.Close()
			t.Errorf("%s: it opened", name)
		}
	}
}

// webLogin is a broker's identity, as a source of JWT-SVIDs.
type webLogin struct {
	mu        sync.Mutex
	audiences []string
	fails     error
}

func (l *webLogin) JWTSVID(_ context.Context, audience string) (string, time.Time, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.audiences = append(l.audiences, audience)
	return "the-jwt-svid", time.Now().Add(time.Hour), l.fails
}

func (l *webLogin) ClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return nil, errors.New("there is none")
}

func TestWebIdentity(t *testing.T) {
	source := &webLogin{}
	var shown []string
	w := newWorld(t, roles(2), faking(func(c *fakeaws.Config) {
		c.Hold = func(action string, form url.Values) {
			if action == "AssumeRoleWithWebIdentity" {
				shown = append(shown, form.Get("WebIdentityToken"), form.Get("RoleArn"))
			}
		}
	}))
	w.driver = New(source)
	raw := strings.ReplaceAll(string(w.config()), `"method":"key_file"`, `"method":"web_identity","audience":"aws.acme.test","role_arn":"`+arn("crm1")+`"`)
	raw = regexp.MustCompile(`,"key_file":"[^"]*"`).ReplaceAllString(raw, "")
	open := func() *provider {
		p, err := w.driver.Open(t.Context(), providers.Config{Name: "aws", Installation: installation, Raw: []byte(raw), Log: slog.New(slog.DiscardHandler), Now: w.clock.Now, Known: w.store.Known})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p.(*provider)
	}
	p := open()
	w.mint(p, time.Minute, "")
	w.mint(p, time.Minute, "")
	if len(shown) != 2 || shown[0] != "the-jwt-svid" || shown[1] != arn("crm1") || len(source.audiences) != 1 || source.audiences[0] != "aws.acme.test" {
		t.Errorf("logged in with %q for %q", shown, source.audiences)
	}
	source.fails = errors.New("no Workload API")
	if _, err := w.try(open(), time.Minute, ""); !errors.Is(err, providers.ErrAway) || !errors.Is(err, providers.ErrNothingMade) || awsclient.KindOf(err) != awsclient.Login {
		t.Errorf("%v", err)
	}
}
