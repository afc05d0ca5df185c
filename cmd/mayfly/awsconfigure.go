package main

import (
	"context"
	"regexp"

	"github.com/spf13/cobra"
)

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
