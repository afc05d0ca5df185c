// Demo-vault tells the support agent's story with a real Vault and a real
// PostgreSQL: a login of the agent's own appears when it is needed, works for
// exactly one tool, and is gone, with its open session, when the incident
// closes. It exits non-zero if any step is not as told.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
	"github.com/mayfly-security/mayfly/deploy/testbed/acme"
)

// promised is within how long of a close a login must be absent.
const promised = 2 * time.Second

func main() {
	bin := flag.String("bin", "bin", "directory of mayfly and mayflyd")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	err := story.Tell(ctx, *bin, tell)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\nThe demo did not go as told: %v\n", err)
		os.Exit(1)
	}
}

// demo is this story.
type demo struct {
	*story.Story
	world *acme.World
}

func tell(s *story.Story) (err error) {
	d := &demo{Story: s}
	d.Chapter("A PostgreSQL with customers, and a Vault that can make logins to it, start on this machine")
	if err := os.Chmod(s.Dir, 0o755); err != nil { // PostgreSQL runs as a user of its own
		return err
	}
	if d.world, err = acme.Open(s.Ctx, s.Dir, acme.Config{}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.world.Close()) }()
	return d.tell()
}

func (d *demo) tell() error {
	ctx, w := d.Ctx, d.world
	d.Say("Vault is at " + w.Vault.Addr + ", PostgreSQL at " + w.Postgres.Host + ":" + strconv.Itoa(w.Postgres.Port))

	d.Chapter("A broker starts. An operator gives Vault what `mayfly vault setup` prints, and no more")
	if err := w.Serve(d.Story); err != nil {
		return err
	}
	if err := d.showPolicy(); err != nil {
		return err
	}

	d.Chapter("The support agent holds no credential, and it has no grant")
	out, err := d.Mayfly("agent/support", 3, "get", acme.Tool)
	if err != nil {
		return err
	}
	if err := story.Expect(out, "no_grant"); err != nil {
		return err
	}
	if err := d.roles(0); err != nil {
		return err
	}

	d.Chapter("Customers cannot sign in. The pager bot opens an incident, and with it a window")
	out, err = d.Mayfly("bot/pager", 0, "incident", "open", "--title", "Customers cannot sign in", "--ref", "PD-4712",
		"--agent", "spiffe://acme.test/agent/support", "--tool", acme.Tool, "--for", "1h")
	if err != nil {
		return err
	}
	incident := story.IncidentID.FindString(out)
	if incident == "" {
		return errors.New("the answer names no incident")
	}

	d.Chapter("Now the agent gets a login of its own to PostgreSQL, for 15 minutes")
	out, err = d.Mayfly("agent/support", 0, "get", acme.Tool, "--ttl", "15m", "--format", "env", "--reason", "PD-4712: which customers are affected")
	if err != nil {
		return err
	}
	user, err := story.ShellValue(out, "PGUSER")
	if err != nil {
		return err
	}
	password, err := story.ShellValue(out, "PGPASSWORD")
	if err != nil {
		return err
	}
	if err := d.roles(1); err != nil {
		return err
	}
	session, err := w.Connect(ctx, user, password)
	if err != nil {
		return err
	}
	defer session.Close(ctx)
	var name string
	if err := session.QueryRow(ctx, "SELECT name FROM customers WHERE id = 'c-17'").Scan(&name); err != nil {
		return fmt.Errorf("querying as the agent: %w", err)
	}
	d.Say(fmt.Sprintf("%s is in pg_roles, and it works: customer c-17 is %s.", user, name))
	if _, err := session.Exec(ctx, "UPDATE customers SET name = 'Eve' WHERE id = 'c-17'"); err == nil {
		return errors.New("the login may write")
	}
	d.Say("It may read customers and nothing else: an UPDATE is denied. The session stays open.")

	d.Chapter("The incident is over. The bot closes it")
	closing := time.Now()
	if _, err = d.Mayfly("bot/pager", 0, "incident", "close", incident, "--reason", "resolved"); err != nil {
		return err
	}
	took, err := d.gone(closing, user, session)
	if err != nil {
		return err
	}
	d.Say(fmt.Sprintf("%d ms after the bot asked for the close: the session is ended, and %s is absent from pg_roles.", took.Milliseconds(), user))
	if again, err := w.Connect(ctx, user, password); err == nil {
		again.Close(ctx)
		return errors.New("the login still works")
	}
	d.Say("The same user and password, again: refused by PostgreSQL.")

	d.Chapter("Afterwards anybody who may can see what happened, and that it is over")
	if out, err = d.Mayfly("agent/support", 0, "leases", "--all"); err != nil {
		return err
	}
	if err := story.Expect(out, "revoked", "incident_closed"); err != nil {
		return err
	}
	if out, err = d.Mayfly("operator/sam", 0, "audit", "list"); err != nil {
		return err
	}
	if err := story.Expect(out, "request.refused", "incident.opened", "lease.active", "incident.closed", "lease.revoked"); err != nil {
		return err
	}
	if strings.Contains(out, password) {
		return errors.New("the evidence holds the credential")
	}
	fmt.Printf("\nThat was Mayfly with Vault: no login before the reason, none after it.\n" +
		"How to set up your own: docs/vault.md.\n")
	return nil
}

// showPolicy shows the policy of the tool, out of all that is printed.
func (d *demo) showPolicy() error {
	out, err := d.world.Setup(d.Story, "--format", "hcl")
	if err != nil {
		return err
	}
	fmt.Printf("   sam $ mayfly vault setup --catalog catalog.yaml --broker-id spiffe://acme.test/mayfly --format hcl ...\n")
	lines := strings.Split(string(out), "\n")
	const most = 14
	for _, line := range lines[:min(len(lines), most)] {
		fmt.Printf("      %s\n", line)
	}
	fmt.Printf("      ... (%d lines)\n", len(lines))
	d.Say("The operator has applied it.")
	return nil
}

// roles checks how many logins of ours PostgreSQL has.
func (d *demo) roles(want int) error {
	names, err := d.world.Postgres.Roles(d.Ctx, "mf\\_%")
	if err != nil {
		return err
	}
	if len(names) != want {
		return fmt.Errorf("PostgreSQL has %d logins of Mayfly's (%v); %d were expected", len(names), names, want)
	}
	return nil
}

// gone waits until a login is absent from pg_roles and its session is ended,
// and returns how long that took since the close was asked for.
func (d *demo) gone(closing time.Time, user string, session *pgx.Conn) (time.Duration, error) {
	for {
		names, err := d.world.Postgres.Roles(d.Ctx, "mf\\_%")
		if err != nil {
			return 0, err
		}
		took := time.Since(closing)
		if len(names) == 0 {
			if err := session.Ping(d.Ctx); err == nil {
				return 0, errors.New("the open session still works")
			}
			return took, nil
		}
		if took > promised {
			return 0, fmt.Errorf("%s is still there %s after the close", user, took)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
