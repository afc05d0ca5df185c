package awssts

import (
	"context"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// login tells as whom the check looks. ok is false where the broker cannot log
// in, with a finding.
func (c *check) login(ctx context.Context) (ok bool, err error) {
	out, err := c.clients.sts.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err = awsclient.FaultOf(ctx, "asking AWS who the broker is", err); err != nil {
		if unanswered(err) || awsclient.KindOf(err) == awsclient.Region {
			return false, err
		}
		return false, c.noLogin(err)
	}
	c.caller = aws.ToString(out.Arn)
	chained := strings.Contains(c.caller, ":assumed-role/")
	if c.config.Credentials.Method == awsaccess.MethodDefault {
		c.note("", "", "looked as %s: with method default these are the credentials of who runs the check, which need not be the broker's", c.caller)
	} else {
		c.note("", "", "looked as %s", c.caller)
	}
	if account := aws.ToString(out.Account); account != c.config.Account {
		if c.config.Early.Mode == awsscope.EarlyDenyList {
			c.bad("", "give the broker a role in account "+c.config.Account, "the broker is of account %s, and the tools' roles are in account %s: IAM writes policies of its caller's own account alone, so that no deny list can be written", account, c.config.Account)
			return false, nil
		}
		c.note("", "", "the broker is of account %s, and the tools' roles are in account %s", account, c.config.Account)
	}
	switch {
	case strings.HasSuffix(c.caller, ":root"):
		c.bad("", fixSetup, "the broker's credentials are those of the account's root user")
	case chained && !c.config.Chained:
		c.bad("", "leave chained out, and set max_session and max_ttl to 1h at most", "credentials.chained is false, and the broker's credentials are a role's: AWS gives them sessions of at most 1h")
	case !chained:
		c.note("", "prefer web_identity, or a role", "the broker's credentials are static keys, of a user: whoever has them is the broker until they are changed")
	}
	return true, nil
}

// noLogin tells why the broker cannot log in.
func (c *check) noLogin(err error) error {
	f := awsclient.AsFault(err)
	text := f.Error()
	fix := "see that the credentials of method " + c.config.Credentials.Method + " are there and are valid"
	if c.config.Credentials.Method == awsaccess.MethodWebIdentity {
		fix = "compare the broker's role with deploy/aws"
		switch {
		case strings.Contains(text, "InvalidIdentityToken"):
			fix = fmt.Sprintf("see that IAM has an OIDC provider for the issuer of the broker's JWT-SVIDs, with the audience %s, and that the issuer's discovery document has the keys that sign them", c.config.Credentials.Audience)
		case strings.Contains(text, "IDPCommunicationError"):
			fix = "AWS must reach the issuer's discovery document, over the internet and with a certificate that it trusts"
		case strings.Contains(text, "AccessDenied"):
			fix = fmt.Sprintf("the trust policy of %s must allow sts:AssumeRoleWithWebIdentity to the broker's SPIFFE ID (sub) and the audience %s (aud)", c.config.Credentials.RoleARN, c.config.Credentials.Audience)
		case !strings.Contains(text, "api error"):
			return err // nobody at AWS was asked, or answered
		}
	}
	c.bad("", fix, "the broker cannot log in %s", said(err))
	return nil
}
