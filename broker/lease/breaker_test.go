package lease

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

func TestResultOf(t *testing.T) {
	own := broker.Refuse(broker.ReasonInvalidArgument, "connect with a certificate", "do")
	for _, c := range []struct {
		err  error
		want result
	}{
		{nil, worked},
		{errors.New("cut"), unknown},
		{providers.ErrAway, away},
		{fmt.Errorf("%w: %w", providers.ErrNothingMade, providers.ErrAway), away},
		{fmt.Errorf("%w: %w: %w", providers.ErrNothingMade, providers.ErrRefused, providers.ErrAway), away},
		{fmt.Errorf("%w: %w", providers.ErrNothingMade, providers.ErrRefused), answered},
		{fmt.Errorf("%w: %w", providers.ErrNothingMade, own), ownWord},
		{own, unknown},
		{fmt.Errorf("%w: not sent", providers.ErrNothingMade), nothing},
		{errLeft, unknown},
	} {
		if got := resultOf(c.err); got != c.want {
			t.Errorf("resultOf(%v) = %d; want %d", c.err, got, c.want)
		}
	}
}

// TestBreaker plays attempts, each with what is to be known after it.
func TestBreaker(t *testing.T) {
	type step struct {
		after   time.Duration // since the last
		result  result
		refused bool
		open    bool
	}
	for name, steps := range map[string][]step{
		"one that says it is away": {{0, away, false, true}, {0, worked, true, true}, {time.Second, worked, false, false}, {0, worked, false, false}},
		"unknown in a row":         {{0, unknown, false, false}, {0, unknown, false, false}, {0, unknown, false, false}, {0, unknown, false, false}, {0, unknown, false, true}},
		"unknown now and then": {{0, unknown, false, false}, {0, unknown, false, false}, {0, unknown, false, false}, {0, unknown, false, false}, {0, worked, false, false},
			{0, unknown, false, false}, {0, unknown, false, false}, {0, unknown, false, false}, {0, unknown, false, false}},
		"a refusal says nothing": {{0, answered, false, false}, {0, answered, false, false}, {0, answered, false, false}, {0, answered, false, false}, {0, answered, false, false}, {0, nothing, false, false}},
		"a refusal is an answer": {{0, away, false, true}, {time.Second, answered, false, false}},
		"tries in vain": {{0, away, false, true}, {time.Second, away, false, true}, {time.Second, worked, true, true}, {time.Second, unknown, false, true},
			{2 * time.Second, worked, true, true}, {2 * time.Second, nothing, false, true}, {7 * time.Second, worked, true, true}, {time.Second, worked, false, false}},
		"what asked nobody finds out nothing": {{0, away, false, true}, {time.Second, ownWord, false, true}, {0, worked, false, false}},
	} {
		t.Run(name, func(t *testing.T) {
			var b breaker
			now := time.Unix(0, 0)
			for i, s := range steps {
				now = now.Add(s.after)
				ok, probe := b.begin(now)
				if ok == s.refused {
					t.Fatalf("step %d: refused %v; want %v", i, !ok, s.refused)
				}
				if ok {
					if probe && !b.refuses(now.Add(time.Hour)) {
						t.Errorf("step %d: while one finds out, another may begin", i)
					}
					b.end(s.result, probe, now, 1)
				}
				if b.open() != s.open {
					t.Fatalf("step %d: open %v; want %v", i, b.open(), s.open)
				}
			}
		})
	}
}

// TestBreakerHearsTheLate: attempts that began before it opened tell nothing
// new when they fail, and close it when they succeed.
func TestBreakerHearsTheLate(t *testing.T) {
	var b breaker
	now := time.Unix(0, 0)
	b.end(away, false, now, 1)
	next := b.next
	for range 10 {
		b.end(unknown, false, now, 1)
	}
	if b.next != next {
		t.Error("it is tried later for attempts of before")
	}
	b.hint(now)
	if b.refuses(now) {
		t.Error("the provider answers elsewhere, and nothing is tried")
	}
	b.end(worked, false, now, 1)
	if b.open() {
		t.Error("an attempt succeeded, and it is open")
	}
}

func TestJittered(t *testing.T) {
	for tries := range 100 {
		least, most := jittered(time.Second, 5*time.Second, tries, 0), jittered(time.Second, 5*time.Second, tries, 1)
		if want := min(time.Second<<min(tries, 10), 5*time.Second); least != 500*time.Millisecond || most != want {
			t.Errorf("after %d tries: %s to %s; want 500ms to %s", tries, least, most, want)
		}
	}
}

func TestTrouble(t *testing.T) {
	var tr trouble
	now := time.Unix(0, 0)
	fail := func(away, fresh bool, spell int) bool {
		return tr.failed(away, fresh, spell, time.Second, now, 1)
	}
	for range 10 {
		fail(false, false, 0) // those that failed before tell nothing of the rest
	}
	if fail(false, true, 0); tr.in() {
		t.Error("one failure is trouble")
	}
	if over, _ := tr.ended(0); over {
		t.Error("what never began is over")
	}
	fail(false, true, 0)
	fail(false, true, 0)
	if !fail(false, true, 0) || !tr.in() || tr.away || !tr.until.After(now) {
		t.Errorf("three in a row: %+v", tr)
	}
	if over, _ := tr.ended(0); over {
		t.Error("an answer of before the trouble ended it")
	}
	until := tr.until
	if fail(true, true, 0) || tr.until != until {
		t.Error("a failure of before the trouble counts")
	}
	if fail(true, false, 1) || !tr.away {
		t.Error("it says that it is away, and is not believed")
	}
	if over, wasAway := tr.ended(1); !over || !wasAway || tr.in() || tr.until.After(now) {
		t.Errorf("after the answer: %+v", tr)
	}
	if !fail(true, true, 2) {
		t.Error("one that says it is away is in trouble at once")
	}
}
