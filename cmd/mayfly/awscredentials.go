package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) awsCredentialsCommand() *cobra.Command {
	var ask askFlags
	var noCache bool
	c := &cobra.Command{
		Use:   "credentials TOOL",
		Short: "Print a tool's credentials as credential_process wants them",
		Long: `Credentials prints what the AWS CLI and the AWS SDKs read from a credential_process:
one JSON object with the keys of a lease, whose Expiration is the lease's end. It
is written into ~/.aws/config by "mayfly aws configure", and not typed.

SDKs run such a process often: for short leases, before every single call. So the
lease is kept in a file and printed again until shortly before its end: a fifth of
its life and a minute at most, but at least five seconds, or half of a life of less
than ten. Then a new one is asked for; should that fail, the old one is printed while
it lives, and asked for again no sooner than five seconds later. However many call at
once, one of them asks, and the others print what lives meanwhile.

The file has a secret in it: a credential for this one tool, that dies at its end.
It is in mayfly/aws below XDG_RUNTIME_DIR, which is memory and is gone when you log
out; where that is not set, or others may write there, it is below XDG_CACHE_HOME or
~/.cache, which is a disk. It has mode 0600, in a directory with mode 0700, and is
removed by a later call once its lease has ended. It belongs to one broker, identity,
tool, set of parameters and TTL, and nobody else is given it. With --no-cache nothing
is written, and each call costs a lease. "mayfly aws exec" and "mayfly aws serve" do
without a file, too, and cost one lease for many calls.

A lease that ends early, with its incident for example, is printed for 15 seconds
more at most: then the broker is asked whether it lives. A broker that is away ends
nothing. The lease is not given back; it dies at its end, or when you end it with
"mayfly revoke". A static secret is never kept.`,
		Example: `  mayfly aws credentials s3.read
  mayfly aws credentials s3.read --param customer=c-17 --ttl 15m`,
		Args:              exactly("TOOL"),
		ValidArgsFunction: p.completeArgs(p.toolNames),
	}
	ask.add(c)
	c.Flags().BoolVar(&noCache, "no-cache", false, "keep nothing in a file: each call costs a lease")
	return p.verb(c, func(ctx context.Context, args []string) error {
		req, err := ask.request(args[0])
		if err != nil {
			return err
		}
		return p.with(ctx, func(c *client.Client) error {
			if noCache || c.As() == client.AsPerson { // only a workload's identity says whose the file would be
				return p.awsPrintNew(ctx, c, req)
			}
			lease, err := p.awsCached(ctx, c, req)
			if err != nil {
				return err
			}
			return p.awsPrint(lease)
		})
	})
}

func (p *program) awsPrint(lease awsLease) error {
	doc, err := lease.processOutput()
	if err != nil {
		return err
	}
	_, err = p.stdout.Write(doc)
	return err
}

// awsPrintNew prints a lease that nobody else has; what cannot be printed is
// given back.
func (p *program) awsPrintNew(ctx context.Context, c *client.Client, req client.GetRequest) error {
	cred, lease, err := p.awsObtain(ctx, c, req)
	if err != nil {
		return err
	}
	if err := p.awsPrint(lease); err != nil {
		return errors.Join(err, p.giveBack(ctx, c, cred.Lease, "it could not be put where it was wanted"))
	}
	return nil
}

// awsObtain gets a lease and reads it as one of AWS. What is none is given back.
func (p *program) awsObtain(ctx context.Context, c *client.Client, req client.GetRequest) (*client.Credential, awsLease, error) {
	cred, err := p.obtain(ctx, c, req)
	if err != nil {
		return nil, awsLease{}, err
	}
	lease, err := awsLeaseOf(cred, p.now())
	if err != nil {
		return nil, awsLease{}, errors.Join(err, p.giveBack(ctx, c, cred.Lease, "it is of no use for AWS"))
	}
	return cred, lease, nil
}

// awsCached gives the lease that is kept, or a new one that is kept from now on.
func (p *program) awsCached(ctx context.Context, c *client.Client, req client.GetRequest) (awsLease, error) {
	cache, err := p.awsCache(c, req)
	if err != nil {
		return awsLease{}, err
	}
	k, err := cache.load()
	if err != nil || k.settled(p.now()) {
		return k.awsLease, err
	}
	unlock, k, err := cache.lock(ctx, cmp.Or(time.Duration(p.timeout), awsKeptWait), p.now)
	if err != nil || unlock == nil {
		return k.awsLease, err
	}
	defer unlock()
	if k, err = cache.load(); err != nil {
		return awsLease{}, err
	}
	if k, err = p.awsStillGood(ctx, c, cache, k); err != nil || k.settled(p.now()) {
		return k.awsLease, err
	}
	return p.awsRenewed(ctx, c, req, cache, k)
}

// awsStillGood asks the broker whether the kept lease lives, unless that was done
// a moment ago. One that is over is forgotten.
func (p *program) awsStillGood(ctx context.Context, c *client.Client, cache awsCache, k kept) (kept, error) {
	now := p.now()
	if !k.alive(now) {
		cache.forget()
		return kept{}, nil
	}
	if within(now, k.looked, awsLook) {
		return k, nil
	}
	asking, stop := context.WithTimeout(ctx, awsKeptLook)
	defer stop()
	l, err := c.Lease(asking, k.ID)
	switch {
	case ctx.Err() != nil:
		return kept{}, ctx.Err()
	case leaseOver(l.State, err):
		p.warn("lease %s was ended", k.ID)
		cache.forget()
		return kept{}, nil
	}
	k.looked = p.now() // also where the broker is away, so that not every call waits for it
	cache.note(k)
	return k, nil
}

// awsRenewed gives a new lease, or the kept one while it lives and none is to be
// had.
func (p *program) awsRenewed(ctx context.Context, c *client.Client, req client.GetRequest, cache awsCache, k kept) (awsLease, error) {
	// What could not be put down is not asked for.
	file, err := newSecretFile(cache.path)
	if err != nil {
		return awsLease{}, err
	}
	defer file.abort()
	asking := ctx
	if k.alive(p.now()) {
		var stop context.CancelFunc
		asking, stop = context.WithTimeout(ctx, awsKeptRenew)
		defer stop()
	}
	cred, lease, err := p.awsObtain(asking, c, req)
	if err != nil && asking.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("the broker did not answer within %s", awsKeptRenew)
	}
	now := p.now()
	switch {
	case err != nil && k.alive(now) && ctx.Err() == nil:
		f := failureOf(err, "")
		p.warn("lease %s is not renewed: %s%s", k.ID, f.Message, inBrackets(f.Reason))
		k.again = now.Add(awsKeptPause)
		cache.note(k)
		return k.awsLease, nil
	case err != nil:
		return awsLease{}, err
	case cred.Lease.Static:
		return lease, nil // it would be in the file for good: it does not die at its end
	}
	if err := cache.keep(file, kept{awsLease: lease, looked: now}); err != nil {
		return awsLease{}, errors.Join(err, p.giveBack(ctx, c, cred.Lease, "it could not be put where it was wanted"))
	}
	cache.prune(now)
	return lease, nil
}
