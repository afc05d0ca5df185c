package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

type svidView struct {
	ID        string    `json:"id"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
	Cert      string    `json:"cert,omitempty"`
	Key       string    `json:"key,omitempty"`
	Bundle    string    `json:"bundle,omitempty"`
}

func (p *program) svidCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "svid",
		Short: "Show your SVID, or write it to files for curl",
		Long: `Svid shows who you are, and until when your SVID is valid. It does not ask the
broker.

With --dir it writes svid.pem, key.pem (mode 0600) and bundle.pem there, for
programs that know no SPIFFE. The files do not renew themselves: write them
again before the SVID ends.`,
		Example: `  mayfly svid
  mayfly svid --dir ~/.mayfly && cd ~/.mayfly && curl --cert svid.pem --key key.pem --cacert bundle.pem \
    -H 'Content-Type: application/json' -d '{}' https://localhost:8443/mayfly.v1.AccessService/WhoAmI`,
		Args: none,
	}
	c.Flags().StringVar(&dir, "dir", "", "the directory to write to; it is made with mode 0700 if it is not there")
	return p.verb(c, func(ctx context.Context, _ []string) error {
		cfg, err := p.config()
		if err != nil {
			return err
		}
		source, err := client.OpenSource(ctx, cfg)
		if err != nil {
			return err
		}
		defer source.Close() // it holds nothing that could be lost
		svid, err := source.GetX509SVID()
		if err != nil {
			return err
		}
		v := svidView{ID: svid.ID.String(), NotBefore: svid.Certificates[0].NotBefore, NotAfter: svid.Certificates[0].NotAfter}
		if dir != "" {
			cert, key, err := svid.Marshal()
			if err != nil {
				return err
			}
			trust, err := source.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
			if err != nil {
				return err
			}
			bundle, err := trust.Marshal()
			if err != nil {
				return err
			}
			v.Cert, v.Key, v.Bundle = filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "bundle.pem")
			if err := writeSVID(dir, map[string][]byte{v.Cert: cert, v.Key: key, v.Bundle: bundle}); err != nil {
				return err
			}
		}
		return p.show(v, func(out *page) {
			out.fields("", "you", v.ID, "valid from", when(v.NotBefore, p.now()), "valid until", when(v.NotAfter, p.now()),
				"SVID", v.Cert, "key", v.Key, "bundle", v.Bundle)
		})
	})
}

// writeSVID writes the files, all with mode 0600. A directory that others may
// write to is refused: they could exchange the bundle.
func writeSVID(dir string, files map[string][]byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("looking at the directory: %w", err)
	}
	if info.Mode().Perm()&0o022 != 0 || !ownedByUs(info) {
		return usagef("%s is not yours alone to write to (mode %04o): choose another directory, or chmod 700 it", dir, info.Mode().Perm())
	}
	var pending []*secretFile
	defer func() {
		for _, f := range pending {
			f.abort()
		}
	}()
	prepared := map[string]*secretFile{}
	for path := range files {
		f, err := newSecretFile(path)
		if err != nil {
			return err
		}
		pending = append(pending, f)
		prepared[path] = f
	}
	var errs []error
	for path, data := range files {
		errs = append(errs, prepared[path].commit(data))
	}
	return errors.Join(errs...)
}
