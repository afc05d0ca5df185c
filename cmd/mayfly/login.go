package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// signInLimit is how long a person may take in the browser.
const signInLimit = 5 * time.Minute

// slowDown is added to the interval of polling when a broker says that it is
// asked too often (RFC 8628, section 3.5).
const slowDown = 5 * time.Second

type sessionView struct {
	Person    string    `json:"person"`
	Groups    []string  `json:"groups,omitempty"`
	ExpiresAt time.Time `json:"expiresAt"`
	AuthTime  time.Time `json:"authTime,omitzero"`
	ACR       string    `json:"acr,omitempty"`
}

func (p *program) loginCommand() *cobra.Command {
	var device, noBrowser bool
	var maxAge durationFlag
	var acr []string
	c := &cobra.Command{
		Use:   "login",
		Short: "Sign in, as a person",
		Long: `Login signs you in with the identity provider of the broker at MAYFLY_PEOPLE_ADDR.
It opens your browser and waits, for at most five minutes, until you come back from
it. The browser asks you before it does, and shows what your terminal shows: somebody
else's program on your machine could have sent it there. The session is kept in a file that only you can read, and is never printed.
It is short: the broker says when it ends.

Where there is no browser, --device shows a code to type in on another device.
Such a sign-in never counts where a fresh one is needed. --no-browser shows the
address to open yourself, in a browser on this machine.`,
		Example: "  mayfly login\n  mayfly login --device\n  mayfly login --max-age 5m --acr urn:acme:mfa",
		Args:    none,
	}
	c.Flags().BoolVar(&device, "device", false, "by a code that you type in on another device")
	c.Flags().BoolVar(&noBrowser, "no-browser", false, "show the address, and open no browser")
	c.Flags().Var(&maxAge, "max-age", "ask for a sign-in that is no older than this, such as 5m")
	c.Flags().StringArrayVar(&acr, "acr", nil, "ask for a class of sign-in; may be repeated, the best first")
	c.MarkFlagsMutuallyExclusive("device", "no-browser")
	c.MarkFlagsMutuallyExclusive("device", "max-age")
	c.MarkFlagsMutuallyExclusive("device", "acr")
	return p.onlyForPeople(p.verb(c, func(ctx context.Context, _ []string) error {
		s, _, err := p.signIn(ctx, func(ctx context.Context, c *client.Client) (client.Session, error) {
			if device {
				return p.signInByDevice(ctx, c)
			}
			return p.signInByBrowser(ctx, c, broker.StepUp{MaxAge: time.Duration(maxAge), ACR: acr}, noBrowser)
		})
		if err != nil {
			return err
		}
		return p.show(sessionView{broker.PersonPrincipal(s.Person).String(), s.Groups, s.ExpiresAt, s.AuthTime, s.ACR}, func(out *page) {
			out.line("You are %s. The session ends %s.", s.Person, when(s.ExpiresAt, p.now()))
			if p.getenv(client.EnvToken) != "" {
				out.line("%s is set, and comes before the session.", client.EnvToken)
			}
		})
	}))
}

// signIn has somebody signed in and keeps the session. It returns the
// configuration to come with as that person, too.
func (p *program) signIn(ctx context.Context, how func(context.Context, *client.Client) (client.Session, error)) (client.Session, client.Config, error) {
	cfg, err := p.config()
	if err != nil {
		return client.Session{}, cfg, err
	}
	cfg.Token = broker.Secret{} // nobody is needed for signing in
	c, err := client.New(ctx, cfg)
	if err != nil {
		return client.Session{}, cfg, err
	}
	defer c.Close() // it holds nothing that could be lost
	s, err := how(ctx, c)
	if err != nil {
		return s, cfg, err
	}
	before, none := p.loadSession(cfg.PeopleAddr)
	cfg.Token = s.Token
	if err := p.saveSession(cfg.PeopleAddr, s); err != nil {
		return s, cfg, err
	}
	if none == nil {
		cfg.Token = client.NewToken(before.Token)
		p.endBefore(ctx, cfg)
		cfg.Token = s.Token
	}
	return s, cfg, nil
}

// endBefore ends the session that another took the place of: its token is kept
// nowhere any more, so that no later logout would end it.
func (p *program) endBefore(ctx context.Context, cfg client.Config) {
	c, err := client.New(ctx, cfg)
	if err == nil {
		defer c.Close() // it holds nothing that could be lost
		_, err = c.SignOut(ctx, "", "another sign-in took its place")
	}
	switch broker.ReasonOf(err) {
	case "", broker.ReasonSessionOver, broker.ReasonUnauthenticated: // over is over
	default:
		p.warn("the session before goes on until it expires; it could not be ended: %v", err)
	}
}

func (p *program) signInByBrowser(ctx context.Context, c *client.Client, need broker.StepUp, noBrowser bool) (client.Session, error) {
	info, err := c.SignInInfo(ctx) // a broker that cannot be reached is told here, and not by the browser
	if err != nil {
		return client.Session{}, err
	}
	if info.Sample {
		p.warn("this broker signs in sample people: whoever can reach it is any of them")
	}
	back, ln, err := listenOnLoopback()
	if err != nil {
		return client.Session{}, fmt.Errorf("listening for the browser: %w", err)
	}
	b := c.StartBrowser(back.uri, need)
	back.serve(ln, b.State)
	defer back.close()
	limit := p.signInLimit
	if limit == 0 {
		limit = signInLimit
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	how := "To sign in, open this in a browser on this machine:"
	if !noBrowser && p.openBrowser(b.URL) == nil {
		how = "Sign in in your browser. If it does not open, go to:"
	}
	p.tell(func(out *page) {
		out.line("%s", how)
		out.line("  %s", b.URL)
		out.line("You are asked there whether you want to. Say yes only if it shows: %s", b.Check)
	})
	var s client.Session
	err = back.await(ctx, func(code string) (err error) {
		s, err = c.Redeem(ctx, b, code)
		return err
	})
	return s, err
}

// openBrowser opens an address with the command in BROWSER, or with the
// system's. No shell sees the address.
func (p *program) openBrowser(address string) error {
	command := strings.Fields(p.getenv("BROWSER"))
	if len(command) == 0 {
		command = []string{"xdg-open"}
		if runtime.GOOS == "darwin" {
			command = []string{"open"}
		}
	}
	placed := false
	for i, word := range command {
		if i > 0 && strings.Contains(word, "%s") {
			command[i], placed = strings.ReplaceAll(word, "%s", address), true
		}
	}
	if !placed {
		command = append(command, address)
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = slices.DeleteFunc(slices.Clone(p.environ), func(v string) bool { return strings.HasPrefix(v, client.EnvToken+"=") }) // it is none of the browser's business
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }() // it may live longer than we do; how it ends is nobody's business
	return nil
}

func (p *program) signInByDevice(ctx context.Context, c *client.Client) (client.Session, error) {
	d, err := c.StartDevice(ctx)
	if err != nil {
		return client.Session{}, err
	}
	p.tell(func(out *page) {
		out.line("On any device, open: %s", d.VerificationURI)
		out.line("and type in:         %s", d.UserCode)
		if d.VerificationURIComplete != "" {
			out.line("or open:             %s", d.VerificationURIComplete)
		}
		if !d.ExpiresAt.IsZero() {
			out.line("The code ends %s.", relative(d.ExpiresAt, p.now()))
		}
	})
	limit := 30 * time.Minute // for a broker that does not say
	if !d.ExpiresAt.IsZero() {
		limit = d.ExpiresAt.Sub(p.now())
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for interval := d.Interval; ; {
		timer := time.NewTimer(interval)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return client.Session{}, p.deviceOver(ctx.Err())
		}
		s, err := c.PollDevice(ctx, d)
		switch broker.ReasonOf(err) {
		case broker.ReasonSignInPending:
		case broker.ReasonRateLimited:
			interval += slowDown
		default:
			if err != nil && ctx.Err() != nil {
				return client.Session{}, p.deviceOver(ctx.Err())
			}
			return s, err
		}
	}
}

// deviceOver is the end of a sign-in that nobody finished.
func (p *program) deviceOver(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return broker.Refuse(broker.ReasonSignIn, "the code was not typed in in time", "begin again with `mayfly login --device`")
	}
	return err
}

func (p *program) logoutCommand() *cobra.Command {
	var person, reason string
	c := &cobra.Command{
		Use:   "logout",
		Short: "Sign out: end your session, at the broker and here",
		Long: `Logout ends your session at the broker, at once, and removes what is kept of it
here. With --person, an operator ends all sessions of somebody else, and the tokens
of the identity provider's that they hold.`,
		Example: "  mayfly logout\n  mayfly logout --person mallory@acme.test --reason \"laptop stolen\"",
		Args:    none,
	}
	c.Flags().StringVar(&person, "person", "", "end all sessions of this person (operators)")
	c.Flags().StringVar(&reason, "reason", "", "why, for the evidence")
	return p.onlyForPeople(p.verb(c, func(ctx context.Context, _ []string) error {
		view := struct {
			Sessions int `json:"sessions"`
		}{}
		cfg, err := p.config()
		if err != nil {
			return err
		}
		if person != "" {
			return p.with(ctx, func(c *client.Client) error {
				if view.Sessions, err = c.SignOut(ctx, person, reason); err != nil {
					return err
				}
				return p.show(view, func(out *page) { out.line("%s of %s ended.", count(view.Sessions, "session"), person) })
			})
		}
		err = p.with(ctx, func(c *client.Client) (err error) {
			view.Sessions, err = c.SignOut(ctx, "", reason)
			return err
		})
		switch broker.ReasonOf(err) {
		case "", broker.ReasonSessionOver, broker.ReasonUnauthenticated: // over is over
		default:
			return err // the session is alive, and can be ended as long as it is kept
		}
		if err := p.dropSession(cfg.PeopleAddr); err != nil {
			return err
		}
		return p.show(view, func(out *page) { out.line("You are signed out.") })
	}))
}

// stepUp signs in again whoever c comes as, in the way that the broker wants,
// and returns a client that comes with the new session. The caller closes it.
// Somebody else's sign-in does not finish what was begun.
func (p *program) stepUp(ctx context.Context, c *client.Client, need broker.StepUp, noBrowser bool) (*client.Client, error) {
	before, err := c.WhoAmI(ctx)
	if err != nil {
		return nil, err
	}
	p.tell(func(out *page) { out.line("This needs a fresh sign-in%s.", needText(need)) })
	s, cfg, err := p.signIn(ctx, func(ctx context.Context, c *client.Client) (client.Session, error) {
		return p.signInByBrowser(ctx, c, need, noBrowser)
	})
	if err != nil {
		return nil, err
	}
	if now := broker.PersonPrincipal(s.Person); now != before.Principal {
		return nil, broker.Refusef(broker.ReasonConflict, "if that is right, do it again as who you are now",
			"it was begun by %s, and %s has signed in; nothing was done", clean(before.Principal.String()), clean(now.String()))
	}
	return client.New(ctx, cfg)
}

// needText says what a sign-in must be.
func needText(need broker.StepUp) string {
	var parts []string
	if need.MaxAge > 0 {
		parts = append(parts, "no older than "+span(need.MaxAge))
	}
	if len(need.ACR) > 0 {
		parts = append(parts, "of class "+strings.Join(need.ACR, " or "))
	}
	return inBrackets(strings.Join(parts, ", "))
}
