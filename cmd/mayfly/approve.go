package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// voteFlags are what approve and deny have in common.
type voteFlags struct {
	comment   string
	digest    string
	yes       bool
	noStepUp  bool
	noBrowser bool
}

func (f *voteFlags) add(c *cobra.Command, p *program) {
	c.Flags().BoolVar(&f.yes, "yes", false, "do not ask; approve wants --digest then")
	c.Flags().BoolVar(&f.noStepUp, "no-step-up", false, "where a fresh sign-in is needed, fail and do not sign in")
	c.Flags().BoolVar(&f.noBrowser, "no-browser", false, "where a fresh sign-in is needed, show the address and open no browser")
}

func (p *program) approveCommand() *cobra.Command {
	var f voteFlags
	var length durationFlag
	c := &cobra.Command{
		Use:   "approve REQUEST",
		Short: "Say yes to a request",
		Long: `Approve shows exactly what is asked for, asks whether you agree, and sends your yes
with the digest of what was shown: should the request differ from it, your yes
does not count. --for agrees to a shorter time than was asked for.

Where the approval rule wants a fresh or stronger sign-in than yours, you are
asked to sign in again, in the browser, and the yes is sent then.

Without a terminal it approves nothing, unless --yes says so and --digest names
what is approved; "mayfly request show" shows the digest.`,
		Example: `  mayfly request list --votable
  mayfly approve r0mbp1x2q3w4e5r6t7y8u9i0o1 --for 20m --comment "spoke with the customer"`,
		Args: exactly("REQUEST"), ValidArgsFunction: p.completeArgs(p.requestIDs(client.RequestFilter{Votable: true})),
	}
	c.Flags().Var(&length, "for", "the longest that you agree to, such as 20m; default: what was asked for")
	c.Flags().StringVar(&f.comment, "comment", "", "a word with it, for the evidence")
	c.Flags().StringVar(&f.digest, "digest", "", "only if the request has this digest")
	f.add(c, p)
	return p.onlyForPeople(p.verb(c, func(ctx context.Context, args []string) error {
		if f.yes && f.digest == "" {
			return usagef("--yes needs --digest: it names what you agree to without being shown")
		}
		return p.vote(ctx, args[0], f, "approve", time.Duration(length), (*client.Client).Approve)
	}))
}

func (p *program) denyCommand() *cobra.Command {
	var f voteFlags
	c := &cobra.Command{
		Use:     "deny REQUEST",
		Short:   "Say no to a request, for good",
		Long:    "Deny shows what is asked for, asks whether you mean it, and says no. A no is final\nfor that request; whoever asked sees your comment.",
		Example: "  mayfly deny r0mbp1x2q3w4e5r6t7y8u9i0o1 --comment \"use the read-only tool\"",
		Args:    exactly("REQUEST"), ValidArgsFunction: p.completeArgs(p.requestIDs(client.RequestFilter{Votable: true})),
	}
	c.Flags().StringVar(&f.comment, "comment", "", "why (needed)")
	f.add(c, p)
	need(c, "comment")
	return p.onlyForPeople(p.verb(c, func(ctx context.Context, args []string) error {
		if f.comment == "" {
			return usagef("--comment is empty; say why")
		}
		return p.vote(ctx, args[0], f, "deny", 0, (*client.Client).Deny)
	}))
}

// vote shows a request, asks, and sends the decision of what was shown.
func (p *program) vote(ctx context.Context, arg string, f voteFlags, word string, length time.Duration,
	send func(*client.Client, context.Context, client.Vote) (client.Request, error)) error {
	id, err := broker.ParseRequestID(arg)
	if err != nil {
		return err
	}
	if !f.yes && !p.interactive() {
		return usagef("nobody can be asked here: say --yes if you mean it")
	}
	return p.with(ctx, func(c *client.Client) error {
		r, err := c.Request(ctx, id)
		if err != nil {
			return err
		}
		if f.digest != "" && f.digest != r.Digest {
			return broker.Refusef(broker.ReasonConflict, "look at it with `mayfly request show`, and decide about what it is now",
				"request %s has the digest %s, and not the one that was named", r.ID, r.Digest)
		}
		if r.State != broker.RequestPending {
			if err := outcome(r); err != nil {
				return err
			}
			return broker.Refusef(broker.ReasonRequestOver, "there is nothing to decide", "request %s is %s", r.ID, r.State)
		}
		shown := requestFields(r, p.now())
		p.tell(func(out *page) {
			if f.yes && p.output == "json" {
				return // nobody is asked, and standard error is for errors as JSON
			}
			out.fields("  ", shown...)
			if !r.Votable {
				out.line("As things stand you have no vote on it; the broker will say why.")
			}
			if length > 0 {
				out.line("You agree to %s at most.", span(length))
			}
		})
		if !f.yes {
			if err := p.agree("Do you " + word + " it?"); err != nil {
				return err
			}
		}
		v := client.Vote{Request: id, Digest: r.Digest, Comment: f.comment, For: length}
		decided, err := send(c, ctx, v)
		if refusal := (*broker.Error)(nil); errors.As(err, &refusal) && refusal.Reason == broker.ReasonStepUp && !f.noStepUp {
			fresh, err := p.stepUp(ctx, c, refusal.StepUp, f.noBrowser)
			if err != nil {
				return err
			}
			defer fresh.Close() // it holds nothing that could be lost
			if decided, err = send(fresh, ctx, v); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		return p.show(viewRequest(decided), func(out *page) {
			switch decided.State {
			case broker.RequestPending:
				out.line("Your yes to request %s counts. It %s.", decided.ID, waitText(decided, p.now()))
			case broker.RequestGranted:
				out.line("Request %s is granted: %s.", decided.ID, decided.Grant)
			default:
				out.line("Request %s is %s.", decided.ID, decided.State)
			}
		})
	})
}
