// Package awsaccess is what the drivers for AWS say alike in their
// configurations: where AWS is asked, and as whom. It is pure: it reaches for no
// network and no file.
package awsaccess

import (
	"net/netip"
	"net/url"
	"regexp"
	"strings"

	"github.com/mayfly-security/mayfly/providers"
)

// MaxText is how many bytes a URL, a path or an ARN may have.
const MaxText = 512

var (
	regionForm  = regexp.MustCompile(`^[a-z]{2,4}(-[a-z]+)+-[0-9]{1,2}$`)
	accountForm = regexp.MustCompile(`^[0-9]{12}$`)
)

// Access is where AWS is asked, and as whom.
type Access struct {
	Region      string // required
	Account     string // twelve digits; empty where a driver takes a server that is not AWS
	FIPS        bool   // AWS's endpoints for FIPS 140
	DualStack   bool   // AWS's endpoints with IPv6
	Credentials Credentials
}

// CheckPlace says what is wrong with region and account, as a
// *providers.FieldError. Whether an account is needed is up to the driver.
func (a Access) CheckPlace() error {
	if !regionForm.MatchString(a.Region) {
		return providers.FieldErrorf("region", "is %q; it is an AWS region, such as eu-central-1", a.Region)
	}
	if a.Account != "" && !accountForm.MatchString(a.Account) {
		return providers.FieldErrorf("account", "is %q; it is the twelve digits of an AWS account", a.Account)
	}
	return nil
}

// CheckEndpoint says what is wrong with the URL of a service, as a
// *providers.FieldError. None is AWS's own. such is one that would be right.
func (a Access) CheckEndpoint(field, endpoint, such string) error {
	if endpoint == "" {
		return nil
	}
	u, err := url.Parse(endpoint)
	if err != nil || len(endpoint) > MaxText || u.Host == "" || u.User != nil || u.Path != "" || strings.ContainsAny(endpoint, "?#") {
		return providers.FieldErrorf(field, "must be a URL without a path, such as %s", such)
	}
	if u.Scheme != "https" && !(u.Scheme == "http" && loopback(u.Hostname())) {
		return providers.FieldErrorf(field, "must be an https URL; only a loopback host may have http")
	}
	if a.FIPS || a.DualStack {
		return providers.FieldErrorf(field, "takes the place of AWS's endpoints, among which use_fips_endpoint and use_dualstack_endpoint choose; set either")
	}
	return nil
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
