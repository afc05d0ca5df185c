package proxy

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// upstream is a server that counts what it did.
type upstream struct {
	*httptest.Server
	acted atomic.Int64
	hold  chan struct{} // nil: it answers at once
	gone  chan struct{} // gets a value when a caller left before the answer
}

func newUpstream(t *testing.T) *upstream {
	u := &upstream{gone: make(chan struct{}, 8)}
	u.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if u.hold != nil {
			select {
			case <-u.hold:
			case <-r.Context().Done():
				u.gone <- struct{}{}
				return
			}
		}
		u.acted.Add(1)
		switch {
		case isCreate(r):
			var ask struct {
				Meta map[string]string `json:"meta"`
			}
			_ = json.Unmarshal(body, &ask)
			_, _ = io.WriteString(w, `{"auth":{"client_token":"t-`+ask.Meta["mayfly_lease"]+`"}}`)
		case isRead(r):
			_, _ = io.WriteString(w, `{"lease_id":"database/creds/x/1","data":{"username":"mf_u","password":"p"}}`)
		default:
			_, _ = io.WriteString(w, `{"data":{"long":"`+strings.Repeat("x", 4000)+`"}}`)
		}
	}))
	t.Cleanup(u.Close)
	return u
}

func start(t *testing.T, target string, rates ...Rate) *Proxy {
	t.Helper()
	p, err := New(Config{Target: target, Seed: 1, Rates: rates})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func get(t *testing.T, url string, header ...string) (status int, body string, err error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

// TestFaults: each fault does what it says, to the caller and to the server.
func TestFaults(t *testing.T) {
	for _, c := range []struct {
		fault  Fault
		acted  int64
		status int  // of the answer; 0: there is none
		whole  bool // the answer came whole
	}{
		{None, 1, 200, true},
		{Delay, 1, 200, true},
		{Stall, 1, 200, true},
		{DropBefore, 0, 0, false},
		{DropAfter, 1, 0, false},
		{Duplicate, 2, 200, true},
		{ErrorAfter, 1, 500, true}, // or 502
		{Cut, 1, 200, false},
	} {
		t.Run(string(c.fault), func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			var rates []Rate
			if c.fault != None {
				rates = []Rate{{c.fault, 100}}
			}
			p := start(t, u.URL, rates...)
			status, body, err := get(t, p.Addr()+"/v1/sys/health")
			if (err == nil) != c.whole {
				t.Errorf("the caller saw %v", err)
			}
			if status != c.status && !(c.fault == ErrorAfter && status == 502) {
				t.Errorf("the caller saw status %d", status)
			}
			if c.whole && c.status == 200 && len(body) < 4000 {
				t.Errorf("the caller got %d bytes", len(body))
			}
			// What comes twice may come after the first answer; Close would keep it away.
			for deadline := time.Now().Add(10 * time.Second); u.acted.Load() < c.acted && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			p.Close()
			if got := u.acted.Load(); got != c.acted {
				t.Errorf("the server acted %d times", got)
			}
			if c.fault != None && p.Faults()[c.fault] != 1 {
				t.Errorf("counted %v", p.Faults())
			}
		})
	}
}

// TestCallerGone: the server sees that the broker died, as over a real network.
func TestCallerGone(t *testing.T) {
	u := newUpstream(t)
	u.hold = make(chan struct{})
	p := start(t, u.URL)
	client := &http.Client{Timeout: 100 * time.Millisecond}
	if _, err := client.Get(p.Addr() + "/v1/database/creds/x"); err == nil {
		t.Fatal("there was an answer")
	}
	select {
	case <-u.gone:
	case <-time.After(10 * time.Second):
		t.Fatal("the server was not told that the caller left")
	}
}

// TestStallOutlivesCaller: what is held comes although the broker is dead.
func TestStallOutlivesCaller(t *testing.T) {
	u := newUpstream(t)
	p := start(t, u.URL, Rate{Stall, 100})
	client := &http.Client{Timeout: 100 * time.Millisecond}
	if _, err := client.Get(p.Addr() + "/v1/database/creds/x"); err == nil {
		t.Fatal("there was an answer")
	}
	for deadline := time.Now().Add(10 * time.Second); u.acted.Load() == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the request never came")
		}
	}
}

func TestServerAway(t *testing.T) {
	u := newUpstream(t)
	p := start(t, u.URL)
	u.Close()
	if _, _, err := get(t, p.Addr()+"/v1/sys/health"); err == nil {
		t.Error("a server that is away answered")
	}
}

func TestQuietAndSeed(t *testing.T) {
	u := newUpstream(t)
	draw := func(seed uint64) string {
		p, err := New(Config{Target: u.URL, Seed: seed, Rates: DefaultRates()})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		var drawn []string
		for range 400 {
			drawn = append(drawn, string(p.plan().fault))
		}
		p.Quiet(true)
		for range 400 {
			if f := p.plan().fault; f != None {
				t.Fatalf("%s happened although the proxy is quiet", f)
			}
		}
		return strings.Join(drawn, " ")
	}
	if first, again := draw(1), draw(1); first != again {
		t.Error("one seed draws two ways")
	}
	if draw(1) == draw(2) {
		t.Error("two seeds draw the same")
	}
}

// TestSightings: a mint is under way from the request for its token to the
// answer of its credential.
func TestSightings(t *testing.T) {
	u := newUpstream(t)
	p := start(t, u.URL)
	post := func(lease string) error {
		res, err := http.Post(p.Addr()+"/v1/auth/token/create/mayfly-crm", "application/json",
			strings.NewReader(`{"meta":{"mayfly_lease":"`+lease+`"}}`))
		if err != nil {
			return err
		}
		return res.Body.Close()
	}
	if err := errors.Join(post("l1"), post("l2")); err != nil {
		t.Fatal(err)
	}
	if n := p.Minting(); n != 2 {
		t.Errorf("%d attempts are under way", n)
	}
	if p.Told("mf_u") {
		t.Error("a name is known that was never told")
	}
	if _, _, err := get(t, p.Addr()+"/v1/database/creds/x", "X-Vault-Token", "t-l1"); err != nil {
		t.Fatal(err)
	}
	if n := p.Minting(); n != 1 {
		t.Errorf("%d attempts are under way after one was answered", n)
	}
	if !p.Told("mf_u") || p.VaultLease("l1") != "database/creds/x/1" || p.Doubled("l1") {
		t.Errorf("told %t, Vault's lease %q, doubled %t", p.Told("mf_u"), p.VaultLease("l1"), p.Doubled("l1"))
	}
	p.Gone()
	if n := p.Minting(); n != 0 {
		t.Errorf("%d attempts are under way after the broker's death", n)
	}
}
