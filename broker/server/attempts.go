package server

import (
	"net/netip"
	"sync"
	"time"
)

// attempts bounds what comes in without authentication: each network, and all
// together, have a bucket of attempts, a tenth of which comes back each second.
type attempts struct {
	each, all float64

	mu  sync.Mutex
	by  map[netip.Prefix]bucket
	sum bucket
}

// bucket holds how much was spent, as of an instant.
type bucket struct {
	spent float64
	at    time.Time
}

const mostNetworks = 10_000 // told apart; what is beyond is bounded with all others

func newAttempts(each, all int) *attempts {
	return &attempts{each: float64(each), all: float64(all), by: map[netip.Prefix]bucket{}}
}

func (a *attempts) allow(from netip.Prefix, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	sum := a.sum.later(now, a.all)
	one := a.by[from].later(now, a.each)
	if sum.spent+1 > a.all || one.spent+1 > a.each {
		return false
	}
	if _, known := a.by[from]; !known && len(a.by) >= mostNetworks {
		for k, b := range a.by {
			if b.later(now, a.each).spent == 0 {
				delete(a.by, k)
			}
		}
	}
	sum.spent++
	a.sum = sum
	if one.spent++; len(a.by) < mostNetworks || one.spent > 1 {
		a.by[from] = one
	}
	return true
}

// later is the bucket at a later instant.
func (b bucket) later(now time.Time, size float64) bucket {
	if elapsed := now.Sub(b.at).Seconds(); elapsed > 0 {
		b.spent = max(0, b.spent-elapsed*size/10)
		b.at = now
	}
	return b
}
