package fakeaws

import (
	"fmt"
	"net/url"
	"slices"
	"time"
)

// Role is what a role is like beside its inline policies.
type Role struct {
	Path       string        // "" is "/mayfly/"
	Boundary   string        // ARN of its permissions boundary; "" is none
	MaxSession time.Duration // zero is as long as AWS lets any be
	Trust      string        // its trust policy, as IAM shows it; what the Fake goes by are Refuses and Config.Broker
	// Refuses are actions that are not allowed to the broker on it, such as
	// "sts:TagSession" and "iam:PutRolePolicy".
	Refuses []string
}

func (r Role) refuses(action string) bool { return slices.Contains(r.Refuses, action) }

// SetRole makes a role what about says.
func (f *Fake) SetRole(name string, about Role) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.roles[name].about = about
}

// answer is the role as GetRole tells it.
func (r Role) answer(name string) string {
	path := r.Path
	if path == "" {
		path = "/mayfly/"
	}
	boundary := ""
	if r.Boundary != "" {
		boundary = "<PermissionsBoundary><PermissionsBoundaryType>Policy</PermissionsBoundaryType><PermissionsBoundaryArn>" + r.Boundary + "</PermissionsBoundaryArn></PermissionsBoundary>"
	}
	longest := r.MaxSession
	if longest == 0 {
		longest = 12 * time.Hour
	}
	return fmt.Sprintf("<Role><Path>%[1]s</Path><RoleName>%[2]s</RoleName><RoleId>AROA</RoleId><Arn>arn:aws:iam::123456789012:role%[1]s%[2]s</Arn><CreateDate>2026-01-02T03:04:05Z</CreateDate>"+
		"<AssumeRolePolicyDocument>%[3]s</AssumeRolePolicyDocument><MaxSessionDuration>%[4]d</MaxSessionDuration>%[5]s</Role>",
		path, name, url.PathEscape(r.Trust), int(longest/time.Second), boundary)
}

// broker reports whether who calls may do what the broker alone may.
func (f *Fake) broker(key string) bool {
	s := f.sessions[key]
	if f.c.Broker == "" {
		return s == nil
	}
	return s != nil && s.Role == f.c.Broker && f.c.Now().Before(s.Expires)
}

// trusts is why a role is not to be assumed by who asks; an empty code if it is.
func (f *Fake) trusts(action, key, name string, form url.Values) (code, message string) {
	r := f.roles[name]
	refused := func(what string) (string, string) {
		return "AccessDenied", "not authorized to perform: " + what + " on resource: " + form.Get("RoleArn")
	}
	if r == nil {
		return refused("sts:" + action)
	}
	if f.c.Broker == "" {
		// whoever has keys may
	} else if web := action == "AssumeRoleWithWebIdentity"; web != (name == f.c.Broker) || !web && !f.broker(key) {
		return refused("sts:" + action)
	}
	if action == "AssumeRoleWithWebIdentity" && f.c.Token != nil {
		if err := f.c.Token(form.Get("WebIdentityToken")); err != nil {
			return "InvalidIdentityToken", "the token is not taken"
		}
	}
	for what, asked := range map[string]bool{
		"sts:" + action: true, "sts:TagSession": form.Has("Tags.member.1.Key"), "sts:SetSourceIdentity": form.Get("SourceIdentity") != "",
	} {
		if asked && r.about.refuses(what) {
			return refused(what)
		}
	}
	return "", ""
}

// whoIs answers GetCallerIdentity, which no policy denies.
func (f *Fake) whoIs(key string) (code, answer string) {
	arn := "arn:aws:iam::123456789012:user/keys"
	if key == "AKIAROOT" {
		arn = "arn:aws:iam::123456789012:root"
	}
	if s := f.sessions[key]; s != nil {
		arn = "arn:aws:sts::123456789012:assumed-role/" + s.Role + "/" + s.Name
	}
	return "", "<Arn>" + arn + "</Arn><UserId>AIDA</UserId><Account>123456789012</Account>"
}

// Sessions are all sessions that were made.
func (f *Fake) Sessions() (all []*Session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sessions {
		all = append(all, s)
	}
	return all
}
