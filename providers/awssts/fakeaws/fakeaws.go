// Package fakeaws is a fake of the parts of AWS STS and IAM that ending
// sessions needs: roles with inline policies and their quota, sessions with
// session policies and tags, writes that are seen and in force late, requests
// that are throttled or held in the middle. It is for tests: AWS itself cannot
// run here. It takes every signature for good, and evaluates only what Mayfly
// writes; what it does not know it reports as an error.
package fakeaws

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Quota is how many characters the inline policies of a role may have, without
// white space.
const Quota = 10240

// Config is how a Fake behaves. The zero Config is a prompt and patient AWS.
type Config struct {
	Now func() time.Time // AWS's clock; nil means time.Now
	// Seen and Force are how long after a write reads show it, and sessions are
	// judged by it. Each gets the number of the write.
	Seen, Force func(n int) time.Duration
	// Fail, if not nil, may answer a request with an error code instead, such
	// as "Throttling" (400) or "ServiceFailure" (500): before anything is done.
	Fail func(action string, n int) (code string, status int)
	// Hold, if not nil, is called before a request is acted upon and after it
	// came in: it may block.
	Hold func(action string, form url.Values)
	// Quiet acts and answers nothing, cutting the connection, where it returns true.
	Quiet func(action string, n int) bool
	// NoProbe: roles do not allow sts:DecodeAuthorizationMessage.
	NoProbe bool
	// Above, if not nil, is the kind of a policy above the role's own, such as
	// "service control policy", that denies everything to sessions; empty: none does.
	Above func() string
	// Broker names the role whose sessions alone may assume the others and write
	// their policies. Empty: whoever has keys may.
	Broker string
	// Token, if not nil, looks at the token of who comes with a web identity.
	Token func(token string) error
}

// Fake is a fake AWS account. It is an http.Handler.
type Fake struct {
	c Config

	mu       sync.Mutex
	roles    map[string]*role
	sessions map[string]*Session // by access key
	serial   int
	writes   int
	counts   map[string]int
	problems []string
	most     int // characters that a role's policies had at most
	parsed   map[string]policyDocument
}

type role struct {
	policies map[string][]version
	about    Role
}

// version is one content of a policy: empty text is none.
type version struct {
	text        string
	seen, force time.Time
}

// Session is one session that was made.
type Session struct {
	Role, Name, Source string
	Tags               map[string]string
	Policy             string
	PolicyARNs         []string
	Issued, Expires    time.Time
	Key, Secret, Token string
}

// New makes a Fake with the roles of these names.
func New(c Config, roles ...string) *Fake {
	if c.Now == nil {
		c.Now = time.Now
	}
	none := func(int) time.Duration { return 0 }
	if c.Seen == nil {
		c.Seen = none
	}
	if c.Force == nil {
		c.Force = none
	}
	f := &Fake{c: c, roles: map[string]*role{}, sessions: map[string]*Session{}, counts: map[string]int{}, parsed: map[string]policyDocument{}}
	for _, name := range roles {
		f.roles[name] = &role{policies: map[string][]version{}}
	}
	return f
}

// Problems are what the Fake was asked and does not know.
func (f *Fake) Problems() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.problems)
}

// Most is how many characters the policies of a role had at most.
func (f *Fake) Most() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.most
}

// Count is how many requests of an action were acted upon.
func (f *Fake) Count(action string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[action]
}

// Policies are the inline policies of a role as they are stored.
func (f *Fake) Policies(name string) map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := map[string]string{}
	for policy, versions := range f.roles[name].policies {
		if v := versions[len(versions)-1]; v.text != "" {
			all[policy] = v.text
		}
	}
	return all
}

// SetPolicy puts a policy as if somebody else had; empty text removes it.
func (f *Fake) SetPolicy(name, policy, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.store(f.roles[name], policy, text)
}

func (f *Fake) store(r *role, policy, text string) {
	f.writes++
	now := f.c.Now()
	v := version{text: text, seen: now.Add(f.c.Seen(f.writes)), force: now.Add(f.c.Force(f.writes))}
	if old := r.policies[policy]; old == nil {
		r.policies[policy] = []version{{}, v}
	} else {
		r.policies[policy] = append(old, v)
	}
	n := 0
	for _, versions := range r.policies {
		n += len(strip(versions[len(versions)-1].text))
	}
	f.most = max(f.most, n)
}

func strip(text string) string { return strings.Join(strings.Fields(text), "") }

// at is the content that counts at an instant: the last write that has come
// into its own. A later write takes the place of an earlier one that is slower.
func at(versions []version, now time.Time, when func(version) time.Time) string {
	for _, v := range slices.Backward(versions) {
		if !when(v).After(now) {
			return v.text
		}
	}
	return ""
}

// Works reports whether a session with that access key may do something that
// its session policy allows, now.
func (f *Fake) Works(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sessions[key]
	return s != nil && f.denied(s) == "" && f.c.Now().Before(s.Expires)
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

// denied is why everything is denied to a session; empty if it is not.
func (f *Fake) denied(s *Session) string {
	now := f.c.Now()
	if f.denies(s.Policy, s, now) {
		return "session policy"
	}
	for name, versions := range f.roles[s.Role].policies {
		if f.denies(at(versions, now, func(v version) time.Time { return v.force }), s, now) {
			return "policy " + name
		}
	}
	return ""
}

type policyDocument struct {
	Statement []struct {
		Effect    string
		Action    any
		Condition map[string]map[string]any
	}
	tails map[string]bool // of the session names that are denied with * before them
}

func texts(v any) (all []string) {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		for _, e := range v {
			all = append(all, fmt.Sprint(e))
		}
	}
	return all
}

// denies reports whether a policy denies everything to a session.
func (f *Fake) denies(text string, s *Session, now time.Time) bool {
	if text == "" {
		return false
	}
	d, parsed := f.parsed[text]
	if !parsed {
		if err := json.Unmarshal([]byte(text), &d); err != nil {
			f.problems = append(f.problems, "a policy that is no JSON: "+text)
			return true
		}
		if len(f.parsed) > 20_000 {
			clear(f.parsed)
		}
		d.tails = map[string]bool{}
		for _, st := range d.Statement {
			for _, v := range texts(st.Condition["StringLike"]["aws:userid"]) {
				if tail, ok := strings.CutPrefix(v, "*:"); ok {
					d.tails[tail] = true
				}
			}
		}
		f.parsed[text] = d
	}
	for _, st := range d.Statement {
		if st.Effect != "Deny" || !slices.Contains(texts(st.Action), "*") {
			continue
		}
		all := true
		for operator, keys := range st.Condition {
			for key, values := range keys {
				if operator == "StringLike" && key == "aws:userid" && len(st.Condition) == 1 {
					all = all && d.tails[s.Name]
					continue
				}
				all = all && f.holds(operator, key, texts(values), s, now)
			}
		}
		if all {
			return true
		}
	}
	return false
}

func (f *Fake) holds(operator, key string, values []string, s *Session, now time.Time) bool {
	var have string
	switch {
	case key == "aws:userid":
		have = "AROA" + strings.ToUpper(s.Role) + ":" + s.Name
	case key == "aws:SourceIdentity":
		have = s.Source
	case strings.HasPrefix(key, "aws:PrincipalTag/"):
		have = s.Tags[strings.TrimPrefix(key, "aws:PrincipalTag/")]
	case key == "aws:CurrentTime":
		have = now.UTC().Format(time.RFC3339)
	case key == "aws:TokenIssueTime":
		have = s.Issued.UTC().Format(time.RFC3339)
	default:
		f.problems = append(f.problems, "a condition on "+key)
		return true
	}
	if have == "" {
		return false
	}
	return slices.ContainsFunc(values, func(v string) bool {
		switch operator {
		case "StringEquals":
			return v == have
		case "StringLike":
			// Mayfly writes * at the beginning, and nowhere else.
			if tail, ok := strings.CutPrefix(v, "*"); ok && !strings.ContainsAny(tail, "*?") {
				return strings.HasSuffix(have, tail)
			}
		case "DateGreaterThan", "DateLessThanEquals":
			bound, err1 := time.Parse(time.RFC3339, v)
			is, err2 := time.Parse(time.RFC3339, have)
			if err1 == nil && err2 == nil {
				return is.After(bound) == (operator == "DateGreaterThan")
			}
		}
		f.problems = append(f.problems, "a condition "+operator+" on "+key+" of "+v)
		return true
	})
}

var keyForm = regexp.MustCompile(`Credential=([^/]+)/`)

// ServeHTTP implements http.Handler: AWS's query protocol.
func (f *Fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	form, err := url.ParseQuery(string(body))
	action := form.Get("Action")
	if err != nil || action == "" {
		f.fail(w, http.StatusBadRequest, "InvalidAction", "no action")
		return
	}
	if f.c.Hold != nil {
		f.c.Hold(action, form)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.serial++
	n := f.serial
	if f.c.Fail != nil {
		if code, status := f.c.Fail(action, n); code != "" {
			f.fail(w, status, code, "as the test wants it")
			return
		}
	}
	f.counts[action]++
	key := ""
	if m := keyForm.FindStringSubmatch(r.Header.Get("Authorization")); m != nil {
		key = m[1]
	}
	code, answer := f.act(action, key, form)
	if f.c.Quiet != nil && f.c.Quiet(action, n) {
		panic(http.ErrAbortHandler)
	}
	if code != "" {
		status := http.StatusBadRequest
		switch code {
		case "AccessDenied":
			status = http.StatusForbidden
		case "NoSuchEntity":
			status = http.StatusNotFound
		case "LimitExceeded":
			status = http.StatusConflict
		}
		f.fail(w, status, code, answer)
		return
	}
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("Date", f.c.Now().UTC().Format(http.TimeFormat))
	fmt.Fprintf(w, "<%[1]sResponse><%[1]sResult>%[2]s</%[1]sResult><ResponseMetadata><RequestId>r%[3]d</RequestId></ResponseMetadata></%[1]sResponse>", action, answer, n)
}

func (f *Fake) fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "text/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<ErrorResponse><Error><Type>Sender</Type><Code>%s</Code><Message>%s</Message></Error><RequestId>r0</RequestId></ErrorResponse>", code, message)
}

// act does one action and returns an error code with its message, or the answer.
func (f *Fake) act(action, key string, form url.Values) (code, answer string) {
	switch action {
	case "AssumeRole", "AssumeRoleWithWebIdentity":
		return f.assume(action, key, form)
	case "GetCallerIdentity":
		return f.whoIs(key)
	case "DecodeAuthorizationMessage":
		s, above := f.sessions[key], ""
		if f.c.Above != nil {
			above = f.c.Above()
		}
		switch {
		case s == nil:
			return "InvalidClientTokenId", "no such session"
		case above != "":
			return "AccessDenied", "User: arn:aws:sts::123456789012:assumed-role/" + s.Role + "/" + s.Name + " is not authorized to perform: sts:DecodeAuthorizationMessage with an explicit deny in a " + above
		case f.denied(s) != "":
			return "AccessDenied", "User: arn:aws:sts::123456789012:assumed-role/" + s.Role + "/" + s.Name + " is not authorized to perform: sts:DecodeAuthorizationMessage with an explicit deny in an identity-based policy"
		case f.c.NoProbe:
			return "AccessDenied", "User is not authorized to perform: sts:DecodeAuthorizationMessage because no identity-based policy allows the sts:DecodeAuthorizationMessage action"
		}
		return "InvalidAuthorizationMessageException", "Message is not valid"
	}
	r := f.roles[form.Get("RoleName")]
	if r == nil {
		return "NoSuchEntity", "no such role"
	}
	if !f.broker(key) {
		return "AccessDenied", "who calls is not the broker, which alone may look at roles and write their policies"
	}
	if r.about.refuses("iam:" + action) {
		return "AccessDenied", "User is not authorized to perform: iam:" + action + " because no identity-based policy allows the iam:" + action + " action"
	}
	now, seen := f.c.Now(), func(v version) time.Time { return v.seen }
	name := form.Get("PolicyName")
	switch action {
	case "GetRole":
		return "", r.about.answer(form.Get("RoleName"))
	case "ListRolePolicies":
		names := ""
		for policy, versions := range r.policies {
			if at(versions, now, seen) != "" {
				names += "<member>" + policy + "</member>"
			}
		}
		return "", "<PolicyNames>" + names + "</PolicyNames><IsTruncated>false</IsTruncated>"
	case "GetRolePolicy":
		text := at(r.policies[name], now, seen)
		if text == "" {
			return "NoSuchEntity", "no such policy"
		}
		return "", "<RoleName>" + form.Get("RoleName") + "</RoleName><PolicyName>" + name + "</PolicyName><PolicyDocument>" + url.PathEscape(text) + "</PolicyDocument>"
	case "PutRolePolicy":
		if !strings.Contains(form.Get("PolicyDocument"), `"Statement"`) {
			return "MalformedPolicyDocument", "Syntax errors in policy."
		}
		n := len(strip(form.Get("PolicyDocument")))
		for other, versions := range r.policies {
			if other != name {
				n += len(strip(versions[len(versions)-1].text))
			}
		}
		if n > Quota {
			return "LimitExceeded", "Maximum policy size of 10240 bytes exceeded for role"
		}
		f.store(r, name, form.Get("PolicyDocument"))
		return "", ""
	case "DeleteRolePolicy":
		if versions := r.policies[name]; len(versions) == 0 || versions[len(versions)-1].text == "" {
			return "NoSuchEntity", "no such policy"
		}
		f.store(r, name, "")
		return "", ""
	}
	f.problems = append(f.problems, "the action "+action)
	return "InvalidAction", action
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
