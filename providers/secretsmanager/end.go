package secretsmanager

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	sm "github.com/aws/aws-sdk-go-v2/service/secretsmanager"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

const (
	// rotationPause is the pause between two looks at a rotation under way.
	rotationPause = 5 * time.Second
	// rotationLimit is how long a rotation may take before it is asked for again.
	rotationLimit = 10 * time.Minute
	stagePending  = "AWSPENDING"
	// codeInvalid is that the secret's state excludes what is asked: it is deleted,
	// has no rotation, or is rotating.
	codeInvalid = "InvalidRequestException"
)

// Revoke implements providers.Provider. It never says that a lease is dead, but
// for one of which nothing was recorded, and so nothing given.
func (p *provider) Revoke(ctx context.Context, endings []providers.Ending) []providers.Death {
	return p.each(ctx, endings, true)
}

// Confirm implements providers.Provider.
func (p *provider) Confirm(ctx context.Context, endings []providers.Ending) []providers.Death {
	return p.each(ctx, endings, false)
}

func (p *provider) each(ctx context.Context, endings []providers.Ending, revoke bool) []providers.Death {
	deaths := make([]providers.Death, len(endings))
	for i, e := range endings {
		deaths[i] = p.end(ctx, e, revoke)
		if err := deaths[i].Err; errors.Is(err, providers.ErrAway) {
			for i++; i < len(deaths); i++ {
				deaths[i].Err = err // it answers nobody now, and each would wait for it
			}
			break
		}
	}
	return deaths
}

func (p *provider) end(ctx context.Context, e providers.Ending, revoke bool) providers.Death {
	if e.Handle == nil {
		return providers.Death{Progress: broker.ProgressVerified} // the handle is recorded before the secret is given
	}
	h, err := p.decodeHandle(e.Handle)
	switch {
	case err != nil:
		return providers.Death{Err: fmt.Errorf("lease %s: %w", e.Lease, err)}
	case !h.Rotate && revoke:
		return providers.Death{Progress: broker.ProgressRequested, Lapsed: true}
	case !h.Rotate:
		return providers.Death{}
	}
	d, err := p.look(ctx, h)
	switch {
	case err != nil:
		return providers.Death{Err: err}
	case d.Lapsed || !revoke || d.Progress != broker.ProgressNone: // it is over, or under way
		return d
	}
	return p.rotate(ctx, h)
}

// look tells how far the rotation of a version came, asking for nothing.
func (p *provider) look(ctx context.Context, h handle) (providers.Death, error) {
	out, err := p.sm.DescribeSecret(ctx, &sm.DescribeSecretInput{SecretId: &h.ARN})
	err = awsclient.FaultOf(ctx, "looking at secret "+h.ARN, err)
	switch {
	case awsclient.KindOf(err) == awsclient.Missing:
		return over(broker.ProgressRequested, "the secret is not in AWS any more; whether its value works, AWS does not know"), nil
	case err != nil:
		return providers.Death{}, err
	case out.DeletedDate != nil:
		return over(broker.ProgressRequested, "the secret is to be deleted, and is not rotated; whether its value works, AWS does not know"), nil
	case !slices.Contains(out.VersionIdsToStages[h.Version], stageCurrent):
		return over(broker.ProgressWritten, "the secret has another current version; whether the one of the lease works is up to the rotation function"), nil
	}
	p.mu.Lock()
	began, asked := p.asked[rotationToken(h)]
	p.mu.Unlock()
	if !pending(out.VersionIdsToStages, h.Version) || !asked || p.now().Sub(began) > rotationLimit {
		return providers.Death{}, nil // it was not begun, or it failed: Revoke asks for it
	}
	return providers.Death{Progress: broker.ProgressRequested, RetryAt: p.now().Add(rotationPause)}, nil
}

// over is a lease that lapses: nothing more is to be done here.
func over(progress broker.Progress, left string) providers.Death {
	return providers.Death{Progress: progress, Lapsed: true, Left: left}
}

// pending reports whether a rotation is under way: a version that is not the
// current one waits to become it.
func pending(versions map[string][]string, current string) bool {
	for id, stages := range versions {
		if id != current && slices.Contains(stages, stagePending) {
			return true
		}
	}
	return false
}

// currentOf is the ID of the current version; empty if there is none.
func currentOf(versions map[string][]string) string {
	for id, stages := range versions {
		if slices.Contains(stages, stageCurrent) {
			return id
		}
	}
	return ""
}

// rotate asks for a rotation. Leases of one version ask for one rotation: the
// token follows from the version.
func (p *provider) rotate(ctx context.Context, h handle) providers.Death {
	token := rotationToken(h)
	death := providers.Death{Progress: broker.ProgressRequested, RetryAt: p.now().Add(rotationPause)}
	_, err := p.sm.RotateSecret(ctx, &sm.RotateSecretInput{SecretId: &h.ARN, ClientRequestToken: &token, RotateImmediately: aws.Bool(true)})
	if err = awsclient.FaultOf(ctx, "rotating secret "+h.ARN, err); err != nil {
		if awsclient.AsFault(err).Code != codeInvalid {
			return providers.Death{Err: err}
		}
		// It is rotating already, which AWS then goes on with; or it cannot.
		out, look := p.sm.DescribeSecret(ctx, &sm.DescribeSecretInput{SecretId: &h.ARN})
		if look != nil || !pending(out.VersionIdsToStages, h.Version) {
			return providers.Death{Err: err}
		}
		if p.hangs(token) {
			death.Err = fmt.Errorf("the rotation does not come to its end; look at the rotation function's log: %w", err)
		}
	}
	p.noteAsked(token)
	return death
}

// hangs reports whether a rotation was asked for longer ago than one may take.
func (p *provider) hangs(token string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, asked := p.asked[token]
	return asked && p.now().Sub(at) > rotationLimit
}

func (p *provider) noteAsked(token string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	for t, at := range p.asked {
		if now.Sub(at) > 2*rotationLimit {
			delete(p.asked, t)
		}
	}
	p.asked[token] = now
}

// rotationToken is the idempotency token of the rotation that takes a version's
// place. It becomes the ID of the new version.
func rotationToken(h handle) string {
	sum := sha256.Sum256([]byte(h.ARN + "\x00" + h.Version))
	return hex.EncodeToString(sum[:16])
}
