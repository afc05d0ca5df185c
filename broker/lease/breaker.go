package lease

import (
	"errors"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

const (
	// breakAfter is how many attempts for a tool in a row must come to an
	// unknown outcome before its provider is no longer asked for it.
	breakAfter = 5
	// probeFirst and probeLongest bound the pause before one attempt finds out
	// whether a provider mints again.
	probeFirst   = time.Second
	probeLongest = 15 * time.Second
)

// breaker decides whether a provider is asked to mint, at all or for a tool. While it is open nothing
// is asked but, now and then, one attempt that finds out. It is pure: the time
// and the chance come in. The zero value is closed.
type breaker struct {
	unknown int       // outcomes in a row of which nobody knows what they made
	since   time.Time // when it opened; zero while it is closed
	next    time.Time // from when on one attempt may find out
	vain    int       // of those came to nothing
	probing bool      // one is under way
}

func (b *breaker) open() bool { return !b.since.IsZero() }

// refuses reports whether an attempt that begins now is refused.
func (b *breaker) refuses(now time.Time) bool {
	return b.open() && (b.probing || now.Before(b.next))
}

// begin begins an attempt; probe tells that it is the one that finds out.
func (b *breaker) begin(now time.Time) (ok, probe bool) {
	if b.refuses(now) {
		return false, false
	}
	b.probing = b.open()
	return true, b.probing
}

// result is what an attempt tells of the provider.
type result int

const (
	worked   result = iota
	away            // it answers nobody
	unknown         // nobody knows what it did
	answered        // it answered, and made nothing: it said no
	nothing         // it made nothing, and whether it answered is not said
	ownWord         // nobody was asked: the provider's own refusal of this very request
)

// resultOf reads Mint's error.
func resultOf(err error) result {
	var refusal *broker.Error
	switch {
	case err == nil:
		return worked
	case errors.Is(err, providers.ErrAway):
		return away
	case !errors.Is(err, providers.ErrNothingMade):
		return unknown
	case errors.As(err, &refusal):
		return ownWord
	case errors.Is(err, providers.ErrRefused):
		return answered
	}
	return nothing
}

// end ends an attempt. chance is between 0 and 1.
func (b *breaker) end(r result, probe bool, now time.Time, chance float64) {
	if probe {
		b.probing = false
	}
	switch {
	case r == worked, r == answered && probe:
		*b = breaker{}
	case b.open():
		if probe && r != ownWord {
			b.vain++
			b.next = now.Add(jittered(probeFirst, probeLongest, b.vain, chance))
		}
	case r == unknown:
		if b.unknown++; b.unknown >= breakAfter {
			b.trip(now, chance)
		}
	case r == away:
		b.trip(now, chance)
	}
}

func (b *breaker) trip(now time.Time, chance float64) {
	*b = breaker{since: now, next: now.Add(jittered(probeFirst, probeLongest, 0, chance))}
}

// hint lets the next attempt find out at once: the provider answered elsewhere.
func (b *breaker) hint(now time.Time) {
	if b.open() && b.next.After(now) {
		b.next = now
	}
}

// jittered is a pause anywhere between half of first and a limit that doubles
// with each try, up to longest: those who wait for the same thing come back at
// different times. chance is between 0 and 1.
func jittered(first, longest time.Duration, tries int, chance float64) time.Duration {
	least := min(first/2, longest)
	most := longest
	if tries < 30 && first<<tries < longest {
		most = first << tries
	}
	return least + time.Duration(chance*float64(most-least))
}
