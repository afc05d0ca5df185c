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

// Person is one of the sample people of `mayflyd dev`.
type Person struct {
	Name   string   // also the identity provider's own name for them (sub)
	Groups []string // sorted
	About  string   // for the page that lists them
}

// People are those who can sign in at the identity provider of `mayflyd dev`.
func People() []Person {
	return []Person{
		{"dora@acme.test", []string{"developers"}, "developer, owner of the developer and intern agents"},
		{"faye@acme.test", []string{"finance"}, "accountant, owner of the finance agent"},
		{"finn@acme.test", []string{"finance"}, "accountant"},
		{"lena@acme.test", []string{"support-leads"}, "leads support"},
		{"leo@acme.test", []string{"support-leads"}, "leads support, owner of the support agent"},
		{"max@acme.test", []string{"finance", "security"}, "in two groups, and still one person"},
		{"olga@acme.test", []string{"security"}, "security engineer, administers Mayfly: the catalog says so"},
		{"pat@acme.test", []string{"platform-leads"}, "leads the platform team"},
		{"rob@acme.test", []string{"research-leads"}, "leads research"},
		{"rose@acme.test", []string{"research-leads"}, "leads research, owner of the research agent"},
		{"ruth@acme.test", []string{"research-leads"}, "leads research"},
		{"sam@acme.test", []string{"sre"}, "on call"},
		{"sid@acme.test", []string{"security"}, "security engineer"},
		{"zoe@acme.test", nil, "works at Acme, and is in no group"},
	}
}

// Services are the resource servers that Catalog knows, by the paths of their
// SPIFFE IDs. They are in it as introspectors alone.
func Services() []string {
	return []string{"/service/crm", "/service/status", "/service/forge", "/service/ledger", "/service/lake"}
}
