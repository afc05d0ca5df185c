package fakeaws

import (
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Session is one session that was made.
type Session struct {
	Role, Name, Source string
	Tags               map[string]string
	Policy             string
	PolicyARNs         []string
	Issued, Expires    time.Time
	Key, Secret, Token string
}

var nameForm = regexp.MustCompile(`^[\w+=,.@-]{2,64}$`)

func (f *Fake) assume(action, key string, form url.Values) (code, answer string) {
	arn := form.Get("RoleArn")
	name := arn[strings.LastIndexByte(arn, '/')+1:]
	if code, answer := f.trusts(action, key, name, form); code != "" {
		return code, answer
	}
	seconds := 3600
	if text := form.Get("DurationSeconds"); text != "" {
		seconds, _ = strconv.Atoi(text)
	}
	s := &Session{Role: name, Name: form.Get("RoleSessionName"), Source: form.Get("SourceIdentity"), Policy: form.Get("Policy"), Tags: map[string]string{}}
	size := len(s.Policy)
	for i := 1; form.Has(fmt.Sprintf("Tags.member.%d.Key", i)); i++ {
		k, v := form.Get(fmt.Sprintf("Tags.member.%d.Key", i)), form.Get(fmt.Sprintf("Tags.member.%d.Value", i))
		s.Tags[k] = v
		size += len(k) + len(v)
	}
	for i := 1; form.Has(fmt.Sprintf("PolicyArns.member.%d.arn", i)); i++ {
		s.PolicyARNs = append(s.PolicyARNs, form.Get(fmt.Sprintf("PolicyArns.member.%d.arn", i)))
	}
	switch {
	case seconds < 900 || seconds > 43200:
		return "ValidationError", "DurationSeconds"
	case f.roles[name].about.MaxSession > 0 && seconds > int(f.roles[name].about.MaxSession/time.Second):
		return "ValidationError", "The requested DurationSeconds exceeds the MaxSessionDuration set for this role."
	case f.sessions[key] != nil && seconds > 3600:
		return "ValidationError", "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining."
	case !nameForm.MatchString(s.Name) || s.Source != "" && !nameForm.MatchString(s.Source):
		return "ValidationError", "RoleSessionName or SourceIdentity"
	case len(s.Policy) > 2048:
		return "ValidationError", "policy has length greater than 2048"
	case s.Policy != "" && !json.Valid([]byte(s.Policy)):
		return "MalformedPolicyDocument", "no JSON"
	case strings.Contains(s.Policy, "packed-too-large"):
		return "PackedPolicyTooLarge", "Packed size of session tags and policy consumes 113% of allotted space."
	}
	f.serial++
	s.Issued = f.c.Now().Truncate(time.Second)
	s.Expires = s.Issued.Add(time.Duration(seconds) * time.Second)
	s.Key, s.Secret, s.Token = fmt.Sprintf("ASIAFAKE%012d", f.serial), fmt.Sprintf("fake-secret-%032d", f.serial), fmt.Sprintf("fake-session-token-%048d", f.serial)
	f.sessions[s.Key] = s
	return "", fmt.Sprintf("<Credentials><AccessKeyId>%s</AccessKeyId><SecretAccessKey>%s</SecretAccessKey><SessionToken>%s</SessionToken><Expiration>%s</Expiration></Credentials><AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/%s/%s</Arn><AssumedRoleId>AROA%s:%s</AssumedRoleId></AssumedRoleUser><PackedPolicySize>%d</PackedPolicySize>",
		s.Key, s.Secret, s.Token, s.Expires.UTC().Format(time.RFC3339), s.Role, s.Name, strings.ToUpper(s.Role), s.Name, min(100*size/4096, 100))
}

// Session returns the session with that access key.
func (f *Fake) Session(key string) *Session {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sessions[key]
}

// Named returns the sessions of that name.
func (f *Fake) Named(name string) (all []*Session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sessions {
		if s.Name == name {
			all = append(all, s)
		}
	}
	return all
}

// Works reports whether a session with that access key may do something that
// its session policy allows, now.
func (f *Fake) Works(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sessions[key]
	return s != nil && f.denied(s) == "" && f.c.Now().Before(s.Expires)
}
