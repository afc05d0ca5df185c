package awssts

import (
	"fmt"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

// told is what an agent is told of a kind: our own words, never AWS's.
func (p *provider) told(k awsclient.Kind, tool string) *broker.Error {
	switch k {
	case awsclient.Away:
		return providers.SayLater("AWS STS (provider %s) cannot be reached", p.name)
	case awsclient.Throttled:
		return providers.SayLater("AWS STS (provider %s) takes no more requests for the moment", p.name)
	case awsclient.Login:
		return providers.SayLater("the broker cannot log in to AWS (provider %s)", p.name)
	case awsclient.Denied:
		return providers.SayRefused("AWS (provider %s) does not allow the broker to make a session for %s: the role's trust policy must allow it sts:AssumeRole, sts:TagSession and sts:SetSourceIdentity", p.name, tool)
	case awsclient.Missing:
		return providers.SayRefused("the role of tool %s is not there in AWS (provider %s)", tool, p.name)
	case awsclient.TooLarge:
		return providers.SayRefused("the catalog's tool %s has too many permissions for a session: AWS (provider %s) says that policy and tags are too large when packed; an operator shortens the tool's statements", tool, p.name)
	case awsclient.Malformed:
		return providers.SayRefused("the catalog's tool %s has statements that AWS (provider %s) cannot read", tool, p.name)
	case awsclient.Region:
		return providers.SayRefused("AWS STS is not active in the region of provider %s", p.name)
	case awsclient.Bad, awsclient.Full:
		return providers.SayRefused("AWS (provider %s) refuses what tool %s asks for", p.name, tool)
	case awsclient.Late:
		return providers.SayLater("AWS STS (provider %s) did not answer in time", p.name)
	case awsclient.Cut:
		return providers.SayLater("the connection to AWS STS (provider %s) broke", p.name)
	}
	return providers.SayLater("AWS STS (provider %s) failed", p.name)
}

// nothingMade is an error of Mint where nothing was made.
func (p *provider) nothingMade(tool string, cause error) error {
	k := awsclient.KindOf(cause)
	told := p.told(k, tool).Because(cause)
	switch k {
	case awsclient.Away, awsclient.Throttled, awsclient.Login:
		return fmt.Errorf("%w: %w", providers.ErrNothingMade, told)
	}
	return providers.Refused(told)
}
