package awssts

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/denylist"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

// denyPrefix begins the names of deny lists.
const denyPrefix = "mayfly-deny-"

// writers are the deny lists of all roles that this broker writes.
type writers struct {
	mu  sync.Mutex
	all map[string]*writer   // by provider and role
	of  map[string][]*writer // by role: more than one where providers share it
	run string               // names this process in the names of policies
}

func newWriters() *writers {
	return &writers{all: map[string]*writer{}, of: map[string][]*writer{}, run: random(4)}
}

// random is that many bytes in hex, for a name that nothing else has.
func random(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// writer writes the deny list of one role. There is one in the process.
type writer struct {
	role   awsaccess.Role
	prefix string // of the names of our policies of the role
	turn   chan struct{}

	// Under writers.mu.
	places map[broker.LeaseID]place // leases that may have to be denied
	others int                      // characters that are not for them
	met    bool                     // it was tried to look at the role's policies
	begun  map[broker.LeaseID]denylist.Known
	cut    providers.Cut // the latest that is known; zero if there is none

	// Of whoever has the turn.
	list    denylist.List
	seen    bool
	serial  int
	needed  denylist.Set                 // entries that the store has asked for since we began: they may go when it does not any more
	foreign map[denylist.Entry]time.Time // entries that the store does not know of, kept until then
	wrote   map[string]time.Time         // when we wrote or removed a policy
	proven  map[denylist.Entry]time.Time // when entries that stand were seen to be in force
	probe   *probe
	rests   time.Time // no probe is tried before: the last one could not be made
}

// writerLocked is the writer of a role. The caller holds writers.mu.
func (p *provider) writerLocked(arn string) *writer {
	key := p.name + "|" + arn
	w := p.writers.all[key]
	if w == nil {
		role, err := awsaccess.ParseRole(arn)
		if err != nil {
			role = awsaccess.Role{ARN: arn, Name: arn[strings.LastIndexByte(arn, '/')+1:]}
		}
		sum := sha256.Sum256([]byte(p.name))
		w = &writer{
			role: role, prefix: fmt.Sprintf(denyPrefix+"%s-%s-", p.installation, hex.EncodeToString(sum[:4])), turn: make(chan struct{}, 1),
			places: map[broker.LeaseID]place{}, begun: map[broker.LeaseID]denylist.Known{},
			list:   denylist.List{Policies: map[string]*denylist.Policy{}},
			needed: denylist.Set{}, foreign: map[denylist.Entry]time.Time{},
			wrote: map[string]time.Time{}, proven: map[denylist.Entry]time.Time{},
		}
		p.writers.all[key] = w
		p.writers.of[arn] = append(p.writers.of[arn], w)
	}
	return w
}

func (p *provider) writer(arn string) *writer {
	p.writers.mu.Lock()
	defer p.writers.mu.Unlock()
	return p.writerLocked(arn)
}

// take waits for the turn.
func (w *writer) take(ctx context.Context) error {
	select {
	case w.turn <- struct{}{}:
		return nil
	default:
	}
	select {
	case w.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting to write the deny list of %s: %w", w.role.Name, ctx.Err())
	}
}

func (w *writer) leave() { <-w.turn }
