package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
)

// maxAWSConfig bounds what is read of ~/.aws/config, in bytes.
const maxAWSConfig = 4 << 20

// regionName is what a region looks like. Servers that are not AWS have others.
var regionName = regexp.MustCompile(`^[a-z0-9-]{1,50}$`)

type awsConfiguredView struct {
	Profile           string `json:"profile"`
	File              string `json:"file"`
	CredentialProcess string `json:"credentialProcess,omitempty"`
	Region            string `json:"region,omitempty"`
	Changed           bool   `json:"changed"`
}

func (p *program) awsConfigureCommand() *cobra.Command {
	var ask askFlags
	var profile, region string
	var force, noCache, remove bool
	c := &cobra.Command{
		Use:   "configure [TOOL]",
		Short: "Write a profile into ~/.aws/config that gets its credentials from Mayfly",
		Long: `Configure writes one profile into ~/.aws/config, or into the file that
AWS_CONFIG_FILE names. With it the AWS CLI, the AWS SDKs, Terraform and whatever else
is made with them get the tool's credentials by themselves, with no change:

  [profile NAME]
  # written by mayfly aws configure
  credential_process = /usr/bin/mayfly aws credentials s3.read --param customer=c-17
  region = eu-central-1

It asks no broker. --addr, --broker-id, --as and --timeout go into the profile where
they are given; what the environment says is looked up at each use.

Everything else in the file stays as it is, byte for byte; the file is replaced whole
or not at all. Doing it again changes nothing, or what is different: settings that
you added to the profile stay. A profile that mayfly did not write is refused, and
so is one that has keys or a role beside it, because SDKs take those first; with
--force it is replaced. A profile whose name has keys in ~/.aws/credentials is
refused for the same reason: remove them.

With --remove, and no tool, the profile that mayfly wrote is taken out again, with
all that is in it. A lease that is kept for it lives until its end.`,
		Example: `  mayfly aws configure s3.read --profile crm --param customer=c-17 --region eu-central-1
  aws --profile crm s3 ls s3://crm/c-17/
  mayfly aws configure --remove --profile crm`,
		Args: func(cmd *cobra.Command, args []string) error {
			if remove {
				return none(cmd, args)
			}
			return exactly("TOOL")(cmd, args)
		},
		ValidArgsFunction: p.completeArgs(p.toolNames),
	}
	ask.add(c)
	c.Flags().StringVar(&profile, "profile", "", "the profile's name (needed)")
	c.Flags().StringVar(&region, "region", "", "the profile's region; default: none, or what is there")
	c.Flags().BoolVar(&noCache, "no-cache", false, "keep no lease in a file: each use of the profile costs a lease")
	c.Flags().BoolVar(&force, "force", false, "replace a profile that mayfly did not write")
	c.Flags().BoolVar(&remove, "remove", false, "take the profile out again")
	for _, name := range []string{"profile", "region"} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions) // the flag is there: see above
	}
	need(c, "profile")
	return p.verb(c, func(ctx context.Context, args []string) error {
		if !profileName.MatchString(profile) {
			return usagef("--profile %q is no name of a profile: letters, digits and . _ @ + : / -", profile)
		}
		if remove {
			return p.removeAWS(ctx, awsProfile{name: profile})
		}
		req, err := ask.request(args[0])
		if err != nil {
			return err
		}
		if region != "" && !regionName.MatchString(region) {
			return usagef("--region %q is no region, such as eu-central-1", region)
		}
		words := []string{"aws", "credentials", req.Tool}
		for _, pair := range pairs(req.Params) {
			words = append(words, "--param", pair)
		}
		if ask.ttl != 0 {
			words = append(words, "--ttl", ask.ttl.String())
		}
		if ask.reason != "" {
			words = append(words, "--reason", ask.reason)
		}
		if noCache {
			words = append(words, "--no-cache")
		}
		process, err := p.processLine(words)
		if err != nil {
			return err
		}
		w := awsProfile{name: profile, process: process, region: region}
		v, err := p.configureAWS(ctx, w, force)
		if err != nil {
			return err
		}
		return p.show(v, func(out *page) {
			done := "the profile is as it was"
			if v.Changed {
				done = "written"
			}
			out.fields("", "profile", v.Profile, "file", v.File, "credential_process", v.CredentialProcess, "region", v.Region, "", done)
		})
	})
}

// processLine is the line of a credential_process that runs mayfly with the
// words, and with the global flags that were given.
func (p *program) processLine(words []string) (string, error) {
	self, err := ownPath(os.Args[0])
	if err != nil {
		return "", err
	}
	for _, f := range []struct{ name, value string }{
		{"--addr", p.addr}, {"--broker-id", p.brokerID}, {"--as", p.as}, {"--timeout", p.timeout.String()},
	} {
		if f.value != "" {
			words = append(words, f.name, f.value)
		}
	}
	words = append([]string{self}, words...)
	for i, word := range words {
		if words[i], err = processWord(word); err != nil {
			return "", err
		}
	}
	return strings.Join(words, " "), nil
}

// ownPath is where mayfly is: the path that it was called by, if that leads here,
// because a link outlives an upgrade of what it leads to.
func ownPath(called string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("finding out where mayfly is: %w", err)
	}
	called, err = exec.LookPath(called)
	if err != nil {
		return self, nil
	}
	if called, err = filepath.Abs(called); err != nil {
		return self, nil
	}
	a, errA := os.Stat(self)
	b, errB := os.Stat(called)
	if errA != nil || errB != nil || !os.SameFile(a, b) {
		return self, nil
	}
	return called, nil
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// processWord is one word of the line. Some SDKs give the line to a shell, and
// others cut it into words as one would; both know single quotes. A line of the
// file can hold neither line ends nor what begins a comment there.
func processWord(word string) (string, error) {
	switch {
	case plainWord.MatchString(word):
		return word, nil
	case word != clean(word) || strings.ContainsAny(word, "\r\n\t") || strings.Contains(word, " #") || strings.Contains(word, " ;"):
		return "", usagef("%q cannot stand in a profile: it has a line end, a control character, or what begins a comment there", word)
	}
	return quote(word), nil
}

// configureAWS puts the profile into the file.
func (p *program) configureAWS(ctx context.Context, w awsProfile, force bool) (awsConfiguredView, error) {
	if err := p.noKeysFor(w, force); err != nil {
		return awsConfiguredView{}, err
	}
	return p.editAWS(ctx, w, func(path string, before []byte) ([]byte, error) {
		after, state := w.put(before, force)
		switch {
		case state == profileForeign && !force:
			return nil, usagef("%s has a profile %s that mayfly did not write: choose another name, or replace it with --force", path, w.name)
		case state == profileRival && !force:
			return nil, usagef("%s has a profile %s with keys, a role or a sign-in beside what mayfly wrote, which SDKs take first: remove them, or replace the profile with --force", path, w.name)
		case state == profileTwice:
			return nil, usagef("%s has the profile %s more than once: leave one of them", path, w.name)
		}
		return after, nil
	})
}

// removeAWS takes the profile out of the file.
func (p *program) removeAWS(ctx context.Context, w awsProfile) error {
	v, err := p.editAWS(ctx, w, func(path string, before []byte) ([]byte, error) {
		after, state := w.cut(before)
		switch state {
		case profileForeign:
			return nil, usagef("%s has a profile %s that mayfly did not write, and does not remove", path, w.name)
		case profileTwice:
			return nil, usagef("%s has the profile %s more than once: leave one of them", path, w.name)
		}
		return after, nil
	})
	if err != nil {
		return err
	}
	return p.show(v, func(out *page) {
		done := "there was none"
		if v.Changed {
			done = "removed"
		}
		out.fields("", "profile", v.Profile, "file", v.File, "", done)
	})
}

// editAWS changes the file. Of many who do at once, each finds what the others
// have written.
func (p *program) editAWS(ctx context.Context, w awsProfile, edit func(path string, before []byte) ([]byte, error)) (awsConfiguredView, error) {
	path, err := p.awsFile(envAWSConfig, "config")
	if err != nil {
		return awsConfiguredView{}, err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return awsConfiguredView{}, fmt.Errorf("making the directory of %s: %w", path, err)
	}
	unlock, err := lockDir(ctx, dir)
	if err != nil {
		return awsConfiguredView{}, err
	}
	defer unlock()
	before, mode, err := readAWS(path)
	if err != nil {
		return awsConfiguredView{}, err
	}
	after, err := edit(path, before)
	if err != nil {
		return awsConfiguredView{}, err
	}
	v := awsConfiguredView{Profile: w.name, File: path, CredentialProcess: w.process, Region: w.region, Changed: !bytes.Equal(before, after)}
	if !v.Changed {
		return v, nil
	}
	return v, replaceAWS(path, before, after, mode)
}

// awsFile is a file of AWS's configuration. A link to it is followed: it stays,
// and what it leads to is written.
func (p *program) awsFile(variable, name string) (string, error) {
	path := p.getenv(variable)
	if path == "" {
		home := p.getenv("HOME")
		if !filepath.IsAbs(home) {
			return "", usagef("neither %s nor HOME says where AWS's configuration is", variable)
		}
		path = filepath.Join(home, ".aws", name)
	} else if rest, ok := strings.CutPrefix(path, "~/"); ok {
		path = filepath.Join(p.getenv("HOME"), rest)
	}
	real, err := filepath.EvalSymlinks(path)
	switch {
	case err == nil:
		return real, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("looking for %s: %w", path, err)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		return "", usagef("%s is a link that leads nowhere", path)
	}
	return path, nil
}

// readAWS reads a file of AWS's configuration; one that is not there is empty.
func readAWS(path string) ([]byte, fs.FileMode, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, 0o600, nil
	case err != nil:
		return nil, 0, fmt.Errorf("reading %s: %w", path, err)
	case !info.Mode().IsRegular() || info.Size() > maxAWSConfig:
		return nil, 0, usagef("%s is no plain file, or too large to be AWS's configuration", path)
	case !ownedByUs(info):
		return nil, 0, usagef("%s belongs to another user", path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, 0, fmt.Errorf("reading %s: %w", path, err)
	}
	return text, info.Mode().Perm(), nil
}

// noKeysFor refuses a profile whose name has keys in the file for credentials:
// SDKs take those first, and would never ask us.
func (p *program) noKeysFor(w awsProfile, force bool) error {
	path, err := p.awsFile(envAWSCredentials, "credentials")
	if err != nil {
		return err
	}
	text, _, err := readAWS(path)
	if err != nil {
		return err
	}
	if _, _, state := w.find(strings.SplitAfter(string(text), "\n"), true); state == profileAbsent {
		return nil
	}
	if !force {
		return usagef("%s has a profile %s, whose keys SDKs take before any credential_process: remove it there, or choose another name", path, w.name)
	}
	p.warn("%s has a profile %s, whose keys SDKs take before what is written now: remove it there", path, w.name)
	return nil
}

// replaceAWS puts the new file in the place of the old one, if that is as it was
// when it was read.
func replaceAWS(path string, before, after []byte, mode fs.FileMode) (err error) {
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = temp.Close() // closed or not, it goes
			_ = os.Remove(temp.Name())
		}
	}()
	_, err = temp.Write(after)
	if err == nil {
		err = errors.Join(temp.Chmod(mode), temp.Sync())
	}
	if err = errors.Join(err, temp.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	now, _, err := readAWS(path)
	if err != nil {
		return err
	}
	if !bytes.Equal(now, before) {
		return &exitError{exitUnavailable, fmt.Errorf("somebody else was writing %s: try again", path)}
	}
	if err := os.Rename(temp.Name(), path); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
