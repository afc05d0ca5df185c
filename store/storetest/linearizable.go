package storetest

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/mayfly-security/mayfly/store"
)

const registers = 3

// registersState is what the keys hold.
type registersState [registers]int

// registerOp is one call. The first kind reads all registers in a View; the
// others are Updates of register to that read register from first.
type registerOp struct {
	kind     int // 0: read all; 1: to = from + add; 2: the same, but refused if from is even
	from, to int
	add      int
}

type registerResult struct {
	seen    registersState // all of them, or only from's
	refused bool
}

var registerModel = porcupine.Model{
	Init: func() any { return registersState{} },
	Step: func(state, input, output any) (bool, any) {
		st, op, res := state.(registersState), input.(registerOp), output.(registerResult)
		if op.kind == 0 {
			return res.seen == st, st
		}
		if res.seen[op.from] != st[op.from] {
			return false, st
		}
		if res.refused {
			return op.kind == 2 && st[op.from]%2 == 0, st
		}
		if op.kind == 2 && st[op.from]%2 == 0 {
			return false, st
		}
		st[op.to] = st[op.from] + op.add
		return true, st
	},
}

// testLinearizable records what concurrent callers did and saw, and looks for
// an order in which one after the other would have seen the same.
func testLinearizable(t *testing.T, open Open) {
	const rounds, clients, each = 8, 5, 25
	for round := range rounds {
		s := fresh(t, open)
		begin := time.Now()
		var mu sync.Mutex
		var history []porcupine.Operation
		together(clients, func(client int) {
			for i := range each {
				// Spread without chance, so that a failure comes again.
				n := round*7919 + client*104729 + i*1299709
				op := registerOp{kind: n % 3, from: n / 3 % registers, to: n / 9 % registers, add: n / 27 % 4}
				call := time.Since(begin)
				res, err := doRegister(t, s, op)
				if err != nil {
					t.Errorf("%+v: %v", op, err)
				}
				mu.Lock()
				history = append(history, porcupine.Operation{
					ClientId: client, Input: op, Call: int64(call), Output: res, Return: int64(time.Since(begin)),
				})
				mu.Unlock()
			}
		})
		if res := porcupine.CheckOperationsTimeout(registerModel, history, time.Minute); res != porcupine.Ok {
			t.Errorf("round %d: the history is %s, want %s", round, res, porcupine.Ok)
		}
	}
}

func doRegister(t *testing.T, s store.Store, op registerOp) (res registerResult, err error) {
	key := func(i int) string { return fmt.Sprint("register/", i) }
	if op.kind == 0 {
		return res, s.View(t.Context(), func(r store.Reader) (err error) {
			for i := range registers {
				var e error
				res.seen[i], e = number(r, key(i))
				err = errors.Join(err, e)
			}
			return err
		})
	}
	err = s.Update(t.Context(), func(tx store.Txn) (err error) {
		if res.seen[op.from], err = number(tx, key(op.from)); err != nil {
			return err
		}
		if op.kind == 2 && res.seen[op.from]%2 == 0 {
			return errRefused
		}
		return setNumber(tx, key(op.to), res.seen[op.from]+op.add)
	})
	if err == errRefused {
		res.refused, err = true, nil
	}
	return res, err
}
