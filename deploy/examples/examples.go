// Package examples holds the sample catalog that `mayflyd dev` starts with.
// The folders below it are programs: crm is a resource server that asks Mayfly
// about the tokens it is shown, demo tells the main story with all of them.
package examples

import _ "embed"

// Catalog is the sample catalog. KeysPath stands in it where the directory of
// the signing keys belongs.
//
//go:embed catalog/acme.yaml
var Catalog string

// KeysPath is the directory of the signing keys in Catalog.
const KeysPath = "/var/lib/mayfly/keys"

// VaultCatalog is the sample catalog with Vault. It names addresses and files
// of acme.test.
//
//go:embed catalog/vault.yaml
var VaultCatalog string

// People are the sample people of `mayflyd dev`.
//
//go:embed people.yaml
var People string
