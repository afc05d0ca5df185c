package vault

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/failpoint"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

const (
	// clockSkew is how far Vault's clock, and that of the system behind it,
	// may be from ours in what we say of an instant.
	clockSkew = time.Second
	// buffer is what Vault's database engine adds to VALID UNTIL.
	buffer = 5 * time.Second
	// slack is how much longer than what was asked Vault's lease may be: the
	// request took its time.
	slack = 5 * time.Second
	// createLimit bounds the login and the creation of the lease's token.
	createLimit = 15 * time.Second
	// readMargin is how much longer than Vault itself we wait for an answer:
	// whoever hangs up on Vault leaves roles that it does not know of.
	readMargin = 10 * time.Second
)

// making is one Mint.
type making struct {
	p     *provider
	req   providers.MintRequest
	plan  plan
	token string
	handle
}

// Mint implements providers.Provider: a token that can read exactly the tool's
// path, its accessor recorded, and one read with it, sent once and whatever
// becomes of the caller.
func (p *provider) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	plan, err := p.planOf(req)
	if err != nil {
		return providers.Minted{}, providers.Refused(err)
	}
	m := &making{p: p, req: req, plan: plan}
	failpoint.At("vault.create.before")
	if err := m.createToken(ctx); err != nil {
		if f := asFault(err); f != nil && (f.kind == late || f.kind == cut) {
			if gone := p.probe(ctx); gone != nil {
				f.kind, f.err = away, errors.Join(f.err, gone)
			}
		}
		// A token that nobody holds makes nothing, and dies by itself.
		return providers.Minted{}, p.nothingMade(req.Tool.Name, err)
	}
	failpoint.At("vault.create.after")
	recorded, err := m.handle.encode()
	if err == nil {
		err = record(recorded)
	}
	if err != nil {
		return providers.Minted{}, m.nothing(ctx, fmt.Errorf("recording the accessor: %w", err))
	}
	asked := p.now()
	failpoint.At("vault.read.before")
	secret, err := m.read(ctx)
	failpoint.At("vault.read.after")
	if err != nil {
		return providers.Minted{}, m.unread(ctx, err)
	}
	return m.take(ctx, secret, asked)
}

// createToken makes the token of the lease.
func (m *making) createToken(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, createLimit)
	defer cancel()
	p, req := m.p, m.req
	ttl := wholeSeconds(p.config.TokenTTL(req.End.Sub(req.Now)))
	body := map[string]any{
		"ttl":              ttl,
		"explicit_max_ttl": ttl,
		"display_name":     vaultscope.DisplayName(p.installation, req.Lease),
		"meta": map[string]string{
			"mayfly_lease":        string(req.Lease),
			"mayfly_installation": string(p.installation),
			"mayfly_agent":        req.Agent.String(),
			"mayfly_tool":         req.Tool.Name,
			"mayfly_incident":     string(req.Incident),
		},
	}
	secret, err := p.session.with(ctx, func(token string) (*api.Secret, error) {
		return do(ctx, p.client.keep, request{
			what: "creating the token of lease " + string(req.Lease), path: p.config.CreatePath(req.Tool.Name), token: token, body: body, quiet: true,
		})
	})
	if err != nil {
		return err
	}
	if secret == nil || secret.Auth == nil || secret.Auth.ClientToken == "" || secret.Auth.Accessor == "" {
		return &fault{kind: missing, what: "creating the token of lease " + string(req.Lease), err: errors.New("the answer has no token and accessor: is token_mount the token store, and does the token role make service tokens?")}
	}
	m.token = secret.Auth.ClientToken
	now := p.now()
	m.handle = handle{
		Version: handleVersion, Class: m.plan.class, Accessor: secret.Auth.Accessor, Mount: m.plan.scope.Mount, TTL: m.plan.ttl,
	}
	if m.Class.diesByItself() {
		m.Gone = now.Add(p.readLimit() + p.config.RequestLimit + m.plan.ttl + buffer + clockSkew).UTC()
	}
	return nil
}

// detach gives a context that outlives the caller, but no longer than the
// attempt's deadline.
func detach(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	end := time.Now().Add(limit)
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(end) {
		end = deadline
	}
	return context.WithDeadline(context.WithoutCancel(ctx), end)
}

// read reads the credential, once.
func (m *making) read(ctx context.Context) (*api.Secret, error) {
	if err := ctx.Err(); err != nil {
		return nil, &fault{kind: late, what: "reading " + m.plan.path, unsent: true, err: err}
	}
	ctx, cancel := detach(ctx, m.p.readLimit())
	defer cancel()
	r, err := m.request()
	if err != nil {
		return nil, &fault{kind: bad, what: "reading " + m.plan.path, unsent: true, err: err}
	}
	return do(ctx, m.p.client.once, r)
}

// unread is what a read that brought nothing means.
func (m *making) unread(ctx context.Context, cause error) error {
	f := asFault(cause)
	if f.kind == badToken || f.kind == throttled || f.says("one use left") || f.says("use limit") {
		// The token was made a moment ago. A proxy that sends a read more than
		// once uses it up, or gets its last copy refused, and what we are given
		// is the answer to a copy: the first may be under way still.
		return fmt.Errorf("the outcome is not known, as the credential of lease %s may have been read more than once: %w", m.req.Lease, cause)
	}
	if !f.refused() {
		return fmt.Errorf("the outcome is not known: %w", cause)
	}
	return m.nothing(ctx, cause)
}

// nothing ends the token of an attempt that made nothing. Where that fails the
// engine is to do it, and is not told that nothing was made.
func (m *making) nothing(ctx context.Context, cause error) error {
	ctx, cancel := detach(ctx, revokeLimit)
	defer cancel()
	if err := m.p.revokeAccessor(ctx, m.Accessor); err != nil {
		return fmt.Errorf("%w (and then: %w)", cause, err)
	}
	return m.p.nothingMade(m.req.Tool.Name, cause)
}

// refuse ends what Vault made and what is not what the catalog says.
func (m *making) refuse(ctx context.Context, cause error) (providers.Minted, error) {
	cause = &fault{kind: unwanted, what: "refusing what Vault answered for lease " + string(m.req.Lease), err: cause}
	ctx, cancel := detach(ctx, revokeLimit)
	defer cancel()
	var err error
	switch {
	case m.LeaseID != "":
		err = m.p.revokeLease(ctx, m.LeaseID)
	case m.Class == classDatabase || m.Class == classLeased:
		m.Read = false // what it made is as little known as if it had not answered
		err = errors.New("there is no lease in Vault to end")
	}
	if err == nil {
		err = m.p.revokeAccessor(ctx, m.Accessor)
	}
	if err == nil {
		return providers.Minted{}, m.p.nothingMade(m.req.Tool.Name, cause)
	}
	h, encodeErr := m.handle.encode()
	return providers.Minted{Handle: h}, fmt.Errorf("%w: %w", providers.ErrRefused, errors.Join(cause, err, encodeErr))
}

// take makes the lease of Vault's answer.
func (m *making) take(ctx context.Context, secret *api.Secret, asked time.Time) (providers.Minted, error) {
	now := m.p.now()
	if secret == nil || secret.LeaseID == "" && len(secret.Data) == 0 {
		// Vault says 404 where there is nothing. This is somebody else's answer.
		return providers.Minted{}, m.unread(ctx, &fault{kind: cut, what: "reading " + m.plan.path, err: errors.New("the answer is empty")})
	}
	m.Read = true
	allowed := m.req.End.Sub(m.req.Now) + slack
	duration := time.Duration(secret.LeaseDuration) * time.Second
	if secret.LeaseID != "" {
		if err := m.p.checkLeaseID(secret.LeaseID, m.plan.path); err != nil {
			return m.refuse(ctx, err)
		}
		if m.Class.revocable() {
			m.LeaseID = secret.LeaseID
		}
	}
	data := secret.Data
	minted := providers.Minted{Survives: m.plan.scope.Survives(m.p.config)}
	switch m.Class {
	case classDatabase, classLeased:
		if m.LeaseID == "" || duration <= 0 {
			return m.refuse(ctx, errors.New("the answer has no lease: nothing could end the credential"))
		}
		if duration > allowed {
			return m.refuse(ctx, fmt.Errorf("the lease in Vault lives %s, and at most %s is allowed: set default_ttl and max_ttl of the role that %s reads to the ttl of the tool's scope", duration, allowed-slack, m.plan.path))
		}
		minted.DiesAt = now.Add(duration + buffer + clockSkew)
		minted.Ends = asked.Add(duration)
		if err := m.user(data); err != nil {
			return m.refuse(ctx, err)
		}
	case classCertificate, classFixed:
		expires, err := m.expires(data, now, duration)
		if err != nil {
			return m.refuse(ctx, err)
		}
		if expires.After(m.req.End.Add(slack)) {
			return m.refuse(ctx, fmt.Errorf("what Vault made is good until %s, and it must be dead by %s: bound the life that its role gives", stamp(expires), stamp(m.req.End)))
		}
		minted.DiesAt, minted.Ends = expires.Add(clockSkew), expires
		if minted.Survives != "" {
			minted.Survives += " (" + stamp(expires) + ")"
		}
	case classStatic:
		minted.Static = true
		var err error
		if data, err = keyValues(secret, m.plan.scope.Version); err != nil {
			return providers.Minted{}, m.nothing(ctx, &fault{kind: missing, what: "reading " + m.plan.path, err: err})
		}
	}
	if !minted.Ends.Before(m.req.End) {
		minted.Ends = time.Time{}
	}
	m.DiesAt = minted.DiesAt.UTC()
	fields, err := fieldsOf(data, m.plan.scope.Fields)
	if err != nil {
		return m.refuse(ctx, err)
	}
	if minted.Handle, err = m.handle.encode(); err != nil {
		return m.refuse(ctx, err)
	}
	minted.Secret = broker.NewSecret(fields)
	return minted, nil
}

// user takes the name of the role that was made. Where we look for roles
// ourselves, one that does not bear the lease's name would never be found.
func (m *making) user(data map[string]any) error {
	if m.Class != classDatabase {
		return nil
	}
	m.User, _ = data["username"].(string)
	want := vaultscope.LeaseRolePrefix(m.p.installation, m.req.Lease)
	if m.p.directs[m.Mount] != nil && !strings.HasPrefix(m.User, want) {
		return fmt.Errorf("the role is named %q, and its name must begin with %q to be found and dropped: set the username_template of the connection as `mayfly vault setup` prints it", m.User, want)
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
