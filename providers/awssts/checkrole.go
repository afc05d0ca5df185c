package awssts

import (
	"context"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/iam"

	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// role looks at one role. An error means that AWS does not answer.
func (c *check) role(ctx context.Context, r *checked) error {
	lives, there, err := c.about(ctx, r)
	if err != nil || !there {
		return err
	}
	if c.config.Early.Mode == awsscope.EarlyDenyList {
		ok, err := c.quota(ctx, r)
		if err != nil {
			return err
		}
		if ok {
			if err := c.writes(ctx, r); err != nil {
				return err
			}
		}
	}
	ok, err := c.sessions(ctx, r, lives)
	if err != nil || !ok || c.config.Early.Verify != awsscope.VerifyProbe {
		return err
	}
	return c.probes(ctx, r)
}

// about compares the role itself. lives is the longest session to ask for.
func (c *check) about(ctx context.Context, r *checked) (lives time.Duration, there bool, err error) {
	lives = r.longest()
	out, err := c.clients.iam.GetRole(ctx, &iam.GetRoleInput{RoleName: &r.role.Name})
	err = awsclient.FaultOf(ctx, "reading role "+r.role.Name, err)
	switch {
	case awsclient.KindOf(err) == awsclient.Missing:
		c.bad("", fixSetup, "%s is not there", r)
		return 0, false, nil
	case awsclient.KindOf(err) == awsclient.Denied:
		c.note("", fmt.Sprintf(fixRead, r.role.Name), "%s: its path, boundary, longest session and trust policy were not compared: the broker may not read them", r)
		return lives, true, nil
	case err != nil:
		return 0, false, err
	}
	role := out.Role
	if arn := aws.ToString(role.Arn); arn != r.role.ARN {
		c.bad("", "name the role in the catalog as IAM does, or make it anew below role_path", "%s: the catalog names %s, and what IAM has by that name is %s", r, r.role.ARN, arn)
		return 0, false, nil
	}
	const bound = "attach the boundary (deploy/aws has one): what tools are for, no IAM, no sts:AssumeRole"
	switch b := role.PermissionsBoundary; {
	case b != nil && aws.ToString(b.PermissionsBoundaryArn) != "":
		c.note("", "", "%s: its boundary is %s; what that allows is what a broker that was taken over could bring about, and was not looked at", r, aws.ToString(b.PermissionsBoundaryArn))
	case c.config.Early.Mode == awsscope.EarlyDenyList:
		c.bad("", bound, "%s has no permissions boundary: the broker writes its policies, and nothing bounds what they can allow", r)
	default:
		c.note("", bound, "%s has no permissions boundary", r)
	}
	if longest := time.Duration(aws.ToInt32(role.MaxSessionDuration)) * time.Second; longest > 0 && longest < lives {
		c.bad("", fmt.Sprintf("aws iam update-role --role-name %s --max-session-duration %d, or lower max_ttl", r.role.Name, int(lives.Seconds())),
			"%s: its sessions live at most %s (MaxSessionDuration), and a tool's max_ttl is %s", r, longest, lives)
		lives = longest
	}
	c.trust(r, aws.ToString(role.AssumeRolePolicyDocument))
	return lives, true, nil
}
