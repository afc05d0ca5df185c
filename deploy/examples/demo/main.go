// Demo tells Mayfly's main story with the real programs: an agent without a
// grant is refused, an incident opens a window, the agent uses a credential,
// the incident closes, and the credential is dead. It exits non-zero if any
// step is not as told.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
)

func main() {
	bin := flag.String("bin", "bin", "directory of mayfly, mayflyd and examples/crm")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
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
	crm string // the CRM's address
}

func tell(s *story.Story) error {
	d := &demo{Story: s}
	return d.tell()
}

func (d *demo) tell() error {
	d.Chapter("A broker, a trust domain and a CRM start on this machine")
	if err := d.start(); err != nil {
		return err
	}

	d.Chapter("The troubleshooter is an agent. It holds no credential, and it has no grant")
	if _, err := d.Mayfly("agent/troubleshooter", 0, "whoami"); err != nil {
		return err
	}
	out, err := d.Mayfly("agent/troubleshooter", 3, "get", "crm.read", "--param", "customer=c-17")
	if err != nil {
		return err
	}
	if err := story.Expect(out, "no_grant", "grant"); err != nil {
		return err
	}
	d.Say("Refused: with the reason, and with what to do next.")

	d.Chapter("Something breaks. The pager bot opens an incident, and with it a window")
	out, err = d.Mayfly("bot/pager", 0, "incident", "open", "--title", "CRM answers slowly", "--ref", "PD-4711",
		"--agent", "spiffe://acme.test/agent/troubleshooter", "--tool", "crm.read", "--for", "30m")
	if err != nil {
		return err
	}
	incident := story.IncidentID.FindString(out)
	if incident == "" {
		return errors.New("the answer names no incident")
	}

	d.Chapter("Now the agent gets a credential: for one tool, one customer, five minutes")
	out, err = d.Mayfly("agent/troubleshooter", 0, "get", "crm.read", "--param", "customer=c-17", "--ttl", "5m", "--format", "env", "--reason", "looking into PD-4711")
	if err != nil {
		return err
	}
	token, err := story.ShellValue(out, "CRM_TOKEN")
	if err != nil {
		return err
	}
	if out, err = d.crmGet(token, "c-17", 0); err != nil {
		return err
	}
	if err := story.Expect(out, "Ada Lovelace"); err != nil {
		return err
	}
	d.Say("It works. Another customer's record is out of its reach:")
	if _, err = d.crmGet(token, "c-42", 1); err != nil {
		return err
	}

	d.Chapter("The incident is over. The bot closes it")
	if _, err = d.Mayfly("bot/pager", 0, "incident", "close", incident, "--reason", "resolved"); err != nil {
		return err
	}
	closed := time.Now()
	if out, err = d.crmGet(token, "c-17", 1); err != nil {
		return err
	}
	if err := story.Expect(out, "401"); err != nil {
		return err
	}
	took := time.Since(closed)
	if took > time.Second {
		return fmt.Errorf("the credential was refused only %s after the close", took)
	}
	d.Say(fmt.Sprintf("The same credential, asked %d ms after the close: refused.", took.Milliseconds()))

	d.Chapter("Afterwards anybody who may can see what happened, and that it is over")
	if out, err = d.Mayfly("agent/troubleshooter", 0, "leases", "--all"); err != nil {
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
	if strings.Contains(out, token) {
		return errors.New("the evidence holds the credential")
	}
	fmt.Printf("\nThat was Mayfly: access for a reason, for a while, and over when the reason is.\n" +
		"Try it yourself with `bin/mayflyd dev`; the guide is docs/guide.md.\n")
	return nil
}

// start starts the broker and the CRM, and returns when both answer.
func (d *demo) start() error {
	if err := d.StartBroker(); err != nil {
		return err
	}
	ports, err := story.FreePorts(1)
	if err != nil {
		return err
	}
	d.crm = "127.0.0.1:" + ports[0]
	if err := d.Daemon("serving", d.As("service/crm"), filepath.Join(d.Bin, "examples", "crm"), "serve",
		"--addr", d.crm, "--broker", d.Addr); err != nil {
		return err
	}
	d.Say("the CRM serves http://" + d.crm + " and asks Mayfly about every token it is shown")
	return nil
}

// crmGet asks the CRM for a record, as an agent does with its credential.
func (d *demo) crmGet(token, customer string, code int) (string, error) {
	fmt.Printf("   troubleshooter $ crm get %s\n", customer)
	cmd := exec.CommandContext(d.Ctx, filepath.Join(d.Bin, "examples", "crm"), "get", "--addr", d.crm, customer)
	cmd.Env = append(os.Environ(), "CRM_TOKEN="+token)
	return d.Show(cmd, code)
}
