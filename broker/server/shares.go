package server

import (
	"sync"

	"github.com/mayfly-security/mayfly/broker"
)

// shares counts the requests under way of each caller, so that one caller
// cannot keep the others out. The zero value is ready.
type shares struct {
	mu sync.Mutex
	by map[broker.Principal]int // only callers with requests under way
}

// take reports whether id may have one more under way, and counts it if so.
func (s *shares) take(id broker.Principal, most int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by[id] >= most {
		return false
	}
	if s.by == nil {
		s.by = map[broker.Principal]int{}
	}
	s.by[id]++
	return true
}

// give ends what take counted.
func (s *shares) give(id broker.Principal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by[id]--; s.by[id] == 0 {
		delete(s.by, id)
	}
}
