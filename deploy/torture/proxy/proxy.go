// Package proxy stands between the broker and a real Vault and does what
// networks do: it delays, drops, repeats and cuts, before and after Vault has
// acted, and answers errors for what has been done. A seed decides which.
//
// It also sees which attempts to mint are under way, and which credentials
// Vault made and told of.
package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Fault is what happens to one request.
type Fault string

// The faults.
const (
	None       Fault = ""
	Delay      Fault = "delay"       // it comes later
	Stall      Fault = "stall"       // it is held for seconds, and comes even if the broker is gone by then
	DropBefore Fault = "drop_before" // the connection breaks, and Vault never hears of it
	DropAfter  Fault = "drop_after"  // Vault has acted, and the connection breaks
	Duplicate  Fault = "duplicate"   // it comes twice at once; the first answer counts
	ErrorAfter Fault = "error_after" // Vault has acted, and the answer is 500 or 502
	Cut        Fault = "cut"         // Vault has acted, and the answer breaks off
)

// Rate says how often a fault happens.
type Rate struct {
	Fault   Fault
	Percent float64
}

// DefaultRates is what a torture uses unless told otherwise.
func DefaultRates() []Rate {
	return []Rate{{Delay, 8}, {Stall, 0.5}, {DropBefore, 0.7}, {DropAfter, 1}, {Duplicate, 1}, {ErrorAfter, 1}, {Cut, 0.7}}
}

const (
	maxBody  = 8 << 20 // of a request or an answer, in bytes
	maxDelay = 250 * time.Millisecond
	// MaxStall is the longest that a request is held.
	MaxStall = 2500 * time.Millisecond
)

// Config is what a Proxy is made of.
type Config struct {
	Target string // required: where the real server is, "http://127.0.0.1:8200"
	Seed   uint64
	Rates  []Rate // nil: no faults
	// Saw is told of each request that came to an end, for the history; nil
	// means that nobody wants to know.
	Saw func(Request)
}

// Request is one request that came to an end.
type Request struct {
	Method, Path string
	Fault        Fault
	Status       int // of the real server's answer; 0 if it gave none
	Took         time.Duration
	Lease        string // the lease that it was made for; empty if that is not known
	Err          error  // why there was no answer
}

// Proxy is running. Its methods may be called from many goroutines.
type Proxy struct {
	cfg    Config
	target *url.URL
	addr   string
	srv    *http.Server
	real   *http.Transport
	served chan struct{}
	late   sync.WaitGroup // requests that outlive their caller
	ctx    context.Context
	cancel context.CancelFunc
	quiet  atomic.Bool

	mu     sync.Mutex
	rng    *rand.Rand
	counts map[Fault]int
	seen   *sightings
}

// New starts a proxy on a free port of the loopback interface.
func New(cfg Config) (*Proxy, error) {
	target, err := url.Parse(cfg.Target)
	if err != nil || target.Host == "" {
		return nil, fmt.Errorf("%q is no address of a server: %w", cfg.Target, err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listening for the broker: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &Proxy{
		cfg: cfg, target: target, addr: "http://" + l.Addr().String(), served: make(chan struct{}),
		// Each request has its own connection: one that breaks takes no other
		// with it, and nothing is sent twice but by us.
		real: &http.Transport{DisableKeepAlives: true, DisableCompression: true},
		ctx:  ctx, cancel: cancel,
		rng: rand.New(rand.NewPCG(cfg.Seed, 0x70726f7879)), counts: map[Fault]int{}, seen: newSightings(),
	}
	p.srv = &http.Server{Handler: p, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(p.served)
		_ = p.srv.Serve(l) // it ends when Close is called, and with nothing to tell
	}()
	return p, nil
}

// Addr is where the broker finds the proxy, "http://127.0.0.1:port".
func (p *Proxy) Addr() string { return p.addr }

// Quiet turns all faults off, or on again.
func (p *Proxy) Quiet(on bool) { p.quiet.Store(on) }

// Faults are how many of each there were.
func (p *Proxy) Faults() map[Fault]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	counts := make(map[Fault]int, len(p.counts))
	for f, n := range p.counts {
		counts[f] = n
	}
	return counts
}

// Close ends everything under way.
func (p *Proxy) Close() {
	p.cancel()
	_ = p.srv.Close()
	<-p.served
	p.late.Wait()
	p.real.CloseIdleConnections()
}

// plan is what is to happen to one request, decided in one place so that the
// seed decides it.
type plan struct {
	fault  Fault
	pause  time.Duration
	status int
	cut    float64
}

func (p *Proxy) plan() plan {
	p.mu.Lock()
	defer p.mu.Unlock()
	roll, size, coin := p.rng.Float64()*100, p.rng.Float64(), p.rng.IntN(2)
	if p.quiet.Load() {
		return plan{}
	}
	for _, r := range p.cfg.Rates {
		if roll -= r.Percent; roll >= 0 {
			continue
		}
		p.counts[r.Fault]++
		pl := plan{fault: r.Fault, status: []int{500, 502}[coin], cut: size}
		switch r.Fault {
		case Delay:
			pl.pause = time.Duration(size * float64(maxDelay))
		case Stall:
			pl.pause = time.Second + time.Duration(size*float64(MaxStall-time.Second))
		}
		return pl
	}
	return plan{}
}

// answer is what the real server said, whole.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// ServeHTTP carries one request through.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	if err != nil {
		return // the broker is gone
	}
	pl := p.plan()
	lease := p.seen.began(r, body)
	a, err := p.carry(r, body, pl, lease)
	if p.cfg.Saw != nil {
		q := Request{Method: r.Method, Path: r.URL.Path, Fault: pl.fault, Took: time.Since(began), Lease: lease, Err: err}
		if a != nil {
			q.Status = a.status
		}
		p.cfg.Saw(q)
	}
	switch {
	case a == nil, pl.fault == DropAfter:
		hangUp(w)
	case pl.fault == ErrorAfter:
		w.WriteHeader(pl.status)
		_, _ = io.WriteString(w, `{"errors":["the proxy says so"]}`)
	default:
		for k, v := range a.header {
			w.Header()[k] = v
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
		w.WriteHeader(a.status)
		if pl.fault == Cut && len(a.body) > 0 {
			_, _ = w.Write(a.body[:int(pl.cut*float64(len(a.body)))])
			_ = http.NewResponseController(w).Flush()
			hangUp(w)
			return
		}
		_, _ = w.Write(a.body)
	}
}

// carry brings the request to the real server, as the plan says.
func (p *Proxy) carry(r *http.Request, body []byte, pl plan, lease string) (*answer, error) {
	ctx := r.Context() // a broker that dies breaks its connection, and Vault sees that
	if pl.fault == Stall {
		ctx = p.ctx
	}
	if pl.pause > 0 {
		select {
		case <-time.After(pl.pause):
		case <-ctx.Done():
			p.seen.over(r, lease, nil)
			return nil, ctx.Err()
		}
	}
	switch pl.fault {
	case DropBefore:
		p.seen.over(r, lease, nil)
		return nil, errors.New("dropped")
	case Duplicate:
		if isRead(r) {
			p.seen.doubled(lease)
		}
		p.late.Go(func() {
			if a, err := p.send(p.ctx, r, body); err == nil {
				p.seen.told(r, lease, a)
			}
		})
		a, err := p.send(ctx, r, body)
		p.seen.over(r, lease, a)
		return a, err
	}
	a, err := p.send(ctx, r, body)
	p.seen.over(r, lease, a)
	return a, err
}

// send makes one request of the real server and reads its whole answer.
func (p *Proxy) send(ctx context.Context, r *http.Request, body []byte) (*answer, error) {
	u := *r.URL
	u.Scheme, u.Host = p.target.Scheme, p.target.Host
	req, err := http.NewRequestWithContext(ctx, r.Method, u.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = r.Header.Clone()
	req.Header.Del("Connection")
	res, err := p.real.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	a := &answer{status: res.StatusCode, header: res.Header.Clone()}
	a.header.Del("Connection")
	a.header.Del("Transfer-Encoding")
	if a.body, err = io.ReadAll(io.LimitReader(res.Body, maxBody)); err != nil {
		return nil, err
	}
	return a, nil
}

// hangUp breaks the connection, with a reset where the system lets us.
func hangUp(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // part of an answer was written: net/http breaks the connection
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	conn.Close()
}
