//go:build unix

package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/deploy/testbed"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/token"
	"github.com/mayfly-security/mayfly/providers/vault"
	"github.com/mayfly-security/mayfly/providers/vault/vaultscope"
)

// setUp prepares Vault and PostgreSQL as an operator does: with what `mayfly
// vault setup` prints for the catalog and the installation, and nothing else.
func (w *world) setUp(ctx context.Context, catalogPath string, installation broker.InstallationID) error {
	snapshot, err := catalog.Load([]string{catalogPath}, map[string]providers.Driver{"token": token.Driver{}, "vault": vault.Driver{}})
	if err != nil {
		return err
	}
	setup, err := w.setupOf(snapshot, installation)
	if err != nil {
		return err
	}
	for _, script := range setup.Scripts {
		if err := w.pg.Exec(ctx, testbed.DatabaseName, script.SQL); err != nil {
			return fmt.Errorf("setting PostgreSQL up: %w", err)
		}
	}
	if err := w.pg.Exec(ctx, testbed.DatabaseName, "ALTER ROLE "+sweepLogin+" PASSWORD '"+sweepPassword+"'"); err != nil {
		return fmt.Errorf("setting PostgreSQL up: %w", err)
	}
	for _, each := range setup.Writes {
		_, err := w.vault.Client().Logical().WriteWithContext(ctx, each.Path, each.Body)
		if err != nil && !(each.Kind == vaultscope.WriteMount && strings.Contains(err.Error(), "path is already in use")) {
			return fmt.Errorf("setting Vault up: writing %s: %w", each.Path, err)
		}
	}
	return nil
}

func (w *world) setupOf(snapshot *catalog.Snapshot, installation broker.InstallationID) (*vaultscope.Setup, error) {
	keys, err := w.jwtKeys()
	if err != nil {
		return nil, err
	}
	for _, p := range snapshot.Providers() {
		if p.Driver != "vault" {
			continue
		}
		config, err := vaultscope.ParseConfig(p.Config)
		if err != nil {
			return nil, err
		}
		var tools []broker.Tool
		for _, t := range snapshot.Tools() {
			if t.Provider == p.Name {
				tools = append(tools, t)
			}
		}
		return vaultscope.NewSetup(config, tools, vaultscope.Options{
			Broker: brokerID, Installation: installation, PublicKeys: keys,
			Connection: testbed.DatabaseName, VaultLogin: testbed.AdminLogin,
		})
	}
	return nil, errors.New("the catalog has no Vault")
}

// jwtKeys are the keys that the broker's JWT-SVIDs are verified with.
func (w *world) jwtKeys() ([]string, error) {
	var keys []string
	for _, key := range w.people.trust.Bundle().JWTAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, err
		}
		keys = append(keys, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	}
	return keys, nil
}
