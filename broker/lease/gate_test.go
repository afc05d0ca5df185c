package lease

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-security/mayfly/providers"
)

func testGate() *gate {
	return &gate{provider: "p", log: slog.New(slog.DiscardHandler), left: map[string]int{}, byTool: map[string]int{}, tools: map[string]*breaker{}}
}

// TestOneToolHasHalfThePlaces: a tool whose system hangs fills its half, and
// the next of another tool need not wait.
func TestOneToolHasHalfThePlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGate()
		enter := func(tool string) (*place, error) {
			return g.enter(t.Context(), tool, 4, 2*time.Second, time.Now)
		}
		var hung []*place
		for range 2 {
			p, err := enter("hangs")
			if err != nil {
				t.Fatal(err)
			}
			hung = append(hung, p)
		}
		began := time.Now()
		if _, err := enter("hangs"); err == nil || time.Since(began) != 2*time.Second {
			t.Errorf("a third of the tool that hangs: %v after %s", err, time.Since(began))
		}
		// One waits for the tool that hangs; others go past it.
		waited := make(chan error, 1)
		go func() {
			p, err := enter("hangs")
			if err == nil {
				defer p.leave()
			}
			waited <- err
		}()
		synctest.Wait()
		began = time.Now()
		for range 2 {
			p, err := enter("works")
			if err != nil {
				t.Fatal(err)
			}
			defer p.leave()
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the tool that works waited for %s", took)
		}
		hung[0].leave()
		if err := <-waited; err != nil {
			t.Errorf("the one who waited: %v", err)
		}
		hung[1].leave()
	})
}

// TestUnknownOutcomesAreTheTools: what is behind one tool fails, and only that
// tool is refused; the provider being away is everybody's matter.
func TestUnknownOutcomesAreTheTools(t *testing.T) {
	g := testGate()
	now := time.Now()
	at := func() time.Time { return now }
	attempt := func(tool string, err error) error {
		p, refusal := g.enter(context.Background(), tool, 4, time.Second, at)
		if refusal != nil {
			return refusal
		}
		p.ended(resultOf(err), err, now)
		p.leave()
		return nil
	}
	for range breakAfter {
		if err := attempt("hangs", errors.New("cut")); err != nil {
			t.Fatal(err)
		}
	}
	if attempt("hangs", nil) == nil {
		t.Error("the tool is still asked for")
	}
	// Its probes fail, and take nothing from the other tool.
	for range 3 {
		now = now.Add(probeLongest)
		if err := attempt("hangs", errors.New("cut")); err != nil {
			t.Errorf("the probe: %v", err)
		}
		if err := attempt("works", nil); err != nil {
			t.Errorf("the other tool: %v", err)
		}
	}
	now = now.Add(probeLongest)
	if err := attempt("hangs", nil); err != nil {
		t.Errorf("the probe: %v", err)
	}
	if err := attempt("hangs", nil); err != nil {
		t.Errorf("after it worked: %v", err)
	}
	if err := attempt("works", errors.Join(providers.ErrNothingMade, providers.ErrAway)); err != nil {
		t.Fatal(err)
	}
	if attempt("works", nil) == nil || attempt("hangs", nil) == nil {
		t.Error("a provider that is away is still asked")
	}
}
