package devidp

import "time"

const shelfSize = 1000

// shelf keeps things for a while, by a name that nobody guesses. Its zero value
// is empty. Its owner locks.
type shelf[T any] struct{ all map[string]kept[T] }

type kept[T any] struct {
	value T
	until time.Time
}

// put reports whether there was room.
func (s *shelf[T]) put(name string, value T, now, until time.Time) bool {
	if len(s.all) >= shelfSize {
		for n, k := range s.all {
			if !now.Before(k.until) {
				delete(s.all, n)
			}
		}
		if len(s.all) >= shelfSize {
			return false
		}
	}
	if s.all == nil {
		s.all = make(map[string]kept[T])
	}
	s.all[name] = kept[T]{value, until}
	return true
}

func (s *shelf[T]) get(name string, now time.Time) (value T, ok bool) {
	k, ok := s.all[name]
	if !ok || !now.Before(k.until) {
		return value, false
	}
	return k.value, true
}

// take is get, once.
func (s *shelf[T]) take(name string, now time.Time) (T, bool) {
	value, ok := s.get(name, now)
	delete(s.all, name)
	return value, ok
}
