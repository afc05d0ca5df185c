package secretsmanager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	sm "github.com/aws/aws-sdk-go-v2/service/secretsmanager"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

const (
	handleVersion = 1
	maxSecret     = 64 << 10 // bytes; AWS's own limit
)

// handle is which version of which secret a lease gave. It is no secret.
type handle struct {
	Format  int    `json:"v"`
	ARN     string `json:"arn"`
	Version string `json:"version"`
	Rotate  bool   `json:"rotate,omitempty"`
}

func (p *provider) decodeHandle(raw providers.Handle) (handle, error) {
	var h handle
	if json.Unmarshal(raw, &h) != nil || h.Format != handleVersion || h.Version == "" {
		return h, errors.New("the handle cannot be read by this version")
	}
	if m := arnForm.FindStringSubmatch(h.ARN); m == nil || m[1] != p.config.Region || m[2] != p.config.Account {
		return h, fmt.Errorf("the handle is of a secret that is not in region %s of account %s", p.config.Region, p.config.Account)
	}
	return h, nil
}

// Mint implements providers.Provider: it reads one version of the secret. That
// makes nothing, so no failure of it leaves anything to end.
//
// The end of a lease that rotates takes the value from everybody who has it. So
// there is one such lease of a secret at a time, and none of a secret that could
// not be rotated.
func (p *provider) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	s, err := parseScope(p.config, req.Tool)
	if err != nil {
		return providers.Minted{}, providers.Refused(providers.SayRefused("the scope of tool %s cannot be read", req.Tool.Name).Because(err))
	}
	name, err := s.name(req.Params)
	if err != nil {
		return providers.Minted{}, providers.Refused(err)
	}
	if s.rotate {
		if err := p.rotatable(ctx, name, req); err != nil {
			return providers.Minted{}, err
		}
	}
	h, text, err := p.read(ctx, s, name, req.Tool.Name)
	if err != nil {
		return providers.Minted{}, err
	}
	fields, err := s.pick(text)
	if err != nil {
		return providers.Minted{}, p.wrong(req.Tool.Name, err)
	}
	minted := providers.Minted{Secret: broker.NewSecret(fields), Static: true, Survives: s.survives()}
	if minted.Handle, err = json.Marshal(h); err != nil {
		return providers.Minted{}, providers.Refused(err)
	}
	if _, err := p.decodeHandle(minted.Handle); err != nil { // what could not be ended later is not given
		return providers.Minted{}, p.wrong(req.Tool.Name, err)
	}
	if err := record(minted.Handle); err != nil {
		return providers.Minted{}, fmt.Errorf("%w: recording the handle: %w", providers.ErrNothingMade, err)
	}
	if s.rotate { // again: of two at once, each has recorded its own before it looks for the other's
		if err := p.alone(ctx, h.ARN, req); err != nil {
			return providers.Minted{}, err
		}
	}
	return minted, nil
}

// read reads the version that the scope names, and no other.
func (p *provider) read(ctx context.Context, s scope, name, tool string) (handle, string, error) {
	in := &sm.GetSecretValueInput{SecretId: &name}
	if s.version != "" {
		in.VersionId = &s.version
	} else {
		in.VersionStage = &s.stage
	}
	out, err := p.sm.GetSecretValue(ctx, in)
	if err := awsclient.FaultOf(ctx, "reading secret "+name, err); err != nil {
		return handle{}, "", p.nothingRead(err, tool)
	}
	h := handle{Format: handleVersion, ARN: aws.ToString(out.ARN), Version: aws.ToString(out.VersionId), Rotate: s.rotate}
	switch {
	case !same(name, h.ARN, aws.ToString(out.Name)):
		err = fmt.Errorf("secret %s was asked for, and AWS gave %s", name, broker.Clean(h.ARN))
	case s.version != "" && h.Version != s.version, s.stage != "" && !slices.Contains(out.VersionStages, s.stage):
		err = fmt.Errorf("version %s was asked for, and AWS gave %s", s.version+s.stage, broker.Clean(h.Version))
	case out.SecretString == nil:
		err = errors.New("the secret is binary, and only text is given")
	case len(*out.SecretString) > maxSecret:
		err = fmt.Errorf("the secret has %d bytes; AWS keeps none of more than %d", len(*out.SecretString), maxSecret)
	default:
		return h, *out.SecretString, nil
	}
	return handle{}, "", p.wrong(tool, err)
}

// rotatable refuses a lease whose end could not rotate the secret, or whose value
// is being taken from it already.
func (p *provider) rotatable(ctx context.Context, name string, req providers.MintRequest) error {
	out, err := p.sm.DescribeSecret(ctx, &sm.DescribeSecretInput{SecretId: &name})
	if err := awsclient.FaultOf(ctx, "looking at secret "+name, err); err != nil {
		return p.nothingRead(err, req.Tool.Name)
	}
	arn := aws.ToString(out.ARN)
	switch {
	case !same(name, arn, aws.ToString(out.Name)):
		return p.wrong(req.Tool.Name, fmt.Errorf("secret %s was asked for, and AWS told of %s", name, broker.Clean(arn)))
	case !aws.ToBool(out.RotationEnabled):
		return p.wrong(req.Tool.Name, fmt.Errorf("the scope says rotate, and secret %s has no rotation", arn))
	case pending(out.VersionIdsToStages, currentOf(out.VersionIdsToStages)):
		return p.taken(req.Tool.Name, "is being rotated")
	}
	return p.alone(ctx, arn, req)
}

// alone refuses a lease beside another of the secret that has not ended.
func (p *provider) alone(ctx context.Context, arn string, req providers.MintRequest) error {
	all, err := p.known(ctx, false)
	if err != nil {
		return fmt.Errorf("%w: looking for other leases: %w", providers.ErrNothingMade, err)
	}
	for _, other := range all {
		var h handle
		if other.Lease != req.Lease && json.Unmarshal(other.Handle, &h) == nil && h.ARN == arn {
			return p.taken(req.Tool.Name, "is in use by another lease, whose end rotates it or is disturbed by a rotation")
		}
	}
	return nil
}

// taken is that a lease has to wait.
func (p *provider) taken(tool, why string) error {
	return fmt.Errorf("%w: %w", providers.ErrNothingMade, broker.Refusef(broker.ReasonConflict, "try again when that is over; there is one lease of it at a time",
		"the secret of tool %s (provider %s) %s", tool, p.name, why))
}

// same reports whether AWS gave the secret that was asked for. It takes a part of
// an ARN for the whole, and so may give another whose name begins alike.
func same(asked, arn, name string) bool {
	if !strings.HasPrefix(asked, "arn:") {
		return name == asked
	}
	suffix, ok := strings.CutPrefix(arn, asked)
	return ok && (suffix == "" || len(suffix) == 7 && suffix[0] == '-')
}

// wrong is that the secret is not as the tool says.
func (p *provider) wrong(tool string, cause error) error {
	return providers.Refused(providers.SayRefused(
		"the secret of tool %s (provider %s) is not as the catalog says", tool, p.name).Because(cause))
}

// nothingRead tells why a secret was not read, in our own words.
func (p *provider) nothingRead(cause error, tool string) error {
	var told *broker.Error
	refused := false
	switch awsclient.KindOf(cause) {
	case awsclient.Throttled, awsclient.Login, awsclient.Away:
		told = providers.SayLater("AWS Secrets Manager (provider %s) takes no requests of the broker's now", p.name)
	case awsclient.Missing:
		refused, told = true, providers.SayRefused("the secret of tool %s, or its version, is not there (provider %s)", tool, p.name)
	case awsclient.Denied:
		refused, told = true, providers.SayRefused("AWS (provider %s) does not allow the broker to read the secret of tool %s", p.name, tool)
	case awsclient.Bad:
		refused, told = true, providers.SayRefused("AWS (provider %s) does not give the secret of tool %s", p.name, tool)
	case awsclient.Late:
		told = providers.SayLater("AWS Secrets Manager (provider %s) did not answer in time", p.name)
	case awsclient.Cut:
		told = providers.SayLater("AWS Secrets Manager (provider %s) did not answer", p.name)
	default:
		told = providers.SayLater("AWS Secrets Manager (provider %s) failed", p.name)
	}
	if refused {
		return providers.Refused(told.Because(cause))
	}
	return fmt.Errorf("%w: %w", providers.ErrNothingMade, told.Because(cause))
}
