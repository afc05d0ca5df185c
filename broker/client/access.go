package client

import (
	"context"
	"crypto/rand"
	"fmt"
	"iter"
	"maps"
	"regexp"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// Identity is how the broker sees the caller.
type Identity struct {
	Principal     broker.Principal
	ID            spiffeid.ID // of a workload; zero for a person
	Roles         []string    // of "agent", "operator", "opener", "resource_server"
	Owner         string      // of an agent; empty for others, as are the next two
	Environment   string
	Labels        map[string]string
	SVIDExpiresAt time.Time
	Broker        spiffeid.ID
	Installation  broker.InstallationID
	CatalogDigest string
	PolicyDigest  string

	// Of a person; zero for a workload.
	Groups       []string
	AuthTime     time.Time // when they last proved who they are
	ACR          string    // how, as a class
	Method       broker.SignInMethod
	SessionUntil time.Time
}

// Tool is a tool as the broker tells it to one caller. Scope and Digest are
// not told and stay empty.
type Tool struct {
	broker.Tool
	Survives     string        // what outlives a revocation; empty if nothing does
	Static       bool          // the secret was there before a lease and stays after it; only a rotation ends it
	GrantedUntil time.Time     // the end of the caller's best grant; zero if none is good now
	Refusal      broker.Reason // why none is good now; empty if one is
	Requestable  bool          // we may ask for it
	// The names of the approval rules; Tool.Approval and Tool.BreakGlass are not told.
	ApprovalRule, BreakGlassRule string
}

// Lease is a lease as the broker tells it.
type Lease struct {
	broker.Lease
	// PastEnd says that the lease is overdue by the broker's clock. Lease.Overdue
	// would say it by ours.
	PastEnd bool
	// OnBehalfOf is the user for whom its agent acts; empty for nobody.
	OnBehalfOf broker.Principal
}

// GetRequest asks for one credential.
type GetRequest struct {
	Tool   string
	Params map[string]string
	TTL    time.Duration // zero means the tool's maximum
	Reason string        // why, for the evidence; may be empty
	// Key is the idempotency key: asking again with it gives the same lease,
	// never a second one. Empty means a fresh one for this call, which covers
	// the call's own retries.
	Key string
}

// Credential is what Get gave.
type Credential struct {
	Lease  Lease
	Secret broker.Secret
	Env    map[string]string // environment variable -> the secret's field, fixed by the tool; see Variables
}

// WhoAmI tells how the broker sees us.
func (c *Client) WhoAmI(ctx context.Context) (Identity, error) {
	m, err := call(ctx, c, c.access.WhoAmI, &mayflyv1.WhoAmIRequest{})
	if err != nil {
		return Identity{}, err
	}
	d := decoder{}
	w := Identity{
		Principal: broker.Principal(m.GetId()), Roles: m.GetRoles(),
		Owner: m.GetOwner(), Environment: m.GetEnvironment(), Labels: m.GetLabels(), Broker: d.id("broker_id", m.GetBrokerId()),
		Installation: broker.InstallationID(m.GetInstallationId()), CatalogDigest: m.GetCatalogDigest(), PolicyDigest: m.GetPolicyDigest(),
		Groups: m.GetGroups(), AuthTime: instant(m.GetAuthTime()), ACR: m.GetAcr(), Method: broker.SignInMethod(m.GetSignInMethod()),
	}
	if _, person := w.Principal.Person(); person {
		w.SessionUntil = instant(m.GetSvidExpiresAt())
	} else {
		w.ID, w.SVIDExpiresAt = d.id("id", m.GetId()), instant(m.GetSvidExpiresAt())
	}
	return w, d.err
}

// Tools lists the tools that we have a grant for; for an operator, all tools.
func (c *Client) Tools(ctx context.Context) ([]Tool, error) {
	res, err := call(ctx, c, c.access.ListTools, &mayflyv1.ListToolsRequest{})
	if err != nil {
		return nil, err
	}
	tools := make([]Tool, 0, len(res.GetTools()))
	for _, m := range res.GetTools() {
		t := Tool{
			Tool: broker.Tool{
				Name: m.GetName(), Description: m.GetDescription(), Provider: m.GetProvider(),
				MaxTTL: m.GetMaxTtl().AsDuration(), Env: m.GetEnv(), Labels: m.GetLabels(), Sensitivity: m.GetSensitivity(),
			},
			Requestable: m.GetRequestable(), ApprovalRule: m.GetApproval(), BreakGlassRule: m.GetBreakGlass(),
			Survives: m.GetSurvives(), Static: m.GetIsStatic(), GrantedUntil: instant(m.GetGrantedUntil()), Refusal: broker.Reason(m.GetRefusal()),
		}
		for _, pm := range m.GetParameters() {
			p := broker.Param{
				Name: pm.GetName(), Type: broker.ParamType(pm.GetType()), OneOf: pm.GetOneOf(),
				Min: pm.Min, Max: pm.Max, Optional: pm.GetOptional(), Description: pm.GetDescription(),
			}
			if pm.GetPattern() != "" {
				if p.Pattern, err = regexp.Compile(pm.GetPattern()); err != nil {
					return nil, fmt.Errorf("reading the pattern of parameter %s of tool %s: %w", p.Name, t.Name, err)
				}
			}
			t.Params = append(t.Params, p)
		}
		tools = append(tools, t)
	}
	return tools, nil
}

// Get asks for one credential.
func (c *Client) Get(ctx context.Context, r GetRequest) (*Credential, error) {
	m := &mayflyv1.IssueLeaseRequest{Tool: r.Tool, Parameters: r.Params, Reason: r.Reason, IdempotencyKey: orFresh(r.Key)}
	if r.TTL != 0 {
		m.Ttl = durationpb.New(r.TTL)
	}
	res, err := call(ctx, c, c.access.IssueLease, m)
	if err != nil {
		return nil, err
	}
	d := decoder{}
	cred := &Credential{Lease: d.lease(res.GetLease()), Secret: broker.NewSecret(res.GetSecret()), Env: maps.Clone(res.GetEnv())}
	if d.err != nil {
		return nil, d.err
	}
	return cred, nil
}

// orFresh is an idempotency key: the caller's, or 128 bits of randomness.
func orFresh(key string) string {
	if key == "" {
		return rand.Text()
	}
	return key
}

// Lease shows one lease.
func (c *Client) Lease(ctx context.Context, id broker.LeaseID) (Lease, error) {
	m, err := call(ctx, c, c.access.GetLease, &mayflyv1.GetLeaseRequest{Id: string(id)})
	if err != nil {
		return Lease{}, err
	}
	d := decoder{}
	return d.lease(m), d.err
}

// LeaseFilter says which leases to list. Zero fields match everything.
type LeaseFilter struct {
	Agent    spiffeid.ID
	Tool     string
	Grant    broker.GrantID
	Incident broker.IncidentID
	All      bool // also those that have ended
	Overdue  bool // only those past their end whose death is not confirmed
}

// Leases lists leases in the order of their making: our own, or, for an
// operator, everybody's. It asks for pages as they are needed. After an error
// it ends.
func (c *Client) Leases(ctx context.Context, f LeaseFilter) iter.Seq2[Lease, error] {
	return pages(func(token string) ([]*mayflyv1.Lease, string, error) {
		res, err := call(ctx, c, c.access.ListLeases, &mayflyv1.ListLeasesRequest{
			All: f.All, Agent: idText(f.Agent), Tool: f.Tool, IncidentId: string(f.Incident), GrantId: string(f.Grant),
			Overdue: f.Overdue, PageSize: pageSize, PageToken: token,
		})
		return res.GetLeases(), res.GetNextPageToken(), err
	}, (*decoder).lease)
}

// Revoke ends one lease, and waits a moment for its death: the State of the
// lease in the answer says how far it came. Ending what has ended changes
// nothing. reason may be empty.
func (c *Client) Revoke(ctx context.Context, id broker.LeaseID, reason string) (Lease, error) {
	m, err := call(ctx, c, c.access.RevokeLease, &mayflyv1.RevokeLeaseRequest{Id: string(id), Reason: reason})
	if err != nil {
		return Lease{}, err
	}
	d := decoder{}
	return d.lease(m), d.err
}

// Variable is one environment variable that a tool sets.
type Variable struct {
	Name, Value string
}

// variableName is what a POSIX shell takes for a name, in the form that
// environments use.
var variableName = regexp.MustCompile(`^[A-Z_][A-Z0-9_]{0,127}$`)

// commanding are variables that tell a loader or a shell what to run. No
// tool's credential goes there, whatever a catalog says.
var commanding = regexp.MustCompile(`^(LD_.*|DYLD_.*|PATH|IFS|ENV|BASH_ENV|BASH_FUNC.*|SHELLOPTS|BASHOPTS|PS[0-4]|PROMPT_COMMAND|CDPATH)$`)

// Variables are the environment variables that the credential's tool sets, in
// order of their names. The names come from the tool alone and are checked
// here again: capital letters, digits and underscores, and none that a shell
// or a loader acts on. The values are secret.
func (c *Credential) Variables() ([]Variable, error) {
	var vars []Variable
	for _, name := range slices.Sorted(maps.Keys(c.Env)) {
		if !variableName.MatchString(name) || commanding.MatchString(name) {
			return nil, fmt.Errorf("tool %s wants to set %q, which is no variable that a tool may set: correct env in the catalog",
				clean(c.Lease.Tool), clean(broker.Shorten(name, 60)))
		}
		value, ok := c.Secret.Reveal(c.Env[name])
		if !ok {
			return nil, fmt.Errorf("tool %s sets %s from the field %q, and the credential has no such field: correct env in the catalog",
				clean(c.Lease.Tool), name, clean(broker.Shorten(c.Env[name], 60)))
		}
		for i := range len(value) {
			if value[i] == 0 {
				return nil, fmt.Errorf("the value of %s has a zero byte, which no environment can hold", name)
			}
		}
		vars = append(vars, Variable{name, value})
	}
	return vars, nil
}
