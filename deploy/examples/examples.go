// Package examples holds the sample catalog that `mayflyd dev` starts with, and
// its people. The folders below it are programs: crm is a resource server that
// asks Mayfly about the tokens it is shown, demo tells the main story with all
// of them. acme holds the catalog and the stories of its five cases.
package examples

import _ "embed"

// Catalog is the sample catalog. KeysPath stands in it where the directory of
// the signing keys belongs.
//
//go:embed acme/catalog.yaml
var Catalog string

// Policies is the sample policy set, in Cedar.
//
//go:embed acme/policies.cedar
var Policies string

// KeysPath is the directory of the signing keys in Catalog.
const KeysPath = "/var/lib/mayfly/keys"

// VaultCatalog is the sample catalog with Vault. It names addresses and files
// of acme.test.
//
//go:embed catalog/vault.yaml
var VaultCatalog string

// People are the sample people of `mayflyd dev`.
//
//go:embed acme/people.yaml
var People string

// Services are the resource servers that Catalog knows, by the paths of their
// SPIFFE IDs. They are in it as introspectors alone.
func Services() []string {
	return []string{"/service/crm", "/service/status", "/service/forge", "/service/ledger", "/service/lake"}
}
