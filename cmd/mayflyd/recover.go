package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
)

func recoverCommand() *cobra.Command {
	var which storeFlags
	var principal, reason string
	var d time.Duration
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Let one principal administer for a while, whatever the policies say",
		Long: `Recover lets one principal administer a running broker for a while, although no
policy does: the way back in where a policy set let the wrong people in, or
nobody. It is for root and the broker's user on the broker's host; the broker
says it loudly in its log, and it is evidence, with your user ID.

The principal is "person:" and the name of a person who can sign in, or a SPIFFE
ID. What they may do is administer: nobody gets a credential by it.`,
		Example: "  mayflyd recover --config /etc/mayfly/mayflyd.yaml --principal person:olga@acme.test --for 30m --reason \"the last policy set locked us out\"",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			said, err := which.ask(cmd.Context(), "/v1/recover", url.Values{"principal": {principal}, "for": {d.String()}, "reason": {reason}})
			if err == nil {
				_, err = fmt.Fprint(cmd.OutOrStdout(), said)
			}
			return err
		},
	}
	which.add(cmd)
	cmd.Flags().StringVar(&principal, "principal", "", `who: "person:NAME" or a SPIFFE ID`)
	cmd.Flags().DurationVar(&d, "for", 30*time.Minute, "for how long, at most 1h")
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the evidence")
	_ = cmd.MarkFlagRequired("principal") // fails only for a flag that is not defined
	_ = cmd.MarkFlagRequired("reason")    // likewise
	return cmd
}

// storeFlags say whose control socket is meant.
type storeFlags struct{ config, dir, file string }

func (f *storeFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config, "config", "", "the broker's configuration file")
	cmd.Flags().StringVar(&f.dir, "dir", "", "the state directory of mayflyd dev")
	cmd.Flags().StringVar(&f.file, "store", "", "the store's file itself")
	cmd.MarkFlagsMutuallyExclusive("config", "dir", "store")
	cmd.MarkFlagsOneRequired("config", "dir", "store")
}

// path is the store's file.
func (f *storeFlags) path() (string, error) {
	switch {
	case f.config != "":
		s, err := readConfig(f.config)
		return s.store, err
	case f.dir != "":
		return filepath.Join(f.dir, devStore), nil
	}
	return f.file, nil
}

// ask sends a form to the broker that has the store open, and gives its answer.
func (f *storeFlags) ask(ctx context.Context, path string, form url.Values) (string, error) {
	db, err := f.path()
	if err != nil {
		return "", err
	}
	conn, err := dialControl(ctx, db)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return "", fmt.Errorf("no broker answers at %s: start it first", controlPath(db))
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("asking the broker: %w: run this as root, or as the broker's user", err)
	case err != nil:
		return "", fmt.Errorf("asking the broker: %w", err)
	}
	defer conn.Close()
	transport := &http.Transport{
		DialContext:        func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		DisableCompression: true, DisableKeepAlives: true,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://mayflyd"+path, strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	res, err := transport.RoundTrip(req)
	if err != nil {
		return "", fmt.Errorf("asking the broker: %w", err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 16<<10))
	if err != nil {
		return "", fmt.Errorf("reading the broker's answer: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the broker refused: %s", broker.Clean(strings.TrimSpace(broker.Shorten(string(text), 2000))))
	}
	return string(text), nil
}

// recover lets a principal administer. The caller is root or the broker's user.
func (c *control) recover(w http.ResponseWriter, r *http.Request) {
	actor := "uid:" + r.RemoteAddr // see peerConn
	p, reason := broker.Principal(r.PostFormValue("principal")), r.PostFormValue("reason")
	d, err := time.ParseDuration(r.PostFormValue("for"))
	if err != nil {
		http.Error(w, "the duration is malformed", http.StatusBadRequest)
		return
	}
	if strings.TrimSpace(reason) == "" {
		http.Error(w, "there is no reason, which is what others will read: give one with --reason", http.StatusBadRequest)
		return
	}
	if err := c.engine.Recover(r.Context(), p, d, reason, actor); err != nil {
		status := http.StatusServiceUnavailable
		if broker.ReasonOf(err) == broker.ReasonInvalidArgument {
			status = http.StatusBadRequest
		}
		c.log.Error("opening a recovery", "actor", actor, "error", err)
		http.Error(w, sentence(err).Error(), status)
		return
	}
	until := c.engine.Now().Add(d).UTC().Format(time.RFC3339)
	fmt.Fprintf(w, "%s may administer until %s, whatever the policies say.\nIt is in the evidence, with who opened it: %s.\n", p, until, actor)
}
