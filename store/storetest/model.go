package storetest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/mayfly-security/mayfly/store"
)

// model is what a store should hold.
type model struct {
	keys map[string]string
	logs map[string][]string
}

func (m model) clone() model {
	c := model{keys: maps.Clone(m.keys), logs: make(map[string][]string)}
	for name, l := range m.logs {
		c.logs[name] = slices.Clone(l)
	}
	return c
}

var (
	errRefused = errors.New("refused by the test")
	logNames   = []string{"evidence", "log", "log/2"}
)

func drawKey(t *rapid.T, label string) string {
	return rapid.StringOfN(rapid.RuneFrom([]rune("ab/\x00")), 1, 4, -1).Draw(t, label)
}

// drawValue gives small values, and some that need pages of their own.
func drawValue(t *rapid.T) string {
	size := rapid.SampledFrom([]int{0, 1, 20, 300, 5000, 40000}).Draw(t, "size")
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(len(b) + i)
	}
	return string(b)
}

// testModel drives a store and a model with the same random operations.
func testModel(t *testing.T, open Open) {
	rapid.Check(t, func(rt *rapid.T) {
		dir := t.TempDir()
		s := open(t, dir)
		defer func() { s.Close() }()
		m := model{keys: make(map[string]string), logs: make(map[string][]string)}
		rt.Repeat(map[string]func(*rapid.T){
			"update": func(rt *rapid.T) { m = updateBoth(rt, t, s, m) },
			"scan": func(rt *rapid.T) {
				from, to := drawKey(rt, "from"), drawKey(rt, "to")
				var got, want []string
				view(t, s, func(r store.Reader) error {
					got = nil
					for e, err := range r.Scan(from, to) {
						if err != nil {
							return err
						}
						got = append(got, e.Key+"="+string(e.Value))
					}
					return nil
				})
				for _, k := range slices.Sorted(maps.Keys(m.keys)) {
					if k >= from && k < to {
						want = append(want, k+"="+m.keys[k])
					}
				}
				if !slices.Equal(got, want) {
					rt.Fatalf("Scan(%q, %q) gives %d entries, want %d, or other ones", from, to, len(got), len(want))
				}
			},
			"reopen": func(rt *rapid.T) {
				if err := s.Close(); err != nil {
					rt.Fatalf("Close: %v", err)
				}
				s = open(t, dir)
			},
			"": func(rt *rapid.T) {
				if got := contents(t, s); !maps.Equal(got, m.keys) {
					rt.Fatalf("the store has keys %q, want %q", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(m.keys)))
				}
				for _, name := range logNames {
					if got, _ := entries(t, s, name, 0); !slices.Equal(got, m.logs[name]) {
						rt.Fatalf("log %s has %d entries, want %d, or other ones", name, len(got), len(m.logs[name]))
					}
				}
			},
		})
		checkWhole(t, s)
		if t.Failed() {
			rt.Fatal("see above")
		}
	})
}

// updateBoth draws one transaction, makes it in the store, and returns the
// model after it.
func updateBoth(rt *rapid.T, t *testing.T, s store.Store, m model) model {
	type op struct {
		kind, key, value string
	}
	var ops []op
	for range rapid.IntRange(0, 12).Draw(rt, "operations") {
		o := op{kind: rapid.SampledFrom([]string{"get", "put", "put", "delete", "append"}).Draw(rt, "kind")}
		if o.key = rapid.SampledFrom(logNames).Draw(rt, "log"); o.kind != "append" {
			o.key = drawKey(rt, "key")
		}
		if o.kind == "put" || o.kind == "append" {
			o.value = drawValue(rt)
		}
		ops = append(ops, o)
	}
	refuse := rapid.IntRange(0, 4).Draw(rt, "refuse") == 0

	var after model
	err := s.Update(t.Context(), func(tx store.Txn) error {
		after = m.clone()
		for _, o := range ops {
			var err error
			switch o.kind {
			case "get":
				var v []byte
				var ok bool
				v, ok, err = tx.Get(o.key)
				if want, there := after.keys[o.key]; err == nil && (ok != there || string(v) != want) {
					err = fmt.Errorf("key %q has %d bytes, %v; want %d, %v", o.key, len(v), ok, len(want), there)
				}
			case "put":
				err = tx.Put(o.key, []byte(o.value))
				after.keys[o.key] = o.value
			case "delete":
				err = tx.Delete(o.key)
				delete(after.keys, o.key)
			case "append":
				err = tx.Append(o.key, []byte(o.value))
				after.logs[o.key] = append(after.logs[o.key], o.value)
			}
			if err != nil {
				return err
			}
		}
		if refuse {
			return errRefused
		}
		return nil
	})
	switch {
	case refuse && err == errRefused:
		return m
	case refuse || err != nil:
		rt.Fatalf("Update = %v, want a refusal: %v", err, refuse)
	}
	return after
}
