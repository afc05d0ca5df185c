//go:build unix

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// variant is what differs between the catalogs that reloads go back and forth
// between.
type variant struct {
	words    int // the description of crm.read: which of two
	longer   bool
	disabled int // the agent that is disabled; -1 for none
}

// tools are the names of the tools that clients ask for.
const (
	toolRead   = "crm.read"   // two TTL classes
	toolWrite  = "crm.write"  // one Vault role; its catalog entry never changes
	toolStatus = "status.set" // a token of the broker's own: nothing is made outside
)

// The TTLs of the Vault roles, in seconds. They are short, so that a run sees
// leases end by themselves, and does not wait long at its end.
const (
	shortTTL = 15
	longTTL  = 40
)

// catalogText is one variant of the catalog. vault is the provider's entry;
// empty means that there is no Vault, and every tool is the broker's own.
func catalogText(v variant, vault, keys string) string {
	var b strings.Builder
	b.WriteString("agents:\n")
	for i := range agents {
		fmt.Fprintf(&b, "  - {id: %q, owner: torture, environment: test, max_leases: 100000, max_per_hour: 1000000, disabled: %t}\n", agentID(i), v.disabled == i)
	}
	fmt.Fprintf(&b, "groups:\n  - {name: sre, members: [%q]}\noperators: [{group: sre}]\n", operatorID)
	fmt.Fprintf(&b, "providers:\n  - {name: tokens, driver: token, config: {issuer: \"https://mayfly.torture.test\", keys: %q, introspectors: [{id: %q, audiences: [\"https://status.torture.test\"]}]}}\n", keys, operatorID)
	b.WriteString(vault)
	own := `provider: tokens, scope: {audience: "https://status.torture.test", scopes: [set], verification: introspect}`
	reading, writing := own, own
	if vault != "" {
		reading = fmt.Sprintf("provider: vault, scope: {engine: database, classes: [{path: database/creds/crm-read-short, ttl: %ds}, {path: database/creds/crm-read, ttl: %ds}]}", shortTTL, longTTL)
		writing = fmt.Sprintf("provider: vault, scope: {engine: database, path: database/creds/crm-write, ttl: %ds}", longTTL)
	}
	words := [2]string{"Read the CRM", "Read the CRM, but in other words"}[v.words]
	most := longTTL
	if v.longer {
		most = longTTL + 5
	}
	fmt.Fprintf(&b, "tools:\n  - {name: %s, description: %q, max_ttl: %ds, %s}\n", toolRead, words, most, reading)
	fmt.Fprintf(&b, "  - {name: %s, description: Write to the CRM, max_ttl: %ds, %s}\n", toolWrite, longTTL, writing)
	fmt.Fprintf(&b, "  - {name: %s, description: Set the status, max_ttl: 1m, %s}\n", toolStatus, own)
	ids := make([]string, agents)
	for i := range ids {
		ids[i] = fmt.Sprintf("%q", agentID(i))
	}
	fmt.Fprintf(&b, "openers:\n  - {id: %q, tools: [%s, %s, %s], agents: [%s], max_duration: 1h, max_open: 1000, max_per_hour: 1000000}\n",
		botID, toolRead, toolWrite, toolStatus, strings.Join(ids, ", "))
	return b.String()
}

// replace puts a file in place as a whole: the broker never reads half of it.
func replace(path, content string) error {
	next := path + ".next"
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(next, path)
}

// config writes the broker's own configuration and returns its path.
func config(dir, listen, workload string) (string, error) {
	path := filepath.Join(dir, "mayflyd.yaml")
	return path, replace(path, fmt.Sprintf("store: mayfly.db\ncatalog: [catalog.yaml]\nlisten: %s\nworkload_api: %q\n", listen, workload))
}
