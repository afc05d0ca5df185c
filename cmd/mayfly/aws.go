package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// The fields of a secret that is a session of AWS, as every tool of such a
// provider has them.
const (
	awsKeyID        = "access_key_id"
	awsSecretKey    = "secret_access_key"
	awsSessionToken = "session_token"
)

func (p *program) awsCommand() *cobra.Command {
	return group("aws", "Give a tool's credentials to the AWS CLI, to the AWS SDKs and to what is made with them; cut a role off",
		p.awsCredentialsCommand(), p.awsServeCommand(), p.awsExecCommand(), p.awsConfigureCommand(), p.awsCutOffCommand(), p.awsCutOffsCommand())
}

// awsLease is one session of AWS, with the lease that it is.
type awsLease struct {
	ID     broker.LeaseID
	Made   time.Time
	End    time.Time
	Secret broker.Secret
}

// awsLeaseOf reads a credential as a session of AWS.
func awsLeaseOf(cred *client.Credential, now time.Time) (awsLease, error) {
	for _, field := range []string{awsKeyID, awsSecretKey} {
		if v, _ := cred.Secret.Reveal(field); v == "" {
			return awsLease{}, usagef("tool %s gives no credentials for AWS: its secret has %s, and no %s",
				clean(cred.Lease.Tool), clean(strings.Join(cred.Secret.Names(), ", ")), field)
		}
	}
	l := awsLease{ID: cred.Lease.ID, Made: cred.Lease.CreatedAt, End: cred.Lease.End, Secret: cred.Secret}
	if !l.alive(now) {
		return awsLease{}, fmt.Errorf("lease %s came with an end that has passed, %s: compare this machine's clock with the broker's", l.ID, relative(l.End, now))
	}
	return l, nil
}

// alive reports whether the lease has not come to its end.
func (l awsLease) alive(now time.Time) bool { return l.ID != "" && now.Before(l.End) }

// margin is how long before its end a lease is renewed, so that whoever was given
// it just before can use it still: a fifth of its life and a minute at most, but
// five seconds at least, or half of a life of less than ten.
func (l awsLease) margin() time.Duration {
	life := l.End.Sub(l.Made)
	return min(max(life/5, min(life/2, 5*time.Second)), time.Minute)
}

// fresh reports whether the lease needs no renewal yet.
func (l awsLease) fresh(now time.Time) bool {
	return l.alive(now) && now.Before(l.End.Add(-l.margin()))
}

// processOutput is what an SDK reads from a credential_process ("Sourcing
// credentials with an external process" of the AWS SDKs and Tools Reference
// Guide). The expiration is the lease's end, which may be long before the
// session's own.
func (l awsLease) processOutput() ([]byte, error) {
	return l.document(struct {
		Version int
		awsDocument
		SessionToken string `json:",omitempty"`
	}{1, l.keys(), l.field(awsSessionToken)})
}

// containerOutput is the same for the container credential provider, which has
// another name for the session's token and no version.
func (l awsLease) containerOutput() ([]byte, error) {
	return l.document(struct {
		awsDocument
		Token string `json:",omitempty"`
	}{l.keys(), l.field(awsSessionToken)})
}

type awsDocument struct {
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	Expiration      string
}

func (l awsLease) keys() awsDocument {
	return awsDocument{l.field(awsKeyID), l.field(awsSecretKey), l.End.UTC().Format(time.RFC3339)}
}

func (l awsLease) field(name string) string {
	v, _ := l.Secret.Reveal(name)
	return v
}

func (l awsLease) document(v any) ([]byte, error) {
	doc, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("writing the credentials of lease %s: %w", l.ID, err)
	}
	return append(escapeUnsafe(doc), '\n'), nil
}
