package awsscope

import (
	"crypto/sha256"
	"encoding/base32"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// The session tags.
const (
	TagAgent    = "mayfly-agent"
	TagIncident = "mayfly-incident"
	TagTool     = "mayfly-tool"

	maxAgentTag = 128 // characters; an agent with a longer ID is told by its hash
)

// Tag is one session tag.
type Tag struct{ Key, Value string }

// SourceIdentity is the source identity of an agent's sessions. A SPIFFE ID has
// characters that AWS does not take there, so it is a hash, and one that
// nobody finds a second agent for.
func SourceIdentity(agent spiffeid.ID) string {
	sum := sha256.Sum256([]byte(agent.String()))
	return "mayfly-" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:20]))
}

// Tags are the tags of a session, in the order of their keys.
func Tags(agent spiffeid.ID, incident broker.IncidentID, tool string) []Tag {
	id := agent.String()
	if len(id) > maxAgentTag {
		id = SourceIdentity(agent)
	}
	tags := []Tag{{TagAgent, id}}
	if incident != "" {
		tags = append(tags, Tag{TagIncident, string(incident)})
	}
	return append(tags, Tag{TagTool, tool})
}
