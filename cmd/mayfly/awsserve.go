package main

import (
	"context"
	"errors"
	"net/http"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker/client"
)

func (p *program) awsServeCommand() *cobra.Command {
	var ask askFlags
	var listen, tokenFile string
	c := &cobra.Command{
		Use:   "serve TOOL",
		Short: "Serve a tool's credentials to AWS SDKs on this machine",
		Long: `Serve is the endpoint that AWS SDKs and the AWS CLI get credentials from in a
container. It prints the two variables that point them to it, and serves until it
is stopped:

  AWS_CONTAINER_CREDENTIALS_FULL_URI      where it is: on loopback, and nowhere else
  AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE  a file with mode 0600 whose content opens it

The lease is in this process's memory, and in no file. It is one for all who ask,
however often. It is renewed before its end, as with "mayfly aws credentials" and a
little earlier by chance, if anybody asked for it since the last time.
A lease that is ended early is not served any more: the broker is asked every 15
seconds whether it lives. When serve is stopped, with INT, TERM or HUP, it gives
the lease back.

Whoever can read the token's file has the tool as long as serve runs. For a single
command, "mayfly aws exec" is the better way.

SDKs come to this only where they find no credentials before: AWS_ACCESS_KEY_ID, a
profile, and ~/.aws/credentials go first. Those from before the end of 2023 (AWS CLI
2.14, boto3 1.32) do not read the file; give them its content:

  export AWS_CONTAINER_AUTHORIZATION_TOKEN="$(cat "$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")"`,
		Example: `  mayfly aws serve s3.read --param customer=c-17 >vars &   # and then: . ./vars
  mayfly aws serve s3.read --listen 127.0.0.1:9911 --token-file /run/app/aws-token`,
		Args:              exactly("TOOL"),
		ValidArgsFunction: p.completeArgs(p.toolNames),
	}
	ask.add(c)
	c.Flags().StringVar(&listen, "listen", "127.0.0.1:0", "where to listen, on loopback; port 0 takes a free one")
	c.Flags().StringVar(&tokenFile, "token-file", "", "the file for the token; default: in a new directory below XDG_RUNTIME_DIR, or the system's for temporary files")
	return p.verb(c, func(ctx context.Context, args []string) error {
		req, err := ask.request(args[0])
		if err != nil {
			return err
		}
		return p.with(ctx, func(c *client.Client) error {
			ready := func(e *awsEndpoint) error { return p.writeToken(e, tokenFile) }
			return p.awsServing(ctx, c, req, listen, ready, func(e *awsEndpoint) error {
				if err := p.tellEndpoint(e); err != nil {
					return err
				}
				select {
				case <-ctx.Done():
					return nil // it was to serve until then
				case err := <-e.done:
					return err
				}
			})
		})
	})
}

// awsServing does something while an endpoint serves. The first lease is there
// before, and is not asked for if the endpoint cannot be made ready.
func (p *program) awsServing(ctx context.Context, c *client.Client, req client.GetRequest, listen string, ready, do func(*awsEndpoint) error) error {
	agent := p.newAWSAgent(ctx, c, req)
	defer agent.close()
	e, err := p.openAWSEndpoint(agent, listen)
	if err != nil {
		return err
	}
	defer e.close()
	if err := ready(e); err != nil {
		return err
	}
	if err := agent.prime(ctx); err != nil {
		return err
	}
	// A command that was sent our signal may take its time, and is served meanwhile.
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	go func() { defer close(ended); agent.run(running) }()
	err = do(e)
	stop()
	<-ended
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (p *program) tellEndpoint(e *awsEndpoint) error {
	if p.output == "json" {
		return writeLine(p.stdout, map[string]string{"uri": e.uri(), "tokenFile": e.file})
	}
	_, err := p.stdout.Write([]byte(exports([]client.Variable{{Name: envContainerTokenFile, Value: e.file}, {Name: envContainerURI, Value: e.uri()}})))
	return err
}
