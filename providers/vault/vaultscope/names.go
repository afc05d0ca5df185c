package vaultscope

import (
	"strings"

	"github.com/mayfly-security/mayfly/broker"
)

// installationLength is how many characters of an installation's ID are in
// names: the last ones, which are random. PostgreSQL's names have 63 bytes.
const installationLength = 9

// rolePrefix begins the name of every role that Vault makes in PostgreSQL for
// Mayfly, of whichever installation.
const rolePrefix = "mf_"

// TokenRole is the name of the token role of a tool. No two tools of one
// provider have the same.
func (c Config) TokenRole(tool string) string { return c.Prefix + tool }

// Policy is the name of the policy that tokens of the tool's role have: the
// same as the role's.
func (c Config) Policy(tool string) string { return c.Prefix + tool }

// BrokerPolicy is the name of the policy of the broker's own login. It is no
// tool's: names of tools have no capital letters and no "_" in front.
func (c Config) BrokerPolicy() string { return c.Prefix + "_broker" }

// Installation is the part of an installation's ID that is in names.
func Installation(id broker.InstallationID) string {
	return string(id[max(0, len(id)-installationLength):])
}

// DisplayName is the display name of the token of a lease: 36 characters, from
// which Vault makes the name of the role in PostgreSQL.
func DisplayName(id broker.InstallationID, lease broker.LeaseID) string {
	return Installation(id) + "-" + string(lease)
}

// RolePrefix is how the names of all of an installation's roles in PostgreSQL begin.
func RolePrefix(id broker.InstallationID) string { return rolePrefix + Installation(id) + "-" }

// LeaseRolePrefix is how the name of a lease's role in PostgreSQL begins; eight
// random characters follow.
func LeaseRolePrefix(id broker.InstallationID, lease broker.LeaseID) string {
	return rolePrefix + DisplayName(id, lease) + "_"
}

// LeaseOfRole is the lease whose role in PostgreSQL has this name; false if the
// name is not of this installation's.
func LeaseOfRole(id broker.InstallationID, role string) (broker.LeaseID, bool) {
	rest, ours := strings.CutPrefix(role, RolePrefix(id))
	name, _, found := strings.Cut(rest, "_")
	lease, err := broker.ParseLeaseID(name)
	return lease, ours && found && err == nil
}

// UsernameTemplate is the username_template of Vault's database connections
// with which roles get these names.
const UsernameTemplate = rolePrefix + `{{ .DisplayName | replace "token-" "" | truncate 36 }}_{{ random 8 }}`
