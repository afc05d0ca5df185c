package devtrust

import (
	"time"
)

// newest returns the authority that issues. The caller holds mu.
func (s *Server) newest() *authority { return s.authorities[len(s.authorities)-1] }

// RotateCA adds a new authority to the bundle and tells it to all streams. New
// identities get their SVIDs from it at once, the others at their next
// rotation (half of the SVID TTL at most, or RotateSVIDs): by then everybody
// knows it. What older authorities signed stays valid until DropOldAuthorities.
func (s *Server) RotateCA() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	a, err := newAuthority(s.trustDomain, s.now())
	if err != nil {
		return err
	}
	s.authorities = append(s.authorities, a)
	s.notify()
	s.log.Info("authority added", "authorities", len(s.authorities))
	return nil
}

// RotateSVIDs replaces every SVID now, by ones of the newest authority.
func (s *Server) RotateSVIDs() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	return s.reissue(func(*svid) bool { return true })
}

// DropOldAuthorities takes all authorities but the newest out of the bundle,
// and replaces the SVIDs that they signed. Streams are told both at once.
func (s *Server) DropOldAuthorities() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	newest := s.newest()
	// First the SVIDs: if one cannot be made, nothing is dropped.
	if err := s.reissue(func(current *svid) bool { return current.issuer != newest }); err != nil {
		return err
	}
	s.authorities = []*authority{newest}
	s.notify()
	s.log.Info("old authorities dropped")
	return nil
}

// rotate replaces SVIDs as they reach half of their life. It looks often
// instead of sleeping until then, so that it sees the wall clock jump.
func (s *Server) rotate() {
	defer close(s.done)
	tick := time.NewTicker(min(s.ttl/20, 5*time.Second))
	defer tick.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
			s.rotateDue()
		}
	}
}

func (s *Server) rotateDue() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now().Round(0)
	if err := s.reissue(func(current *svid) bool { return !now.Before(current.rotateAt) }); err != nil {
		s.log.Error("SVIDs are not rotated; trying again", "error", err)
	}
}

// reissue replaces the SVIDs that due names and wakes the streams. The caller
// holds mu.
func (s *Server) reissue(due func(*svid) bool) error {
	woken := false
	for _, e := range s.endpoints {
		if !due(e.current) {
			continue
		}
		next, err := s.issueSVID(e.identity)
		if err != nil {
			return err
		}
		e.current = next
		woken = true
	}
	if woken {
		s.notify()
	}
	return nil
}
