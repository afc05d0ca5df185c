package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// maxToken bounds a user's token, in bytes.
const maxToken = 16 << 10

func (p *program) requestCommand() *cobra.Command {
	return group("request", "Ask for access: one tool, with a reason",
		p.requestCreateCommand(), p.requestShowCommand(), p.requestListCommand(), p.requestWaitCommand(), p.requestWithdrawCommand())
}

func (p *program) requestCreateCommand() *cobra.Command {
	var agent, incident, tokenFile string
	var params []string
	var length durationFlag
	var wait bool
	var r client.AccessRequest
	c := &cobra.Command{
		Use:   "create TOOL",
		Short: "Ask for a tool",
		Long: `Create asks for one tool: an agent for itself, a person for the agent --agent. What
becomes of it is up to the policies and to the tool's approval rule: it is
granted at once, or waits for approval, or is refused.

Exactly the parameters that are given here are approved. --for is how long the
grant is to be good once it is made; approvers may shorten it.

With --wait it waits until the request is decided, and exits with 3 unless it is
granted. Without, a request that waits for approval exits with 0, and says so.`,
		Example: `  mayfly request create crm.read --param customer=c-17 --reason "OPS-12: customer called" --for 30m --wait
  mayfly request create payments.initiate --agent spiffe://acme.test/agent/finance --param amount=40 \
    --reason "invoice 4711" --ticket FIN-88 --uses 1`,
		Args: exactly("TOOL"), ValidArgsFunction: p.completeArgs(p.toolNames),
	}
	c.Flags().StringVar(&agent, "agent", "", "the agent's SPIFFE ID; an agent that asks for itself leaves it out")
	c.Flags().StringVar(&r.Reason, "reason", "", "why, for those who decide and for the evidence (needed)")
	paramFlag(c, &params, "a parameter of the tool, name=value; may be repeated")
	c.Flags().Var(&length, "for", "how long the grant is to be good, such as 30m; default: the rule's maximum")
	c.Flags().IntVar(&r.MaxUses, "uses", 0, "how many leases may be made under it; 0 means any number, or 1 where the rule says so")
	c.Flags().StringVar(&r.Ticket, "ticket", "", "another system's name for the reason")
	c.Flags().StringVar(&incident, "incident", "", "the incident that it is for; the grant ends with it")
	c.Flags().BoolVar(&r.BreakGlass, "break-glass", false, "ask under the tool's rule for emergencies: loud, and reviewed afterwards")
	c.Flags().StringVar(&tokenFile, "subject-token-file", "", "a file with a token of the user on whose behalf the agent acts; - is standard input")
	c.Flags().StringVar(&r.Key, "idempotency-key", "", "asking again with the same key makes no second request")
	c.Flags().BoolVar(&wait, "wait", false, "wait until it is decided")
	p.completeFlag(c, "incident", p.incidentIDs(false))
	need(c, "reason")
	return p.verb(c, func(ctx context.Context, args []string) error {
		var err error
		r.Tool = args[0]
		if r.Agent, err = parseID("--agent", agent); err != nil {
			return err
		}
		if r.Params, err = parseParams(params); err != nil {
			return err
		}
		if r.MaxUses < 0 {
			return usagef("--uses is negative")
		}
		if tokenFile != "" {
			if r.SubjectToken, err = p.readToken(tokenFile); err != nil {
				return err
			}
		}
		r.For, r.Incident = time.Duration(length), broker.IncidentID(incident)
		return p.with(ctx, func(c *client.Client) error {
			made, err := c.CreateRequest(ctx, r)
			if err != nil {
				return err
			}
			if wait && made.State == broker.RequestPending {
				return p.awaitRequest(ctx, c, made.ID)
			}
			return p.showOutcome(made)
		})
	})
}

// readToken reads a user's token. It is secret as long as it is good, and so
// comes from a file and never from an argument, which others can see.
func (p *program) readToken(name string) (broker.Secret, error) {
	from := p.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return broker.Secret{}, usagef("--subject-token-file: %w", err)
		}
		defer f.Close() // it was only read
		from = f
	}
	b, err := io.ReadAll(io.LimitReader(from, maxToken+1))
	if err != nil {
		return broker.Secret{}, fmt.Errorf("reading the user's token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" || len(b) > maxToken {
		return broker.Secret{}, usagef("--subject-token-file %s is empty, or too large for a token", name)
	}
	return client.NewToken(token), nil
}

// awaitRequest waits until a request is decided, and says meanwhile what it
// waits for.
func (p *program) awaitRequest(ctx context.Context, c *client.Client, id broker.RequestID) error {
	said := ""
	for r, err := range c.WatchRequest(ctx, id) {
		switch {
		case err != nil:
			if errors.Is(err, context.Canceled) {
				p.warn("request %s goes on waiting; to wait for it again: mayfly request wait %s", id, id)
			}
			return err
		case r.State != broker.RequestPending:
			return p.showOutcome(r)
		}
		if now := waitText(r, p.now()); now != said && p.output != "json" {
			p.tell(func(out *page) { out.line("Request %s %s.", r.ID, now) })
			said = now
		}
	}
	return errors.New("the broker stopped telling of the request before it was decided") // WatchRequest ends with an error, or decided
}

// waitText says what a request waits for.
func waitText(r client.Request, now time.Time) string {
	s := "waits for approval"
	if len(r.Missing) > 0 {
		s += ": " + strings.Join(r.Missing, ", ")
	}
	if !r.ExpiresAt.IsZero() {
		s += "; it expires " + relative(r.ExpiresAt, now)
	}
	return s
}

// showOutcome shows a request, and fails where it came to no good end.
func (p *program) showOutcome(r client.Request) error {
	err := p.show(viewRequest(r), func(out *page) {
		out.fields("", requestFields(r, p.now())...)
		switch r.State {
		case broker.RequestPending:
			out.line("It %s. To wait for it: mayfly request wait %s", waitText(r, p.now()), r.ID)
		case broker.RequestGranted:
			out.line("Granted. To use it: mayfly exec %s%s -- COMMAND", r.Tool, paramFlags(r.Params))
		}
	})
	if err != nil {
		return err
	}
	return outcome(r)
}

// outcome is an error unless a request is granted, or may still be.
func outcome(r client.Request) error {
	if r.State == broker.RequestGranted || r.State == broker.RequestPending {
		return nil
	}
	what := fmt.Sprintf("request %s is %s", r.ID, r.State)
	next := "ask again, if it is still needed"
	switch r.State {
	case broker.RequestDenied:
		next = "a no is final for this request; speak with who decided before you ask again"
	case broker.RequestVoid:
		next = "ask again: the tool, its approval rule or the policies are not what they were"
	}
	if r.DecidedBy != "" {
		what += ", by " + r.DecidedBy.String()
	}
	if r.Why != "" {
		what += ": " + r.Why
	}
	return broker.Refuse(broker.ReasonRequestOver, what, next)
}

// paramFlags are parameters as they are typed: " --param 'a=1'".
func paramFlags(params map[string]string) string {
	var b strings.Builder
	for _, pair := range pairs(params) {
		b.WriteString(" --param " + quote(pair))
	}
	return b.String()
}

// requestFields are a request as pairs of name and value.
func requestFields(r client.Request, now time.Time) []string {
	f := []string{
		"request", string(r.ID), "state", string(r.State), "why", r.Why,
		"agent", r.Agent.String(), "agent's owner", r.Owner, "on behalf of", userText(r.OnBehalfOf), "tool", r.Tool, "description", r.Description,
		"sensitivity", r.Sensitivity, "what survives", r.Survives,
	}
	for _, pair := range pairs(r.Params) {
		name, value, _ := strings.Cut(pair, "=")
		f = append(f, "parameter "+clean(name), strconv.Quote(value)) // quoted, so that spaces at its ends are seen
	}
	uses := "any number"
	if r.MaxUses > 0 {
		uses = strconv.Itoa(r.MaxUses)
	}
	length := ""
	if r.Duration > 0 {
		length = span(r.Duration)
	}
	f = append(f, "reason", r.Reason, "ticket", r.Ticket, "incident", string(r.Incident),
		"for", length, "uses", uses, "asked by", r.CreatedBy.String(), "asked", when(r.CreatedAt, now))
	if r.State == broker.RequestPending {
		f = append(f, "expires", when(r.ExpiresAt, now), "needed", strings.Join(r.Missing, ", "))
	}
	rule := r.Rule
	if r.BreakGlass {
		rule += " (BREAK-GLASS)"
	}
	f = append(f, "approval rule", rule)
	for _, a := range r.Approvals {
		f = append(f, map[bool]string{true: "yes", false: "no"}[a.Approved]+" of", approvalText(a, now))
	}
	return append(f, "grant", string(r.Grant), "decided", strings.TrimSpace(when(r.DecidedAt, now)+" "+r.DecidedBy.String()), "digest", r.Digest)
}

func approvalText(a broker.Approval, now time.Time) string {
	s := a.Person.Name + ", " + when(a.At, now)
	if a.Duration > 0 {
		s += ", for " + span(a.Duration)
	}
	if a.Comment != "" {
		s += ": " + a.Comment
	}
	return s
}

func (p *program) requestShowCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "show REQUEST",
		Short:   "Show one request whole",
		Long:    "Show shows one request: what is asked for, why, who decided, and the digest that\na yes names.",
		Example: "  mayfly request show r0mbp1x2q3w4e5r6t7y8u9i0o1",
		Args:    exactly("REQUEST"), ValidArgsFunction: p.completeArgs(p.requestIDs(client.RequestFilter{All: true})),
	}
	return p.verb(c, func(ctx context.Context, args []string) error {
		id, err := broker.ParseRequestID(args[0])
		if err != nil {
			return err
		}
		return p.with(ctx, func(c *client.Client) error {
			r, err := c.Request(ctx, id)
			if err != nil {
				return err
			}
			return p.show(viewRequest(r), func(out *page) { out.fields("", requestFields(r, p.now())...) })
		})
	})
}

func (p *program) requestListCommand() *cobra.Command {
	var agent string
	var f client.RequestFilter
	c := &cobra.Command{
		Use:     "list",
		Short:   "List requests",
		Long:    "List lists the requests that you may see and that wait for approval: an agent's\nown, those that you made or may decide; for an operator, everybody's.",
		Example: "  mayfly request list --votable\n  mayfly request list --all --tool crm.read --output json",
		Args:    none,
	}
	c.Flags().BoolVar(&f.All, "all", false, "also those that wait no more")
	c.Flags().BoolVar(&f.Votable, "votable", false, "only those that you may decide now")
	c.Flags().BoolVar(&f.BreakGlass, "break-glass", false, "only those under a rule for emergencies")
	c.Flags().StringVar(&agent, "agent", "", "only of this agent")
	c.Flags().StringVar(&f.Tool, "tool", "", "only for this tool")
	p.completeFlag(c, "tool", p.toolNames)
	return p.verb(c, func(ctx context.Context, _ []string) error {
		var err error
		if f.Agent, err = parseID("--agent", agent); err != nil {
			return err
		}
		return p.with(ctx, func(c *client.Client) error {
			view := struct {
				Requests []requestView `json:"requests"`
			}{[]requestView{}}
			var rows [][]string
			now := p.now()
			for r, err := range c.Requests(ctx, f) {
				if err != nil {
					return err
				}
				view.Requests = append(view.Requests, viewRequest(r))
				state := string(r.State)
				if r.BreakGlass {
					state = "BREAK-GLASS, " + state
				}
				rows = append(rows, []string{string(r.ID), r.Agent.String(), r.Tool, paramText(r.Params), state, strings.Join(r.Missing, ", "),
					requestSpan(r, now), userText(r.OnBehalfOf), r.CreatedBy.String(), r.Reason})
			}
			return p.show(view, func(out *page) {
				if len(rows) == 0 {
					out.line("No requests%s.", map[bool]string{false: " that wait; all others are shown with --all"}[f.All])
					return
				}
				out.table([]string{"REQUEST", "AGENT", "TOOL", "PARAMETERS", "STATE", "NEEDED", "TIME", "ON BEHALF OF", "ASKED BY", "REASON"}, rows)
			})
		})
	})
}

func requestSpan(r client.Request, now time.Time) string {
	if r.State == broker.RequestPending {
		return "expires " + relative(r.ExpiresAt, now)
	}
	return relative(r.DecidedAt, now)
}

func (p *program) requestWaitCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "wait REQUEST",
		Short:   "Wait until a request is decided",
		Long:    "Wait waits until a request is decided. It exits with 0 if it is granted, and with 3\nif it was denied, withdrawn, or is expired or void.",
		Example: "  mayfly request wait r0mbp1x2q3w4e5r6t7y8u9i0o1 && mayfly exec crm.read -- ./report.sh",
		Args:    exactly("REQUEST"), ValidArgsFunction: p.completeArgs(p.requestIDs(client.RequestFilter{})),
	}
	return p.verb(c, func(ctx context.Context, args []string) error {
		id, err := broker.ParseRequestID(args[0])
		if err != nil {
			return err
		}
		return p.with(ctx, func(c *client.Client) error { return p.awaitRequest(ctx, c, id) })
	})
}

func (p *program) requestWithdrawCommand() *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use:     "withdraw REQUEST",
		Short:   "Take back a request that waits",
		Long:    "Withdraw takes back a request that waits for approval: your own; for an operator,\nanybody's.",
		Example: "  mayfly request withdraw r0mbp1x2q3w4e5r6t7y8u9i0o1 --reason \"asked for the wrong customer\"",
		Args:    exactly("REQUEST"), ValidArgsFunction: p.completeArgs(p.requestIDs(client.RequestFilter{})),
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the evidence")
	return p.verb(c, func(ctx context.Context, args []string) error {
		id, err := broker.ParseRequestID(args[0])
		if err != nil {
			return err
		}
		return p.with(ctx, func(c *client.Client) error {
			r, err := c.WithdrawRequest(ctx, id, reason)
			if err != nil {
				return err
			}
			return p.show(viewRequest(r), func(out *page) { out.line("Request %s is %s.", r.ID, r.State) })
		})
	})
}
