package secretsmanager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	sm "github.com/aws/aws-sdk-go-v2/service/secretsmanager"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

const handleVersion = 1

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
	if m := arnForm.FindStringSubmatch(h.ARN); m == nil || m[1] != p.config.region || m[2] != p.config.account {
		return h, fmt.Errorf("the handle is of a secret that is not in region %s of account %s", p.config.region, p.config.account)
	}
	return h, nil
}

// Mint implements providers.Provider: it reads one version of the secret. That
// makes nothing, so no failure of it leaves anything to end.
func (p *provider) Mint(ctx context.Context, req providers.MintRequest, record func(providers.Handle) error) (providers.Minted, error) {
	s, err := parseScope(p.config, req.Tool)
	if err != nil {
		return providers.Minted{}, p.refuse(broker.Refusef(broker.ReasonProviderRefused, "give the correlation ID to an operator",
			"the scope of tool %s cannot be read", req.Tool.Name).Because(err))
	}
	name, err := s.name(req.Params)
	if err != nil {
		return providers.Minted{}, p.refuse(err)
	}
	in := &sm.GetSecretValueInput{SecretId: &name}
	if s.version != "" {
		in.VersionId = &s.version
	} else {
		in.VersionStage = &s.stage
	}
	out, err := p.clients.sm.GetSecretValue(ctx, in)
	if f := faultOf("reading secret "+name, err); f != nil {
		return providers.Minted{}, p.nothingRead(ctx, f, req.Tool.Name)
	}
	h := handle{Format: handleVersion, ARN: aws.ToString(out.ARN), Version: aws.ToString(out.VersionId), Rotate: s.rotate}
	if !same(name, h.ARN, aws.ToString(out.Name)) {
		return providers.Minted{}, p.wrong(req.Tool.Name, fmt.Errorf("secret %s was asked for, and AWS gave %s", name, broker.Clean(h.ARN)))
	}
	if out.SecretString == nil {
		return providers.Minted{}, p.wrong(req.Tool.Name, errors.New("the secret is binary, and only text is given"))
	}
	fields, err := s.pick(*out.SecretString)
	if err != nil {
		return providers.Minted{}, p.wrong(req.Tool.Name, err)
	}
	minted := providers.Minted{Secret: broker.NewSecret(fields), Static: true, Survives: s.survives()}
	if minted.Handle, err = json.Marshal(h); err != nil {
		return providers.Minted{}, p.refuse(err)
	}
	if _, err := p.decodeHandle(minted.Handle); err != nil { // what could not be ended later is not given
		return providers.Minted{}, p.wrong(req.Tool.Name, err)
	}
	if err := record(minted.Handle); err != nil {
		return providers.Minted{}, fmt.Errorf("%w: recording the handle: %w", providers.ErrNothingMade, err)
	}
	return minted, nil
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

// refuse is an error of Mint before anything was asked.
func (p *provider) refuse(err error) error {
	return fmt.Errorf("%w: %w: %w", providers.ErrNothingMade, providers.ErrRefused, err)
}

// wrong is that the secret is not as the tool says.
func (p *provider) wrong(tool string, cause error) error {
	return p.refuse(broker.Refusef(broker.ReasonProviderRefused, "give the correlation ID to an operator",
		"the secret of tool %s (provider %s) is not as the catalog says", tool, p.name).Because(cause))
}

// nothingRead tells why a secret was not read, in our own words.
func (p *provider) nothingRead(ctx context.Context, f *fault, tool string) error {
	const (
		later    = "try again later; operators see the cause in the log by correlation ID"
		operator = "give the correlation ID to an operator"
	)
	told := broker.Refusef(broker.ReasonProvider, later, "AWS Secrets Manager (provider %s) did not answer", p.name)
	refused := false
	switch {
	case f.away:
		told = broker.Refusef(broker.ReasonProvider, later, "AWS Secrets Manager (provider %s) takes no requests of the broker's now", p.name)
	case f.code == codeNotFound:
		refused, told = true, broker.Refusef(broker.ReasonProviderRefused, operator, "the secret of tool %s, or its version, is not there (provider %s)", tool, p.name)
	case f.code == "AccessDeniedException":
		refused, told = true, broker.Refusef(broker.ReasonProviderRefused, operator, "AWS (provider %s) does not allow the broker to read the secret of tool %s", p.name, tool)
	case f.code == codeInvalid, f.code == codeDecrypt, f.code == "InvalidParameterException":
		refused, told = true, broker.Refusef(broker.ReasonProviderRefused, operator, "AWS (provider %s) does not give the secret of tool %s", p.name, tool)
	case f.code != "":
		told = broker.Refusef(broker.ReasonProvider, later, "AWS Secrets Manager (provider %s) failed", p.name)
	case ctx.Err() != nil:
		told = broker.Refusef(broker.ReasonProvider, later, "AWS Secrets Manager (provider %s) did not answer in time", p.name)
	}
	err := fmt.Errorf("%w: %w", providers.ErrNothingMade, told.Because(f))
	if refused {
		err = fmt.Errorf("%w: %w", err, providers.ErrRefused)
	}
	return err
}
