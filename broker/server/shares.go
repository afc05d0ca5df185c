package server

import (
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// shares counts the requests under way of each identity, so that one caller
// cannot keep the others out. The zero value is ready.
type shares struct {
	mu sync.Mutex
	by map[spiffeid.ID]int // only identities with requests under way
}

// take reports whether id may have one more under way, and counts it if so.
func (s *shares) take(id spiffeid.ID, most int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by[id] >= most {
		return false
	}
	if s.by == nil {
		s.by = map[spiffeid.ID]int{}
	}
	s.by[id]++
	return true
}

// give ends what take counted.
func (s *shares) give(id spiffeid.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by[id]--; s.by[id] == 0 {
		delete(s.by, id)
	}
}
