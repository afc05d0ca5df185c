package client

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// The environment that ConfigFromEnv reads.
const (
	EnvAddr     = "MAYFLY_ADDR"            // Config.Addr
	EnvBrokerID = "MAYFLY_BROKER_ID"       // Config.BrokerID
	EnvCert     = "MAYFLY_CERT"            // Config.Files.Cert
	EnvKey      = "MAYFLY_KEY"             // Config.Files.Key
	EnvBundle   = "MAYFLY_BUNDLE"          // Config.Files.Bundle
	EnvWorkload = "SPIFFE_ENDPOINT_SOCKET" // Config.WorkloadAPI

	EnvPeopleAddr = "MAYFLY_PEOPLE_ADDR" // Config.PeopleAddr
	EnvPeopleCA   = "MAYFLY_PEOPLE_CA"   // Config.PeopleCA
	EnvToken      = "MAYFLY_TOKEN"       // Config.Token
)

// DefaultAddr is where a broker is looked for unless told otherwise.
const DefaultAddr = "https://localhost:8443"

// brokerPath is the path of the broker's SPIFFE ID unless told otherwise.
const brokerPath = "/mayfly"

const (
	defaultTimeout         = time.Minute
	defaultIdentityTimeout = 5 * time.Second
)

// As says how we come to the broker.
type As string

// The ways to come. The broker has a listener for each.
const (
	AsWorkload As = "workload" // with an SVID, to Config.Addr
	AsPerson   As = "person"   // with a session's token, to Config.PeopleAddr
)

// Config says which broker to ask, and as whom. The zero Config asks the
// broker on this machine, as whoever the Workload API at SPIFFE_ENDPOINT_SOCKET
// says we are.
type Config struct {
	// As says how we come. Empty means what ComesAs says.
	As As
	// Addr is the address of the broker's listener for workloads,
	// "https://host:port". Empty means DefaultAddr.
	Addr string
	// PeopleAddr is the address of its listener for people. A person needs it.
	PeopleAddr string
	// PeopleCA is a PEM file with the authorities, and the only ones, that the
	// people listener's certificate may be of. Empty means the system's.
	PeopleCA string
	// Token is a person's: of a session, or of the identity provider for the
	// broker's audience. See NewToken. Without one, only signing in is possible.
	Token broker.Secret
	// BrokerID is the SPIFFE ID that the broker must prove to have; no other is
	// spoken to. Zero means /mayfly in the trust domain of our own SVID.
	BrokerID spiffeid.ID
	// Source is who we are, and whom we trust. It stays the caller's to close.
	// Nil means the Files, if they are set, or else the Workload API.
	Source Source
	// Files are our identity as PEM files. They are read again when they change.
	Files Files
	// WorkloadAPI is the address of the Workload API, "unix:///path" or
	// "tcp://ip:port". Empty means that of SPIFFE_ENDPOINT_SOCKET.
	WorkloadAPI string
	// IdentityTimeout is how long New waits for an identity. Zero means 5 seconds.
	IdentityTimeout time.Duration
	// Timeout bounds one call, its retries included; a context may be shorter.
	// Zero means one minute: a provider may take its time to make a credential.
	Timeout time.Duration
}

// ConfigFromEnv reads what the environment says: the variables above. getenv is
// os.Getenv, or stands in for it.
func ConfigFromEnv(getenv func(string) string) (Config, error) {
	c := Config{
		Addr:        getenv(EnvAddr),
		Files:       Files{Cert: getenv(EnvCert), Key: getenv(EnvKey), Bundle: getenv(EnvBundle)},
		WorkloadAPI: getenv(EnvWorkload),
		PeopleAddr:  getenv(EnvPeopleAddr), PeopleCA: getenv(EnvPeopleCA), Token: NewToken(getenv(EnvToken)),
	}
	if s := getenv(EnvBrokerID); s != "" {
		id, err := spiffeid.FromString(s)
		if err != nil {
			return c, broker.Refusef(broker.ReasonInvalidArgument, "give it as spiffe://<trust domain>/<path>",
				"%s is %q, which is no SPIFFE ID", EnvBrokerID, clean(broker.Shorten(s, 200))).Because(err)
		}
		c.BrokerID = id
	}
	return c, nil
}

func (c Config) withDefaults() Config {
	if c.Addr == "" {
		c.Addr = DefaultAddr
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	if c.IdentityTimeout == 0 {
		c.IdentityTimeout = defaultIdentityTimeout
	}
	return c
}

// ComesAs says how c comes to the broker: as As says, or else as a person
// where PeopleAddr is set, unless a workload's identity is, too, and no Token.
// Everything else is a workload.
func (c Config) ComesAs() As {
	switch {
	case c.As != "":
		return c.As
	case c.PeopleAddr == "":
		return AsWorkload
	case c.Token.IsZero() && (c.WorkloadAPI != "" || c.Source != nil || c.Files != (Files{})):
		return AsWorkload
	}
	return AsPerson
}
