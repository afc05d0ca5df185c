package fakeaws

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

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
