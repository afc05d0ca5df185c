package lease

import "time"

const (
	// troubleAfter is how many batches in a row must come to nothing before a
	// provider, or one of its tools, is in trouble; a single lease that cannot
	// be ended stops no other.
	troubleAfter = 3
	// troubleFirst and troubleLongest bound the pauses between the batches that
	// find out whether a provider in trouble ends leases again.
	troubleFirst   = time.Second
	troubleLongest = 5 * time.Second
	// probeSize is the most leases of such a batch.
	probeSize = 8
)

// trouble is what a worker knows of its provider as a whole. It is pure: the
// time and the chance come in. The zero value is a provider that is well.
type trouble struct {
	since time.Time // zero while it is well
	away  bool      // the provider said so itself
	vain  int       // batches in a row that came to nothing
	tries int       // since it began
	until time.Time // no batch of leases that have not failed begins before
	again time.Time // no batch of leases that have begins before
	spell int       // counts the troubles, so that an answer is not taken for a later one's
}

func (t *trouble) in() bool { return !t.since.IsZero() }

// failed takes note of a batch, begun in a spell, that came to nothing; fresh
// tells that none of its leases had failed before. It reports whether trouble
// begins.
//
// What failed before and fails again tells nothing of the rest, unless the
// provider says that it is away.
func (t *trouble) failed(away, fresh bool, spell int, first time.Duration, now time.Time, chance float64) (begins bool) {
	if spell != t.spell {
		return false // of before the present trouble: it tells nothing new
	}
	if fresh || away {
		t.vain++
	}
	switch {
	case t.in():
		t.away = t.away || away
		t.tries++
	case away, fresh && t.vain >= troubleAfter:
		t.since, t.away, t.tries, begins = now, away, 0, true
		t.spell++
	default:
		return false
	}
	t.again = now.Add(jittered(first, troubleLongest, t.tries, chance))
	if fresh || away {
		t.until = t.again
	}
	return begins
}

// ended takes note of a batch of which something came. It reports whether a
// trouble is over, and whether the provider was away.
func (t *trouble) ended(spell int) (over, wasAway bool) {
	if spell != t.spell {
		return false, false
	}
	over, wasAway = t.in(), t.away
	*t = trouble{spell: t.spell}
	if over {
		t.spell++
	}
	return over, wasAway
}
