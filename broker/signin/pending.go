package signin

import (
	"container/list"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"maps"
	"slices"
	"sync"
	"time"
)

// digest is the SHA-256 of a secret. What is kept of a secret is that, so that
// finding it tells nothing by the time that it takes.
type digest [sha256.Size]byte

func digestOf(secret string) digest { return sha256.Sum256([]byte(secret)) }

// newSecret makes a secret of 256 random bits, as base64url.
func newSecret() string {
	var b [32]byte
	rand.Read(b[:]) // crypto/rand.Read never returns an error; it aborts the program instead
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// wellFormed reports whether s has the form of what newSecret makes.
func wellFormed(s string) bool {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	return err == nil && len(b) == 32 && len(s) == 43
}

// pending holds what is under way, by the digest of the secret that finds it.
// It holds so many at most, for so long. Then the oldest makes room of those that
// came from where the most came from: a flood ends its own.
type pending[T any] struct {
	most int
	life time.Duration

	mu    sync.Mutex
	items map[digest]*list.Element // of kept[T]
	order *list.List               // oldest first
	from  map[string]int           // how many came from where
}

type kept[T any] struct {
	key   digest
	since time.Time
	from  string
	value T
}

func newPending[T any](most int, life time.Duration) *pending[T] {
	return &pending[T]{most: most, life: life, items: map[digest]*list.Element{}, order: list.New(), from: map[string]int{}}
}

func (p *pending[T]) add(secret string, v T, from string, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expire(now)
	key := digestOf(secret)
	if e, ok := p.items[key]; ok {
		p.drop(e)
	}
	for len(p.items) >= p.most {
		p.drop(p.oldestOfTheMost())
	}
	p.from[from]++
	p.items[key] = p.order.PushBack(kept[T]{key, now, from, v})
}

// oldestOfTheMost is what makes room. There is something.
func (p *pending[T]) oldestOfTheMost() *list.Element {
	most := slices.Max(slices.Collect(maps.Values(p.from)))
	e := p.order.Front()
	for p.from[e.Value.(kept[T]).from] < most {
		e = e.Next()
	}
	return e
}

// get finds what is under way.
func (p *pending[T]) get(secret string, now time.Time) (v T, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expire(now)
	e, ok := p.items[digestOf(secret)]
	if !ok {
		return v, false
	}
	return e.Value.(kept[T]).value, true
}

// take is get for one caller alone: nobody finds it after.
func (p *pending[T]) take(secret string, now time.Time) (v T, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expire(now)
	e, ok := p.items[digestOf(secret)]
	if !ok {
		return v, false
	}
	p.drop(e)
	return e.Value.(kept[T]).value, true
}

func (p *pending[T]) len(now time.Time) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expire(now)
	return len(p.items)
}

func (p *pending[T]) expire(now time.Time) {
	for e := p.order.Front(); e != nil && now.Sub(e.Value.(kept[T]).since) >= p.life; e = p.order.Front() {
		p.drop(e)
	}
}

func (p *pending[T]) drop(e *list.Element) {
	k := p.order.Remove(e).(kept[T])
	delete(p.items, k.key)
	if p.from[k.from]--; p.from[k.from] == 0 {
		delete(p.from, k.from)
	}
}
