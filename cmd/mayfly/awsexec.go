package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

// foreignAWS are variables with which an SDK would find other credentials, and
// find them first.
var foreignAWS = []string{
	"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ACCESS_KEY", "AWS_SECRET_KEY",
	"AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CREDENTIAL_EXPIRATION",
	"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", envContainerTokenFile, "AWS_CREDENTIAL_FILE",
}

// bearerPrefix begins the variables with tokens that one service of AWS takes in
// the place of credentials, such as AWS_BEARER_TOKEN_BEDROCK.
const bearerPrefix = "AWS_BEARER_TOKEN_"

const (
	envAWSConfig      = "AWS_CONFIG_FILE"
	envAWSCredentials = "AWS_SHARED_CREDENTIALS_FILE"
	envBoto           = "BOTO_CONFIG" // without it Python's SDK looks into /etc/boto.cfg and ~/.boto before it asks an endpoint
)

func (p *program) awsExecCommand() *cobra.Command {
	var ask askFlags
	var region string
	var keepConfig, passIdentity bool
	c := &cobra.Command{
		Use:   "exec TOOL [flags] -- COMMAND [ARG...]",
		Short: "Run one command whose AWS SDK gets a tool's credentials as it needs them",
		Long: `Exec runs a command beside the endpoint of "mayfly aws serve", with the two variables
set that point the AWS CLI and the AWS SDKs to it. The command may run longer than a
lease lives: its SDK asks the endpoint, and gets the next one. When the command ends,
however it ends, the lease is given back.

An SDK looks for credentials in other places first. So that the command has this one
tool and nothing else, the variables that name other credentials are taken out of
its environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ROLE_ARN and the like), and
AWS_CONFIG_FILE, AWS_SHARED_CREDENTIALS_FILE and BOTO_CONFIG are set to an empty
file. With --keep-config these stay as they are, for the sake of settings that are
there; credentials that are there then go first.

The endpoint's token is in the command's environment (AWS_CONTAINER_AUTHORIZATION_TOKEN)
and in no file: SDKs from before the end of 2023 read none. It opens the endpoint on
this machine while the command runs, and nothing afterwards.

Everything else is as with "mayfly exec": your identity is taken out of the
environment, signals go to the command, and the exit code is the command's.`,
		Example: `  mayfly aws exec s3.read --param customer=c-17 --region eu-central-1 -- aws s3 ls s3://crm/c-17/
  mayfly aws exec s3.read --ttl 15m -- ./nightly-report.py
  mayfly aws exec infra.plan -- terraform plan`,
		ValidArgsFunction:     p.completeExec,
		DisableFlagsInUseLine: true, // they are in it
	}
	c.Args = func(cmd *cobra.Command, args []string) error {
		if cmd.ArgsLenAtDash() != 1 || len(args) < 2 {
			return &exitError{exitExec, errors.New("use it as: mayfly aws exec TOOL [flags] -- COMMAND [ARG...]")}
		}
		return nil
	}
	ask.add(c)
	c.Flags().StringVar(&region, "region", "", "sets AWS_REGION and AWS_DEFAULT_REGION for the command")
	_ = c.RegisterFlagCompletionFunc("region", cobra.NoFileCompletions) // the flag is there: see above
	c.Flags().BoolVar(&keepConfig, "keep-config", false, "leave AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE, or their defaults in ~/.aws, to the command")
	c.Flags().BoolVar(&passIdentity, "pass-identity", false, "leave MAYFLY_* and SPIFFE_ENDPOINT_SOCKET in the command's environment")
	p.verb(c, func(ctx context.Context, args []string) error {
		req, err := ask.request(args[0])
		if err != nil {
			return err
		}
		path, err := exec.LookPath(args[1])
		if err != nil {
			return startFailure(args[1], err)
		}
		r := runner{p: p, passIdentity: passIdentity}
		signals := listen()
		defer signals.stop()
		code := 0
		err = p.with(ctx, func(c *client.Client) error {
			var env []string
			ready := func(e *awsEndpoint) error {
				vars, err := p.commandVariables(e, region, keepConfig)
				env = withoutForeign(r.environ(vars))
				return err
			}
			return p.awsServing(ctx, c, req, "127.0.0.1:0", ready, func(*awsEndpoint) (err error) {
				code, err = r.command(path, args[1:], env, signals, nil, nil)
				return err
			})
		})
		if err == nil && code != 0 {
			return &exitError{code: code}
		}
		return err
	})
	return runsCommand(c)
}

// commandVariables are the variables of a command that has these credentials and
// no others. The token is in them, and in no file: SDKs that were made before the
// end of 2023, the AWS CLI and boto3 of Debian 12 among them, read none.
func (p *program) commandVariables(e *awsEndpoint, region string, keepConfig bool) ([]client.Variable, error) {
	vars := []client.Variable{{Name: envContainerToken, Value: e.token}, {Name: envContainerURI, Value: e.uri()}}
	if region != "" {
		vars = append(vars, client.Variable{Name: "AWS_REGION", Value: region}, client.Variable{Name: "AWS_DEFAULT_REGION", Value: region})
	}
	if keepConfig {
		return vars, nil
	}
	dir, err := p.placeOf(e)
	if err != nil {
		return nil, err
	}
	// An empty file, and not none: some SDKs take that for an error.
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		return nil, err
	}
	for _, name := range []string{envAWSConfig, envAWSCredentials, envBoto} {
		vars = append(vars, client.Variable{Name: name, Value: empty})
	}
	return vars, nil
}

// withoutForeign is an environment without other credentials for AWS.
func withoutForeign(environ []string) []string {
	return slices.DeleteFunc(environ, func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return slices.Contains(foreignAWS, name) || strings.HasPrefix(name, bearerPrefix)
	})
}
