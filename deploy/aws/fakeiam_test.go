package aws

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
)

// fakeIAM stands in for IAM, which cannot run here: it keeps what Terraform's
// AWS provider sends, gives it back, and refuses what IAM is known to refuse of
// it. What it does not know fails the test.
type fakeIAM struct {
	t  *testing.T
	mu sync.Mutex
	account
}

func newFakeIAM(t *testing.T) *fakeIAM {
	return &fakeIAM{t: t, account: account{Providers: map[string]provider{}, Policies: map[string]string{}, Roles: map[string]role{}}}
}

// made is what there is by now.
func (f *fakeIAM) made() account {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.account
}

// ServeHTTP implements http.Handler: AWS's query protocol.
func (f *fakeIAM) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	form, err := url.ParseQuery(string(body))
	if err != nil {
		f.t.Errorf("a request that is no form: %v", err)
	}
	action := form.Get("Action")
	f.mu.Lock()
	defer f.mu.Unlock()
	w.Header().Set("Content-Type", "text/xml")
	code, answer := f.act(action, form)
	if code != "" {
		status := map[string]int{"NoSuchEntity": http.StatusNotFound, "DeleteConflict": http.StatusConflict, "EntityAlreadyExists": http.StatusConflict}[code]
		w.WriteHeader(max(status, http.StatusBadRequest))
		fmt.Fprintf(w, "<ErrorResponse><Error><Type>Sender</Type><Code>%s</Code><Message>%s</Message></Error><RequestId>r</RequestId></ErrorResponse>", code, answer)
		return
	}
	fmt.Fprintf(w, "<%[1]sResponse><%[1]sResult>%[2]s</%[1]sResult><ResponseMetadata><RequestId>r</RequestId></ResponseMetadata></%[1]sResponse>", action, answer)
}

const created = "<CreateDate>2026-11-26T10:00:00Z</CreateDate>"

// act does one action and returns an error code with its message, or the answer.
func (f *fakeIAM) act(action string, form url.Values) (code, answer string) {
	for _, name := range []string{"PolicyDocument", "AssumeRolePolicyDocument"} {
		if text := form.Get(name); text != "" && !f.document(text) {
			return "MalformedPolicyDocument", name
		}
	}
	path := form.Get("Path")
	if path == "" {
		path = "/"
	}
	switch policy := form.Get("PolicyArn"); action {
	case "GetCallerIdentity":
		return "", "<Account>" + accountID + "</Account><UserId>AIDAEXAMPLE</UserId><Arn>arn:aws:iam::" + accountID + ":user/operator</Arn>"

	case "CreateOpenIDConnectProvider":
		at, ok := strings.CutPrefix(form.Get("Url"), "https://")
		if !ok {
			return "InvalidInput", "the URL must begin with https://"
		}
		arn := "arn:aws:iam::" + accountID + ":oidc-provider/" + at
		f.Providers[arn] = provider{URL: form.Get("Url"), Audiences: members(form, "ClientIDList")}
		return "", "<OpenIDConnectProviderArn>" + arn + "</OpenIDConnectProviderArn>"
	case "GetOpenIDConnectProvider":
		p, ok := f.Providers[form.Get("OpenIDConnectProviderArn")]
		if !ok {
			return "NoSuchEntity", "no such provider"
		}
		return "", "<Url>" + strings.TrimPrefix(p.URL, "https://") + "</Url>" + created +
			"<ClientIDList>" + list(p.Audiences) + "</ClientIDList><ThumbprintList>" + list([]string{thumbprint}) + "</ThumbprintList>"
	case "DeleteOpenIDConnectProvider":
		delete(f.Providers, form.Get("OpenIDConnectProviderArn"))
		return "", ""

	case "CreatePolicy":
		arn := "arn:aws:iam::" + accountID + ":policy" + path + form.Get("PolicyName")
		if _, ok := f.Policies[arn]; ok {
			return "EntityAlreadyExists", "there is such a policy"
		}
		f.Policies[arn] = form.Get("PolicyDocument")
		return "", f.policy(arn)
	case "GetPolicy":
		if _, ok := f.Policies[policy]; !ok {
			return "NoSuchEntity", "no such policy"
		}
		return "", f.policy(policy)
	case "GetPolicyVersion":
		return "", "<PolicyVersion><VersionId>v1</VersionId><IsDefaultVersion>true</IsDefaultVersion><Document>" + url.QueryEscape(f.Policies[policy]) + "</Document></PolicyVersion>"
	case "ListPolicyVersions":
		return "", "<IsTruncated>false</IsTruncated><Versions><member><VersionId>v1</VersionId><IsDefaultVersion>true</IsDefaultVersion></member></Versions>"
	case "DeletePolicy":
		for _, r := range f.Roles {
			if slices.Contains(r.Managed, policy) || r.Boundary == policy {
				return "DeleteConflict", "the policy is in use"
			}
		}
		delete(f.Policies, policy)
		return "", ""

	case "CreateRole":
		arn := "arn:aws:iam::" + accountID + ":role" + path + form.Get("RoleName")
		bound := form.Get("PermissionsBoundary")
		if _, ok := f.Policies[bound]; bound != "" && !ok {
			return "NoSuchEntity", "no such boundary"
		}
		if who := f.principal(form.Get("AssumeRolePolicyDocument")); who != "" {
			return "MalformedPolicyDocument", "Invalid principal in policy: " + who
		}
		f.Roles[arn] = role{Trust: form.Get("AssumeRolePolicyDocument"), Boundary: bound, Session: form.Get("MaxSessionDuration"), Inline: map[string]string{}}
		return "", f.role(arn)
	}
	arn := f.named(form.Get("RoleName"))
	if arn == "" {
		return "NoSuchEntity", "no such role"
	}
	r, name, policy := f.Roles[arn], form.Get("PolicyName"), form.Get("PolicyArn")
	switch action {
	case "GetRole":
		return "", f.role(arn)
	case "DeleteRole":
		if len(r.Inline) > 0 || len(r.Managed) > 0 {
			return "DeleteConflict", "Cannot delete entity, must delete policies first."
		}
		delete(f.Roles, arn)
		return "", ""
	case "ListRolePolicies":
		var names []string
		for n := range r.Inline {
			names = append(names, n)
		}
		return "", "<IsTruncated>false</IsTruncated><PolicyNames>" + list(names) + "</PolicyNames>"
	case "GetRolePolicy":
		if r.Inline[name] == "" {
			return "NoSuchEntity", "no such policy"
		}
		return "", "<RoleName>" + form.Get("RoleName") + "</RoleName><PolicyName>" + name + "</PolicyName><PolicyDocument>" + url.QueryEscape(r.Inline[name]) + "</PolicyDocument>"
	case "PutRolePolicy":
		r.Inline[name] = form.Get("PolicyDocument")
		return "", ""
	case "DeleteRolePolicy":
		delete(r.Inline, name)
		return "", ""
	case "ListAttachedRolePolicies":
		var all strings.Builder
		for _, arn := range r.Managed {
			fmt.Fprintf(&all, "<member><PolicyArn>%s</PolicyArn><PolicyName>%s</PolicyName></member>", arn, arn[strings.LastIndex(arn, "/")+1:])
		}
		return "", "<IsTruncated>false</IsTruncated><AttachedPolicies>" + all.String() + "</AttachedPolicies>"
	case "AttachRolePolicy":
		if _, ok := f.Policies[policy]; !ok {
			return "NoSuchEntity", "no such policy"
		}
		r.Managed = append(r.Managed, policy)
		f.Roles[arn] = r
		return "", ""
	case "DetachRolePolicy":
		r.Managed = slices.DeleteFunc(r.Managed, func(p string) bool { return p == policy })
		f.Roles[arn] = r
		return "", ""
	case "ListInstanceProfilesForRole":
		return "", "<IsTruncated>false</IsTruncated><InstanceProfiles></InstanceProfiles>"
	}
	f.t.Errorf("the fake IAM does not know %s", action)
	return "InvalidAction", action
}

func members(form url.Values, name string) (all []string) {
	for i := 1; ; i++ {
		v := form.Get(fmt.Sprintf("%s.member.%d", name, i))
		if v == "" {
			return all
		}
		all = append(all, v)
	}
}

func list(values []string) string {
	var all strings.Builder
	for _, v := range values {
		all.WriteString("<member>" + v + "</member>")
	}
	return all.String()
}

func (f *fakeIAM) policy(arn string) string {
	name := arn[strings.LastIndex(arn, "/")+1:]
	return "<Policy><PolicyName>" + name + "</PolicyName><PolicyId>ANPAEXAMPLE" + strings.ToUpper(name) + "</PolicyId><Arn>" + arn + "</Arn><Path>" +
		pathOf(arn, ":policy") + "</Path><DefaultVersionId>v1</DefaultVersionId>" + created + "</Policy>"
}

func (f *fakeIAM) role(arn string) string {
	r, name := f.Roles[arn], arn[strings.LastIndex(arn, "/")+1:]
	bound := ""
	if r.Boundary != "" {
		bound = "<PermissionsBoundary><PermissionsBoundaryType>Policy</PermissionsBoundaryType><PermissionsBoundaryArn>" + r.Boundary + "</PermissionsBoundaryArn></PermissionsBoundary>"
	}
	return "<Role><RoleName>" + name + "</RoleName><RoleId>AROAEXAMPLE" + strings.ToUpper(name) + "</RoleId><Arn>" + arn + "</Arn><Path>" + pathOf(arn, ":role") + "</Path>" + created +
		"<MaxSessionDuration>" + r.Session + "</MaxSessionDuration><AssumeRolePolicyDocument>" + url.QueryEscape(r.Trust) + "</AssumeRolePolicyDocument>" + bound + "</Role>"
}

// pathOf is what is between kind and the name in an ARN.
func pathOf(arn, kind string) string {
	_, path, _ := strings.Cut(arn, kind)
	return path[:strings.LastIndex(path, "/")+1]
}

// named is the ARN of the role of a name, which is one in an account.
func (f *fakeIAM) named(name string) string {
	for arn := range f.Roles {
		if strings.HasSuffix(arn, "/"+name) {
			return arn
		}
	}
	return ""
}

// document reports whether IAM would take a policy's form: statements, each
// with an effect and something to act upon.
func (f *fakeIAM) document(text string) bool {
	var d struct {
		Version   string
		Statement []struct {
			Effect    string
			Action    any
			Resource  any
			Principal any
		}
	}
	if json.Unmarshal([]byte(text), &d) != nil || d.Version != "2012-10-17" || len(d.Statement) == 0 {
		return false
	}
	for _, s := range d.Statement {
		empty := func(v any) bool { l, ok := v.([]any); return v == nil || ok && len(l) == 0 }
		if s.Effect != "Allow" && s.Effect != "Deny" || empty(s.Action) || empty(s.Resource) == empty(s.Principal) {
			return false
		}
	}
	return true
}

// principal is a principal of a trust policy that is not there.
func (f *fakeIAM) principal(text string) string {
	var d struct {
		Statement []struct {
			Principal struct{ AWS, Federated string }
		}
	}
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		return text
	}
	for _, s := range d.Statement {
		if _, ok := f.Roles[s.Principal.AWS]; s.Principal.AWS != "" && !ok {
			return s.Principal.AWS
		}
		if _, ok := f.Providers[s.Principal.Federated]; s.Principal.Federated != "" && !ok {
			return s.Principal.Federated
		}
	}
	return ""
}
