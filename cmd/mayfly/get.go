package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// endTimeout bounds the giving back of a lease on the way out.
const endTimeout = 15 * time.Second

// stopGrace is how long somebody who is told to stop waits for a credential that
// is being made, in order to give it back.
const stopGrace = 3 * time.Second

// askFlags are what get and exec ask the broker with.
type askFlags struct {
	params []string
	ttl    durationFlag
	reason string
	key    string
}

func (f *askFlags) add(c *cobra.Command) {
	paramFlag(c, &f.params, "a parameter of the tool, name=value; may be repeated")
	c.Flags().Var(&f.ttl, "ttl", "how long the credential is to live, such as 5m; default: the tool's maximum")
	c.Flags().StringVar(&f.reason, "reason", "", "why, for the evidence")
}

func (f *askFlags) request(tool string) (client.GetRequest, error) {
	params, err := parseParams(f.params)
	return client.GetRequest{Tool: tool, Params: params, TTL: time.Duration(f.ttl), Reason: f.reason, Key: f.key}, err
}

func (p *program) getCommand() *cobra.Command {
	var ask askFlags
	var format, out, field string
	c := &cobra.Command{
		Use:   "get TOOL",
		Short: "Get a credential for one tool",
		Long: `Get asks for a credential for one tool and prints it once; nobody can show it
again. It dies at its end, or earlier: with its grant, with its incident, or when
you give it back with "mayfly revoke". To run one command with a credential,
"mayfly exec" is the better way: it gives it back.

How it is printed is up to --format:

  env   lines for a POSIX shell to evaluate: export NAME='value'. The names are
        the tool's, from the catalog; the values are quoted so that nothing in
        them expands.
  json  the lease and the secret's fields, as one JSON object.
  file  into the file --out, with mode 0600: the secret's fields as one JSON
        object, or with --field that field alone, byte for byte. The file is
        written whole or not at all. A symbolic link, or a file that others may
        read, is refused. Standard output gets the lease.

Without --format you see the lease as comments, and below it what env prints, so
that this can be evaluated, too. With --output json it is as --format json.

If a credential cannot be put where it was wanted, it is revoked at once.`,
		Example: `  eval "$(mayfly get crm.read --param customer=c-17 --ttl 5m --format env)"
  mayfly get crm.read --param customer=c-17 --format file --out token --field access_token
  mayfly get crm.read --param customer=c-17 --format json | jq -r .secret.access_token`,
		Args:              exactly("TOOL"),
		ValidArgsFunction: p.completeArgs(p.toolNames),
	}
	ask.add(c)
	c.Flags().StringVar(&format, "format", "", "env, json or file; see above")
	c.Flags().StringVar(&out, "out", "", "the file to write, with --format file")
	c.Flags().StringVar(&field, "field", "", "only this field of the secret, with --format file")
	c.Flags().StringVar(&ask.key, "idempotency-key", "", "asking again with the same key gives the same lease, never a second one")
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"env", "json", "file"}, cobra.ShellCompDirectiveNoFileComp)) // the flag is there: see above
	return p.verb(c, func(ctx context.Context, args []string) error {
		req, err := ask.request(args[0])
		if err != nil {
			return err
		}
		if format == "" && p.output == "json" {
			format = "json"
		}
		deliver, giveUp, err := p.delivery(format, out, field)
		if err != nil {
			return err
		}
		defer giveUp()
		return p.with(ctx, func(c *client.Client) error {
			cred, err := p.obtain(ctx, c, req)
			if err != nil {
				return err
			}
			if err := deliver(cred); err != nil {
				return errors.Join(err, p.giveBack(ctx, c, cred.Lease, "it could not be put where it was wanted"))
			}
			return nil
		})
	})
}

// delivery prepares what puts a credential where it is wanted, and what tidies
// up. It fails before a credential is asked for, wherever that can be known.
func (p *program) delivery(format, out, field string) (deliver func(*client.Credential) error, giveUp func(), err error) {
	giveUp = func() {}
	if format != "file" && (out != "" || field != "") {
		return nil, nil, usagef("--out and --field are for --format file")
	}
	switch format {
	case "":
		return p.printCredential, giveUp, nil
	case "env":
		return p.printExports, giveUp, nil
	case "json":
		return func(cred *client.Credential) error {
			return writeJSON(p.stdout, credentialView{viewLease(cred.Lease), cred.Secret.RevealAll(), cred.Env})
		}, giveUp, nil
	case "file":
		if out == "" {
			return nil, nil, usagef("--format file needs --out")
		}
		f, err := newSecretFile(out)
		if err != nil {
			return nil, nil, err
		}
		return func(cred *client.Credential) error { return p.writeSecret(cred, f, field) }, f.abort, nil
	}
	return nil, nil, usagef("--format %q is none of env, json and file", format)
}

func (p *program) printExports(cred *client.Credential) error {
	vars, err := cred.Variables()
	if err != nil {
		return err
	}
	if len(vars) == 0 {
		return usagef("tool %s sets no environment variables: use --format json or file", cred.Lease.Tool)
	}
	_, err = io.WriteString(p.stdout, exports(vars))
	return err
}

// printCredential is for people: the lease as comments, and lines to evaluate.
func (p *program) printCredential(cred *client.Credential) error {
	vars, err := cred.Variables()
	if err != nil {
		return err
	}
	var out page
	out.fields("# ", leaseFields(cred.Lease, p.now())...)
	out.line("# to give it back: mayfly revoke %s", cred.Lease.ID)
	if len(vars) == 0 {
		// There are no names to export, so the fields are shown as they are, in
		// the quotes of JSON: no character of them means anything.
		for _, name := range cred.Secret.Names() {
			value, _ := cred.Secret.Reveal(name)
			quoted, err := json.Marshal(value)
			if err != nil {
				return err
			}
			out.line("# %s: %s", name, quoted)
		}
	}
	_, err = io.WriteString(p.stdout, out.String()+exports(vars))
	return err
}

func (p *program) writeSecret(cred *client.Credential, f *secretFile, field string) error {
	var data []byte
	if field != "" {
		value, ok := cred.Secret.Reveal(field)
		if !ok {
			return usagef("the credential has no field %q; it has %s", field, strings.Join(cred.Secret.Names(), ", "))
		}
		data = []byte(value)
	} else {
		var b bytes.Buffer
		if err := writeJSON(&b, cred.Secret.RevealAll()); err != nil {
			return err
		}
		data = b.Bytes()
	}
	if err := f.commit(data); err != nil {
		return err
	}
	return p.show(struct {
		Lease leaseView `json:"lease"`
		File  string    `json:"file"`
	}{viewLease(cred.Lease), f.path}, func(out *page) {
		out.fields("", append(leaseFields(cred.Lease, p.now()), "file", f.path)...)
	})
}

// obtain asks for a credential. Whoever is told to stop meanwhile waits a moment
// for the answer: what was made by then can be given back, and would otherwise
// live until its end without anybody having it.
func (p *program) obtain(ctx context.Context, c *client.Client, req client.GetRequest) (*client.Credential, error) {
	asking, giveUp := context.WithCancel(context.WithoutCancel(ctx))
	defer giveUp()
	defer context.AfterFunc(ctx, func() {
		select {
		case <-time.After(stopGrace):
			giveUp()
		case <-asking.Done():
		}
	})()
	cred, err := c.Get(asking, req)
	if ctx.Err() == nil {
		return cred, howToAsk(err, req)
	}
	if err == nil {
		_ = p.giveBack(ctx, c, cred.Lease, "stopped before it was used") // it has told what went wrong
	}
	return nil, ctx.Err()
}

// howToAsk adds to a refusal for want of a grant how one is asked for.
func howToAsk(err error, req client.GetRequest) error {
	var refusal *broker.Error
	if !errors.As(err, &refusal) {
		return err
	}
	switch refusal.Reason {
	case broker.ReasonNoGrant, broker.ReasonGrantSuspended, broker.ReasonGrantUsed:
	default:
		return err
	}
	told := *refusal
	if told.Next != "" {
		told.Next += "; "
	}
	told.Next += "to ask for access: mayfly request create " + req.Tool + paramFlags(req.Params) + " --reason …"
	return &told
}

// giveBack ends a lease on the way out, also when the caller is being stopped.
// It returns an error only if the lease may still live.
func (p *program) giveBack(ctx context.Context, c *client.Client, l client.Lease, reason string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	ended, err := c.Revoke(ctx, l.ID, reason)
	switch {
	case err != nil:
		f := failureOf(err, "")
		p.warn("lease %s is not revoked: %s%s", l.ID, f.Message, inBrackets(f.Reason))
		p.warn("  it ends %s; to end it now: mayfly revoke %s", relative(l.End, p.now()), l.ID)
		return err
	case !ended.State.Ended():
		p.warn("lease %s is being revoked, and its death is not confirmed yet%s", l.ID, inBrackets(string(ended.Progress)))
	case ended.Cause != broker.CauseReturned && ended.Cause != broker.CauseRevoked:
		p.warn("lease %s had ended before, %s (%s)", l.ID, relative(ended.EndedAt, p.now()), ended.Cause)
	}
	return nil
}
