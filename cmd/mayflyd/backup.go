package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

func backupCommand() *cobra.Command {
	var which storeFlags
	cmd := &cobra.Command{
		Use:   "backup OUT",
		Short: "Copy the store, while the broker runs or not",
		Long: `Backup writes a consistent copy of the broker's store to the file OUT, while the
broker runs; it is evidence, with your user ID. The copy is checked, is there
whole or not at all, has mode 0600, and takes the place of no file. If no broker
runs, the store is read as it lies there.

The copy is marked as a backup: the broker that is started on it restores. To
restore, stop the broker, put the copy where the store was, and start it. Every
grant and incident of before is ended, every lease that had not ended is revoked,
and what providers have that the copy does not know is listed by "mayfly strays".

A copy that was made in another way (cp, a snapshot of the disk) has no mark and
would bring grants back to life that were withdrawn since: give it to backup with
--store first. Never start a copy beside the broker that it is of: both would end
each other's leases.`,
		Example: "  mayflyd backup --config /etc/mayfly/mayflyd.yaml /var/backups/mayfly-monday.db\n" +
			"  mayflyd backup --store snapshot/mayfly.db /var/backups/mayfly-snapshot.db",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := which.path()
			if err != nil {
				return err
			}
			return backup{store: path, out: args[0], say: cmd.OutOrStdout(), warn: cmd.ErrOrStderr()}.run(cmd.Context())
		},
	}
	which.add(cmd)
	return cmd
}

// backup is one run of the command.
type backup struct {
	store, out string
	say, warn  io.Writer
}

// made says of what was copied when that was, and who had it made.
type made struct {
	at    time.Time
	by    string
	bytes int64
}

func (b backup) run(ctx context.Context) (err error) {
	if _, err := os.Stat(b.store); err != nil {
		return fmt.Errorf("there is no store to back up: %w", err)
	}
	if _, err := os.Lstat(b.out); err == nil {
		return fmt.Errorf("%s is there already, and a backup takes the place of nothing: give another name", b.out)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tmp := b.out + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there: another backup to that name is being made, or one was cut off; if so, remove it", tmp)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp) // the error that matters is the one before
		}
	}()
	m, err := b.copy(ctx, f)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := finishBackup(ctx, tmp, m); err != nil {
		return err
	}
	if err := putWithoutReplacing(tmp, b.out); err != nil {
		return err
	}
	_, err = fmt.Fprintf(b.say, "%s is a backup of %s, made at %s (%d bytes).\nTo restore it: stop the broker, put it in the place of %s, and start the broker.\n",
		b.out, b.store, m.at.UTC().Format(time.RFC3339), m.bytes, b.store)
	return err
}

// copy writes the store to f: the broker's snapshot if one has it open, and
// what lies there if none has.
func (b backup) copy(ctx context.Context, f io.Writer) (made, error) {
	conn, err := dialControl(ctx, b.store)
	switch {
	case err == nil:
		defer conn.Close()
		return b.fromBroker(ctx, conn, f)
	case errors.Is(err, fs.ErrPermission):
		return made{}, fmt.Errorf("asking the broker: %w: run this as root, or as the broker's user", err)
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED):
		return made{}, fmt.Errorf("asking the broker: %w", err)
	}
	m := made{at: time.Now(), by: fmt.Sprintf("uid:%d", os.Getuid())}
	m.bytes, err = bolt.CopyTo(b.store, stoppable{ctx, f})
	if errors.Is(err, store.ErrInUse) {
		err = fmt.Errorf("%w, and it does not answer at %s (its log says why, if it has no control socket)", err, controlPath(b.store))
	}
	return m, err
}

// fromBroker asks the broker at the other end of conn for a snapshot.
func (b backup) fromBroker(ctx context.Context, conn net.Conn, f io.Writer) (made, error) {
	transport := &http.Transport{
		DialContext:        func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		DisableCompression: true, DisableKeepAlives: true,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://mayflyd/v1/backup", nil)
	if err != nil {
		return made{}, err
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return made{}, fmt.Errorf("asking the broker: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 2000)) // what could be read is what is said
		return made{}, fmt.Errorf("the broker made no backup: %s", broker.Clean(strings.TrimSpace(string(text))))
	}
	m := made{by: broker.Clean(broker.Shorten(res.Header.Get(headerBackupBy), 64))}
	if m.at, err = time.Parse(time.RFC3339Nano, res.Header.Get(headerBackupTime)); err != nil {
		return made{}, fmt.Errorf("reading the broker's answer: %w", err)
	}
	if m.bytes, err = io.Copy(f, res.Body); err != nil {
		return made{}, fmt.Errorf("taking the backup from the broker: %w", err)
	}
	if res.Header.Get(headerBackupNoted) == "no" {
		fmt.Fprintln(b.warn, "mayflyd: the broker could not write to its evidence that this backup was made; see its log")
	}
	return m, nil
}

// stoppable is a writer that fails when ctx is over.
type stoppable struct {
	ctx context.Context
	w   io.Writer
}

func (s stoppable) Write(b []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	return s.w.Write(b)
}

// finishBackup marks the copy and then checks the whole of it. The mark comes
// first: what a kill leaves is to restore, too, if somebody takes it for a backup.
func finishBackup(ctx context.Context, path string, m made) (err error) {
	db, err := bolt.Open(path, bolt.Config{})
	if err != nil {
		return fmt.Errorf("checking the backup: %w", err)
	}
	defer func() {
		if p := recover(); p != nil { // bbolt does, on some damage
			err = fmt.Errorf("checking the backup: the store is damaged: %v", p)
		}
	}()
	if err = lease.MarkBackup(ctx, db, m.at, m.by); err == nil {
		if err = db.Check(ctx); err != nil {
			err = fmt.Errorf("checking the backup: the store is damaged: %w", err)
		}
	}
	return errors.Join(err, db.Close())
}

// putWithoutReplacing gives the file its name for good, unless something has
// got that name meanwhile.
func putWithoutReplacing(tmp, out string) error {
	err := os.Link(tmp, out) // unlike a rename, it takes the place of nothing
	switch {
	case err == nil:
		err = os.Remove(tmp)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%s has come into being meanwhile, and a backup takes the place of nothing: give another name", out)
	default: // a file system without links
		if _, there := os.Lstat(out); there == nil {
			return fmt.Errorf("%s has come into being meanwhile, and a backup takes the place of nothing: give another name", out)
		}
		err = os.Rename(tmp, out)
	}
	if err != nil {
		return fmt.Errorf("naming the backup: %w", err)
	}
	dir, err := os.Open(filepath.Dir(out))
	if err != nil {
		return fmt.Errorf("making the backup's name last: %w", err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}
