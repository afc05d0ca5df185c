// Package awsscope is what there is to say about AWS without asking it: the
// configuration of an AWS provider, the scopes of its tools, the session policy
// of a lease, and the names that Mayfly gives there. It is pure: it reaches for
// no network and no file.
package awsscope

import (
	"cmp"
	"encoding/json"
	"regexp"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/internal/awsaccess"
)

// How a lease is ended before its end.
const (
	EarlyOff      = "off"       // it is not
	EarlyDenyList = "deny_list" // by an inline policy of its role
	EarlyMinIO    = "minio"     // by MinIO's admin API
)

// How the end is verified that a deny list brings.
const (
	VerifyProbe = "probe" // a session of the broker's own is seen to be denied
	VerifyNone  = "none"  // not at all: such leases stay written until they expire
)

const (
	// ChainedMax is the longest session that AWS gives to credentials that are
	// themselves a role's.
	ChainedMax = time.Hour
	// SessionMax is the longest session of all.
	SessionMax = 12 * time.Hour
	// SessionMin is the shortest that AWS gives; a lease may be shorter.
	SessionMin = 15 * time.Minute

	defaultSession = time.Hour // what a role has as MaxSessionDuration unless it says otherwise
	defaultSettle  = 10 * time.Second
	maxSettle      = 10 * time.Minute
)

var (
	pathForm   = regexp.MustCompile(`^/([A-Za-z0-9+=,.@_-]+/)*$`)
	prefixForm = regexp.MustCompile(`^[A-Za-z0-9+=,.@_-]{0,40}$`)
)

// Config is an AWS provider's configuration, complete: what was left out has
// its default.
type Config struct {
	// Access says where AWS is asked, and what roles are assumed with. An empty
	// account is a compatible server, where leases have the parent's own keys.
	awsaccess.Access
	Partition   string // follows from the region
	Endpoint    string // of STS, and of IAM where it has none of its own; empty: AWS's
	IAMEndpoint string // empty: Endpoint
	Chained     bool   // the broker's credentials are a role's: AWS gives sessions of at most an hour
	RolePath    string // below which the roles of tools are; "/mayfly/"
	RolePrefix  string // with which their names begin; may be empty
	MaxSession  time.Duration
	Early       Early
}

// Early says how leases are ended before their end.
type Early struct {
	Mode   string
	Verify string        // deny_list
	Settle time.Duration // deny_list: how long a deny has been seen before it counts as in force
}

// Compatible reports whether the provider is a server that is not AWS, at which
// a lease is a part of what the parent's static keys can do.
func (c Config) Compatible() bool { return c.Account == "" }

// Meaning is the part of the configuration that decides what a lease can do;
// see providers.Meaning.
func (c Config) Meaning() json.RawMessage {
	b, err := json.Marshal(map[string]string{"partition": c.Partition, "account": c.Account, "endpoint": c.Endpoint, "iam_endpoint": c.IAMEndpoint})
	if err != nil {
		panic(err) // strings always have a JSON form
	}
	return b
}

// ParseConfig reads and checks a provider's configuration. Its errors are
// *providers.FieldError.
func ParseConfig(raw json.RawMessage) (Config, error) {
	var in struct {
		Region      string `json:"region"`
		Account     string `json:"account"`
		Endpoint    string `json:"endpoint_url"`
		IAMEndpoint string `json:"iam_endpoint_url"`
		FIPS        bool   `json:"use_fips_endpoint"`
		DualStack   bool   `json:"use_dualstack_endpoint"`
		Credentials struct {
			Method   string `json:"method"`
			RoleARN  string `json:"role_arn"`
			Audience string `json:"audience"`
			KeyFile  string `json:"key_file"`
			Chained  *bool  `json:"chained"`
		} `json:"credentials"`
		RolePath   string `json:"role_path"`
		RolePrefix string `json:"role_prefix"`
		MaxSession string `json:"max_session"`
		Early      struct {
			Mode   string `json:"mode"`
			Verify string `json:"verify"`
			Settle string `json:"settle"`
		} `json:"early_revoke"`
	}
	if err := providers.Decode(raw, &in); err != nil {
		return Config{}, err
	}
	own := in.Credentials
	c := Config{
		Access: awsaccess.Access{Region: in.Region, Account: in.Account, FIPS: in.FIPS, DualStack: in.DualStack,
			Credentials: awsaccess.Credentials{Method: own.Method, RoleARN: own.RoleARN, Audience: own.Audience, KeyFile: own.KeyFile}},
		Partition: partitionOf(in.Region),
		Endpoint:  strings.TrimSuffix(in.Endpoint, "/"), IAMEndpoint: strings.TrimSuffix(in.IAMEndpoint, "/"),
		RolePath: cmp.Or(in.RolePath, "/mayfly/"), RolePrefix: in.RolePrefix, MaxSession: defaultSession,
		Early: Early{Mode: in.Early.Mode, Verify: in.Early.Verify},
	}
	if err := c.CheckPlace(); err != nil {
		return Config{}, err
	}
	if err := c.checkEndpoints(); err != nil {
		return Config{}, err
	}
	if err := c.checkCredentials(own.Chained); err != nil {
		return Config{}, err
	}
	if !pathForm.MatchString(c.RolePath) || len(c.RolePath) > awsaccess.MaxText || c.RolePath == "/" {
		return Config{}, providers.FieldErrorf("role_path", "is %q; it is a path of roles in IAM that begins and ends with '/' and is not the root, such as /mayfly/", c.RolePath)
	}
	if !prefixForm.MatchString(c.RolePrefix) {
		return Config{}, providers.FieldErrorf("role_prefix", "is %q; it is the beginning of names of roles in IAM, of at most 40 letters, digits and + = , . @ _ -", c.RolePrefix)
	}
	if err := c.checkSession(in.MaxSession); err != nil {
		return Config{}, err
	}
	if err := c.checkEarly(in.Early.Settle); err != nil {
		return Config{}, err
	}
	return c, nil
}

func (c Config) checkEndpoints() error {
	for field, endpoint := range map[string]string{"endpoint_url": c.Endpoint, "iam_endpoint_url": c.IAMEndpoint} {
		if err := c.CheckEndpoint(field, endpoint, "https://minio.acme.test:9000"); err != nil {
			return err
		}
	}
	if c.Account == "" && c.Endpoint == "" {
		return providers.FieldErrorf("account", "is missing: the twelve digits of the AWS account that the tools' roles are in")
	}
	return nil
}

func (c *Config) checkCredentials(chained *bool) error {
	method := c.Credentials.Method
	switch method {
	case awsaccess.MethodWebIdentity:
		if chained != nil && !*chained {
			return providers.FieldErrorf("credentials.chained", "is false, and what AssumeRoleWithWebIdentity gives is a role's: AWS gives it sessions of at most %s", broker.Span(ChainedMax))
		}
		c.Chained = true
	case awsaccess.MethodDefault:
		c.Chained = chained == nil || *chained
	case awsaccess.MethodKeyFile:
		if c.Endpoint == "" {
			return providers.FieldErrorf("credentials.method", "is key_file, which is for compatible servers: set endpoint_url. With AWS itself the broker keeps no static keys: use web_identity, or default")
		}
		c.Chained = chained != nil && *chained
	default:
		return providers.FieldErrorf("credentials.method", "is %q; it must be web_identity (the broker logs in with a JWT-SVID), default (the AWS SDK's default chain) or key_file (static keys, for compatible servers)", method)
	}
	if err := c.Credentials.Check(); err != nil {
		return err
	}
	if c.Account == "" && method != awsaccess.MethodKeyFile {
		return providers.FieldErrorf("account", "is missing: only a compatible server whose leases are a part of what the keys of key_file can do has none")
	}
	return nil
}

func (c *Config) checkSession(text string) error {
	if text != "" {
		d, err := time.ParseDuration(text)
		if err != nil || d < SessionMin || d > SessionMax || d%time.Second != 0 {
			return providers.FieldErrorf("max_session", "is %q; it is the MaxSessionDuration of the tools' roles, from %s to %s", text, broker.Span(SessionMin), broker.Span(SessionMax))
		}
		c.MaxSession = d
	}
	if c.Chained && c.MaxSession > ChainedMax {
		return providers.FieldErrorf("max_session", "is %s, and the broker's credentials (%s) are a role's: AWS gives them sessions of at most %s, whatever the role's own maximum is", broker.Span(c.MaxSession), c.Credentials.Method, broker.Span(ChainedMax))
	}
	return nil
}

func (c *Config) checkEarly(settle string) error {
	e := &c.Early
	switch e.Mode {
	case EarlyOff:
	case EarlyDenyList:
		if c.Compatible() {
			return providers.FieldErrorf("early_revoke.mode", "is deny_list, which writes policies of roles in IAM: it needs an account")
		}
		if own, err := awsaccess.ParseRole(c.Credentials.RoleARN); err == nil && own.Account != c.Account {
			return providers.FieldErrorf("early_revoke.mode", "is deny_list, and the broker's role (credentials.role_arn) is of account %s: IAM writes policies of its caller's own account alone, and the tools' roles are in %s", own.Account, c.Account)
		}
		e.Verify, e.Settle = cmp.Or(e.Verify, VerifyProbe), defaultSettle
		if e.Verify != VerifyProbe && e.Verify != VerifyNone {
			return providers.FieldErrorf("early_revoke.verify", "is %q; it is probe (a session of the broker's own is seen to be denied) or none (such leases stay written until they expire)", e.Verify)
		}
		if settle != "" {
			d, err := time.ParseDuration(settle)
			if err != nil || d < 0 || d > maxSettle {
				return providers.FieldErrorf("early_revoke.settle", "is %q; it is how long a deny has been seen before it counts as in force, up to %s", settle, broker.Span(maxSettle))
			}
			e.Settle = d
		}
		return nil
	case EarlyMinIO:
		if !c.Compatible() {
			return providers.FieldErrorf("early_revoke.mode", "is minio, and the provider has an AWS account: that is for MinIO only")
		}
	default:
		return providers.FieldErrorf("early_revoke.mode", "is %q; say what is to happen when a lease is ended early: deny_list (the role's sessions are denied one by one), minio (MinIO's admin API), or off (nothing: the lease is over at its end)", e.Mode)
	}
	if e.Verify != "" || settle != "" {
		return providers.FieldErrorf("early_revoke", "verify and settle are for mode deny_list only")
	}
	return nil
}

// partitionOf is the partition of a region.
func partitionOf(region string) string {
	for _, p := range []struct{ prefix, partition string }{
		{"cn-", "aws-cn"}, {"us-gov-", "aws-us-gov"}, {"us-isob-", "aws-iso-b"}, {"us-isof-", "aws-iso-f"},
		{"us-iso-", "aws-iso"}, {"eu-isoe-", "aws-iso-e"}, {"eusc-", "aws-eusc"},
	} {
		if strings.HasPrefix(region, p.prefix) {
			return p.partition
		}
	}
	return "aws"
}
