package server_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers/providertest"
)

// hold makes the outside system keep every creation until ReleaseLate.
func (r *rig) hold() {
	r.world.SetScript(providertest.Rules(1, providertest.Rule{Op: providertest.OpCreate, Fault: providertest.Fault{Held: true}}))
}

// issuing asks for a lease in the background and returns when the provider has
// been asked for it.
func (c *client) issuing() <-chan answer {
	c.r.t.Helper()
	answers := make(chan answer, 1)
	go func() {
		a, err := c.try(request(c.r.t, "POST", c.base()+"/mayfly.v1."+issue, "application/json", strings.NewReader(`{"tool": "db.read"}`)))
		if err != nil {
			a.message = err.Error()
		}
		answers <- a
	}()
	if err := c.r.world.AwaitPending(bounded(c.r.t)); err != nil {
		c.r.t.Fatal(err)
	}
	return answers
}

// TestRequestsAtOnce: where as many requests are under way as may be, the next
// is refused at once, by a reason of its own and without the connection's end.
func TestRequestsAtOnce(t *testing.T) {
	r := newRig(t, func(r *rig) { r.limits.Requests = 1 })
	r.grant(support, "db.read")
	r.hold()
	first := r.client(support).issuing()
	for _, protocol := range protocols {
		r.clientWith(svid(t, r.trust, other), protocol).post("AccessService/WhoAmI", "{}").wantRefused(t, protocol, 429, broker.ReasonRateLimited)
	}
	waiting := r.client(other)
	waiting.post("AccessService/WhoAmI", "{}").wantRefused(t, "the first", 429, broker.ReasonRateLimited)
	if a := waiting.post("AccessService/WhoAmI", "{}"); a.status != 429 || !a.reused {
		t.Errorf("the refusal ended the connection: %d, reused: %t", a.status, a.reused)
	}
	r.world.ReleaseLate()
	if a := <-first; a.status != 200 {
		t.Errorf("the request under way: %d %s %s", a.status, a.body, a.message)
	}
	if a := waiting.post("AccessService/WhoAmI", "{}"); a.status != 200 {
		t.Errorf("after it: %d %s", a.status, a.body)
	}
}

// TestGracefulShutdown: a request under way is carried through, with its lease,
// while nobody new is let in.
func TestGracefulShutdown(t *testing.T) {
	t.Parallel()
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			r := newRig(t)
			r.grant(support, "db.read")
			r.hold()
			answers := r.clientWith(svid(t, r.trust, support), protocol).issuing()
			stopped := make(chan error, 1)
			go func() { stopped <- r.server.Shutdown(bounded(t)) }()
			for ctx := bounded(t); ; {
				conn, err := new(net.Dialer).DialContext(ctx, "tcp", r.addr)
				if err != nil {
					break // nobody new is let in
				}
				conn.Close()
			}
			select {
			case err := <-stopped:
				t.Fatalf("Shutdown did not wait: %v", err)
			default:
			}
			r.world.ReleaseLate()
			a := <-answers
			if a.status != 200 {
				t.Fatalf("the request under way: %d %s %s", a.status, a.body, a.message)
			}
			if err := <-stopped; err != nil {
				t.Errorf("Shutdown: %v", err)
			}
			live := r.world.Live()
			if len(live) != 1 || !strings.Contains(string(a.body), live[0].Secret) {
				t.Fatalf("there are %d credentials, and the answer was %s", len(live), a.body)
			}
			r.stop()
			r.start()
			if !r.client(support).stillActive(string(live[0].Lease())) {
				t.Error("the lease is not active after the restart")
			}
		})
	}
}

// TestShutdownHasAnEnd: what does not finish is cut off.
func TestShutdownHasAnEnd(t *testing.T) {
	r := newRig(t)
	r.grant(support, "db.read")
	r.hold()
	answers := r.client(support).issuing()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.server.Shutdown(ctx); err == nil {
		t.Error("Shutdown did not tell that it cut a request off")
	}
	if a := <-answers; a.status == 200 {
		t.Errorf("the request was answered: %s", a.body)
	}
	r.world.ReleaseLate()
}

// TestHeaderLimit: large headers are refused by either side of the connection.
func TestHeaderLimit(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.grant(support, "db.read")
	for _, protocol := range protocols {
		c := r.clientWith(svid(t, r.trust, support), protocol)
		if a := c.post("AccessService/WhoAmI", "{}"); a.status != 200 {
			t.Fatalf("%s: %d", protocol, a.status)
		}
		req := request(t, "POST", c.base()+"/mayfly.v1.AccessService/WhoAmI", "application/json", strings.NewReader("{}"))
		req.Header.Set("X-Large", strings.Repeat("x", 40_000))
		a, err := c.try(req)
		if protocol == "HTTP/1.1" && err != nil {
			t.Errorf("%s: %v", protocol, err)
		}
		if err == nil && a.status != http.StatusRequestHeaderFieldsTooLarge { // over HTTP/2 the client knows the limit
			t.Errorf("%s: %d %s", protocol, a.status, a.body)
		}
	}
}

// TestSlowCallers: who sends slowly, or nothing, is not waited for, whether it
// stops in the TLS handshake, the header or the body.
func TestSlowCallers(t *testing.T) {
	t.Parallel()
	const limit = 200 * time.Millisecond
	r := newRig(t, func(r *rig) { r.limits.ReadTimeout, r.limits.IdleTimeout = limit, limit })
	r.grant(support, "db.read")
	before := r.contents()
	const head = "POST /mayfly.v1.AccessService/IssueLease HTTP/1.1\r\nHost: mayfly\r\nContent-Type: application/json\r\n"
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	cases := map[string]struct {
		bytes string
		plain bool // before the TLS handshake
	}{
		"nothing at all":          {plain: true},
		"no TLS":                  {plain: true, bytes: "\x16\x03"},
		"nothing after TLS":       {},
		"half a header":           {bytes: head},
		"half a body":             {bytes: head + "Content-Length: 20\r\n\r\n{\"tool\": "},
		"half a chunk":            {bytes: head + "Transfer-Encoding: chunked\r\n\r\n14\r\n{\"tool\": "},
		"HTTP/2 without settings": {bytes: preface},
	}
	var slow sync.WaitGroup
	for name, send := range cases {
		config := r.clientWith(svid(t, r.trust, support), "HTTP/1.1").tls
		config.NextProtos = []string{"http/1.1"}
		if send.bytes == preface {
			config.NextProtos = []string{"h2"}
		}
		if send.plain {
			config = nil
		}
		slow.Go(func() { r.sendSlowly(name, send.bytes, config) })
	}
	slow.Wait()
	r.wantNothingStored("slow callers", before)
}

// sendSlowly sends some bytes, no more, and waits for the server to hang up.
func (r *rig) sendSlowly(name, bytes string, config *tls.Config) {
	conn, err := net.Dial("tcp", r.addr)
	if err != nil {
		r.t.Error(err)
		return
	}
	defer conn.Close()
	if config != nil {
		conn = tls.Client(conn, config)
	}
	if _, err := io.WriteString(conn, bytes); err != nil {
		r.t.Errorf("%s: %v", name, err)
		return
	}
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		r.t.Error(err)
		return
	}
	answer, err := io.ReadAll(bufio.NewReader(conn))
	if e, ok := err.(net.Error); ok && e.Timeout() {
		r.t.Errorf("%s: the connection stayed open", name)
	}
	if text := string(answer); strings.Contains(text, "HTTP/1.1 200") || strings.Contains(text, "internal") || strings.Contains(text, "127.0.0.1") {
		r.t.Errorf("%s: answered %s", name, answer)
	}
}

// TestConnectionsAtOnce: one connection more than may be is not served before
// another ends.
func TestConnectionsAtOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(r *rig) { r.limits.Connections = 1 })
	r.grant(support, "db.read")
	first := r.client(support)
	if a := first.post("AccessService/WhoAmI", "{}"); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	conn, err := net.Dial("tcp", r.addr) // the kernel takes it
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	err = tls.Client(conn, r.client(other).tls).Handshake()
	if e, ok := err.(net.Error); !ok || !e.Timeout() {
		t.Fatalf("the second connection was served beside the first: %v", err)
	}
	conn.Close()
	if a := first.post("AccessService/WhoAmI", "{}"); a.status != 200 || !a.reused {
		t.Fatalf("%d %s", a.status, a.body)
	}
	first.transport.CloseIdleConnections()
	if err := r.client(other).whoami(bounded(t)); err != nil {
		t.Errorf("the second connection, when the first had ended: %v", err)
	}
}

// TestBodyLimit: what is exactly as long as may be is taken, and not a byte more.
func TestBodyLimit(t *testing.T) {
	r := newRig(t)
	agent := r.client(support)
	for size, status := range map[int]int{64 << 10: 200, 64<<10 + 1: 429} {
		for how, body := range map[string]io.Reader{
			"with its length": strings.NewReader("{}" + strings.Repeat(" ", size-2)),
			"in chunks":       struct{ io.Reader }{strings.NewReader("{}" + strings.Repeat(" ", size-2))},
		} {
			a := agent.send(request(t, "POST", agent.base()+"/mayfly.v1.AccessService/WhoAmI", "application/json", body))
			if a.status != status {
				t.Errorf("%d bytes %s: %d %s", size, how, a.status, a.body)
			}
		}
	}
}
