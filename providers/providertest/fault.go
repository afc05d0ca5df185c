package providertest

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Op is one kind of request to a System.
type Op string

// The requests.
const (
	OpSession Op = "session" // open an inert session (mode Recorded only)
	OpCreate  Op = "create"  // create a credential
	OpEnd     Op = "end"     // end credentials
	OpStatus  Op = "status"  // look whether credentials are dead
)

// Call is one request, as a Script sees it.
type Call struct {
	Op    Op
	N     int      // this is the Nth request of its Op, from 1
	Names []string // what it is about: external names, or accessors for OpEnd and OpStatus in mode Recorded
}

// Fault says how a System treats one request. The zero Fault is none.
type Fault struct {
	// Delay is a slow answer: the System waits before it acts. A caller that
	// leaves meanwhile leaves nothing behind.
	Delay time.Duration
	// Deaf is a slow answer that nobody can wait out: the System waits before it
	// acts, and the caller waits with it whatever its time limit says.
	Deaf time.Duration
	// Late is a late commit: the request is accepted, and acted upon after so
	// long even if its caller has left or was killed. A caller that is still
	// there gets its answer then.
	Late time.Duration
	// Held is Late without a time: it is acted upon at ReleaseLate.
	Held bool
	// Effect is what is done, and what is said of it.
	Effect Effect
}

// Effect is what a System does with a request, and what it says of it.
type Effect int

// The effects.
const (
	Act         Effect = iota // act, and say so
	FailBefore                // do nothing and answer an error that does not tell so
	ActThenFail               // act, and answer the same error: a lie
	ActThenCut                // act, and cut the connection
	Duplicate                 // act twice, as if a proxy had repeated the request; the answer is the second's
	Refuse                    // do nothing, and say definitely no
	Away                      // do nothing, and say that nothing is done for anybody now
)

func (e Effect) String() string {
	return [...]string{"act", "fail before", "act then fail", "act then cut", "duplicate", "refuse", "away"}[e]
}

// Script decides the Fault of each request. A System calls it for one request
// at a time, and it must not call the System's SetScript, ReleaseLate or
// Pending. A nil Script means no faults.
type Script func(Call) Fault

// Rule is one line of a Script that Rules makes. Every condition must hold.
type Rule struct {
	Op          Op      // empty means any
	N           int     // only the Nth request of its Op; 0 means any
	Name        string  // only requests about this name; empty means any
	Probability float64 // with this probability; 0 means always
	Times       int     // at most so often; 0 means any number
	Fault       Fault
}

// Rules makes a Script of rules: the first that applies decides. seed decides
// what has a probability, so that a run can be repeated.
func Rules(seed uint64, rules ...Rule) Script {
	random := rand.New(rand.NewPCG(seed, seed))
	used := make([]int, len(rules))
	return func(c Call) Fault {
		for i, r := range rules {
			if r.Op != "" && r.Op != c.Op || r.N != 0 && r.N != c.N ||
				r.Name != "" && !slices.Contains(c.Names, r.Name) ||
				r.Times != 0 && used[i] >= r.Times ||
				r.Probability != 0 && random.Float64() >= r.Probability {
				continue
			}
			used[i]++
			return r.Fault
		}
		return Fault{}
	}
}

// What a request can come to besides success. Only errRefused and errAway are
// certain to have done nothing.
var (
	errAway    = errors.New("the outside system is away")
	errRefused = errors.New("the outside system refused")
	errFailed  = errors.New("the outside system answered an error")
	errCut     = errors.New("the connection was cut")
)

// faults applies a Script to requests.
type faults struct {
	mu     sync.Mutex
	script Script
	calls  map[Op]int
	held   []func()
	late   int           // late commits that are still to come, held ones included
	came   chan struct{} // closed, and replaced, when there is one more
}

func (f *faults) next(op Op, names []string) Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[op]++
	if f.script == nil {
		return Fault{}
	}
	return f.script(Call{Op: op, N: f.calls[op], Names: slices.Clone(names)})
}

// request treats one request whose effect is act. ctx ends when the caller
// has left.
func request[T any](ctx context.Context, f *faults, op Op, names []string, act func() (T, error)) (T, error) {
	var none T
	fault := f.next(op, names)
	if fault.Delay > 0 {
		t := time.NewTimer(fault.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return none, ctx.Err()
		}
	}
	time.Sleep(fault.Deaf)
	do := act
	switch fault.Effect {
	case FailBefore:
		return none, errFailed
	case Refuse:
		return none, errRefused
	case Away:
		return none, errAway
	case ActThenFail:
		do = func() (T, error) { act(); return none, errFailed }
	case ActThenCut:
		do = func() (T, error) { act(); return none, errCut }
	case Duplicate:
		do = func() (T, error) { act(); return act() }
	}
	if fault.Late == 0 && !fault.Held {
		return do()
	}
	type outcome struct {
		answer T
		err    error
	}
	done := make(chan outcome, 1)
	f.later(fault, func() {
		answer, err := do()
		done <- outcome{answer, err}
	})
	select {
	case o := <-done:
		return o.answer, o.err
	case <-ctx.Done():
		return none, ctx.Err()
	}
}

func (f *faults) later(fault Fault, do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.late++
	close(f.came)
	f.came = make(chan struct{})
	run := func() {
		do()
		f.mu.Lock()
		defer f.mu.Unlock()
		f.late--
	}
	if fault.Held {
		f.held = append(f.held, run)
		return
	}
	time.AfterFunc(fault.Late, run)
}

func (f *faults) release() int {
	f.mu.Lock()
	held := f.held
	f.held = nil
	f.mu.Unlock()
	for _, run := range held {
		run()
	}
	return len(held)
}

func (f *faults) awaitLate(ctx context.Context) error {
	for {
		f.mu.Lock()
		late, came := f.late, f.came
		f.mu.Unlock()
		if late > 0 {
			return nil
		}
		select {
		case <-came:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
