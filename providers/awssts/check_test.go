package awssts

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
	"github.com/mayfly-security/mayfly/providers/internal/awsclient"
)

const trust = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"AWS":%s},"Action":["sts:AssumeRole","sts:TagSession","sts:SetSourceIdentity"]}]}`

// goodRole is as deploy/aws sets it up.
func goodRole() fakeaws.Role {
	return fakeaws.Role{Boundary: "arn:aws:iam::123456789012:policy/mayfly/mayfly-boundary", MaxSession: time.Hour, Trust: fmt.Sprintf(trust, `"arn:aws:iam::123456789012:user/keys"`)}
}

func checkTools(ttl time.Duration) []broker.Tool {
	scope := func(action string) json.RawMessage {
		return json.RawMessage(`{"role":"arn:aws:iam::123456789012:role/mayfly/crm0","statements":[{"Effect":"Allow","Action":"` + action + `","Resource":"*"}]}`)
	}
	return []broker.Tool{
		{Name: "crm.write", MaxTTL: 5 * time.Minute, Scope: scope("s3:PutObject")},
		{Name: "crm.read", MaxTTL: ttl, Scope: scope("s3:GetObject")},
	}
}

func (w *world) check(config json.RawMessage, tools []broker.Tool) ([]providers.Finding, error) {
	return w.driver.CheckLive(w.t.Context(), providers.Config{Name: "aws", Raw: config, Now: w.clock.Now}, tools)
}

func told(all []providers.Finding, bad bool) (text string) {
	for _, f := range all {
		if f.Bad == bad {
			text += f.Tool + ": " + f.Message + "\n  do: " + f.Fix + "\n"
		}
	}
	return text
}

// TestCheckLive: an account that is set up is good; nothing of it is changed,
// and no session that the check makes can do anything.
func TestCheckLive(t *testing.T) {
	w := newWorld(t)
	w.fake.SetRole("crm0", goodRole())
	all, err := w.check(w.config(), checkTools(time.Hour))
	if err != nil || told(all, true) != "" {
		t.Fatalf("%v\n%s", err, told(all, true))
	}
	for _, want := range []string{"looked as arn:aws:iam::123456789012:user/keys", "its boundary is arn:aws:iam::123456789012:policy/mayfly/mayfly-boundary"} {
		if !strings.Contains(told(all, false), want) {
			t.Errorf("it does not say %q:\n%s", want, told(all, false))
		}
	}
	if left := w.fake.Policies("crm0"); len(left) != 0 {
		t.Errorf("it left %v", left)
	}
	sessions := w.fake.Sessions()
	slices.SortFunc(sessions, func(a, b *fakeaws.Session) int {
		return cmp.Or(len(b.Tags)-len(a.Tags), b.Expires.Compare(a.Expires))
	})
	if len(sessions) != 3 {
		t.Fatalf("%d sessions", len(sessions))
	}
	lives := []time.Duration{time.Hour, 15 * time.Minute} // each as its tool may live, or as AWS lets any
	for i, s := range sessions[:2] {
		if w.fake.Works(s.Key) || s.Source == "" || len(s.Tags) != 3 || s.Expires.Sub(s.Issued) != lives[i] {
			t.Errorf("a session that works (%t): %+v", w.fake.Works(s.Key), s)
		}
	}
	if s := sessions[2]; s.Policy != probePolicy {
		t.Errorf("and %+v", s)
	}
}

// TestCheckLiveBroken breaks one thing after the other.
func TestCheckLiveBroken(t *testing.T) {
	refuse := func(actions ...string) func(*fakeaws.Role) {
		return func(r *fakeaws.Role) { r.Refuses = actions }
	}
	trusts := func(who string) func(*fakeaws.Role) {
		return func(r *fakeaws.Role) { r.Trust = fmt.Sprintf(trust, who) }
	}
	inline := func(name string, n int) func(*world) {
		return func(w *world) {
			w.fake.SetPolicy("crm0", name, `{"Version": "2012-10-17", "Statement": [{"Effect":"Allow","Action":"s3:GetObject","Resource":"`+strings.Repeat("x", n)+`"}]}`)
		}
	}
	none := func(*fakeaws.Role) {}
	for _, test := range []struct {
		name  string
		role  func(*fakeaws.Role)
		world func(*world)
		bad   bool
		says  []string
	}{
		{"path", func(r *fakeaws.Role) { r.Path = "/other/" }, nil, true, []string{"role crm0 (of tools crm.read, crm.write)", "what IAM has by that name is arn:aws:iam::123456789012:role/other/crm0"}},
		{"boundary", func(r *fakeaws.Role) { r.Boundary = "" }, nil, true, []string{"has no permissions boundary", "do: attach the boundary"}},
		{"session", func(r *fakeaws.Role) { r.MaxSession = 30 * time.Minute }, nil, true, []string{"live at most 30m0s", "update-role --role-name crm0 --max-session-duration 3600"}},
		{"assume", refuse("sts:AssumeRole"), nil, true, []string{"the broker is not allowed sts:AssumeRole (", "trust policy"}},
		{"tag", refuse("sts:TagSession"), nil, true, []string{"not allowed sts:TagSession ("}},
		{"source", refuse("sts:SetSourceIdentity"), nil, true, []string{"not allowed sts:SetSourceIdentity ("}},
		{"tag and source", refuse("sts:TagSession", "sts:SetSourceIdentity"), nil, true, []string{"not allowed sts:TagSession, nor sts:SetSourceIdentity ("}},
		{"list", refuse("iam:ListRolePolicies"), nil, true, []string{"may not list its policies", "iam:ListRolePolicies"}},
		{"get", refuse("iam:GetRolePolicy"), nil, true, []string{"may not read its policies"}},
		{"put", refuse("iam:PutRolePolicy"), nil, true, []string{"may not write its policies, so that no lease of it can be ended early", "iam:PermissionsBoundary"}},
		{"delete", refuse("iam:DeleteRolePolicy"), nil, true, []string{"may not delete its policies"}},
		{"read role", refuse("iam:GetRole"), nil, false, []string{"were not compared", "aws iam get-role --role-name crm0"}},
		{"read role, and longer sessions", func(r *fakeaws.Role) { r.Refuses, r.MaxSession = []string{"iam:GetRole"}, 15*time.Minute }, nil, true, []string{"no session of 1h0m0s can be made", "MaxSessionDuration"}},
		{"quota", none, inline("somebody", 9_000), true, []string{"(somebody) take 9095 of the 10240 characters", "at most 9 leases", "there could be 303"}},
		{"some quota", none, inline("somebody", 1_000), false, []string{"at most 267 leases", "make managed policies"}},
		{"a list that is none", none, inline("mayfly-deny-x-y-z-0", 100), false, []string{"mayfly-deny-x-y-z-0 has the name of a deny list, and is none", "deny lists take 195"}},
		{"everybody", trusts(`"*"`), nil, true, []string{"trusts everybody (*) in every account"}},
		{"account", trusts(`"arn:aws:iam::123456789012:root"`), nil, false, []string{"trusts the whole account"}},
		{"another", trusts(`["arn:aws:iam::123456789012:user/keys","arn:aws:iam::123456789012:role/ci"]`), nil, false, []string{"also trusts arn:aws:iam::123456789012:role/ci"}},
		{"everybody, under conditions", func(r *fakeaws.Role) {
			r.Trust = `{"Statement":[{"Effect":"Deny","Principal":"*"},{"Effect":"Allow","Principal":{"AWS":"*"},"Condition":{"StringEquals":{"aws:PrincipalOrgID":"o-1"}}}]}`
		}, nil, false, []string{"trusts everybody (*) under conditions"}},
		{"a service", func(r *fakeaws.Role) {
			r.Trust = `{"Statement":{"Effect":"Allow","Principal":{"Service":"lambda.amazonaws.com"}}}`
		}, nil, false, []string{"also trusts lambda.amazonaws.com"}},
		{"no trust", func(r *fakeaws.Role) { r.Trust = "x" }, nil, false, []string{"its trust policy cannot be read here"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			about := goodRole()
			test.role(&about)
			w.fake.SetRole("crm0", about)
			if test.world != nil {
				test.world(w)
			}
			all, err := w.check(w.config(), checkTools(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			got := told(all, test.bad)
			for _, want := range test.says {
				if !strings.Contains(got, want) {
					t.Errorf("it does not say %q:\n%s", want, got)
				}
			}
			if bad := told(all, true); !test.bad && bad != "" || strings.Count(bad, "\n") > 2 {
				t.Errorf("what is bad is\n%s", bad)
			}
		})
	}
}

// TestCheckLiveAccount breaks what is not a role's.
func TestCheckLiveAccount(t *testing.T) {
	fails := func(action, code string, status int) option {
		return faking(func(c *fakeaws.Config) {
			c.Fail = func(a string, _ int) (string, int) {
				if a == action {
					return code, status
				}
				return "", 0
			}
		})
	}
	for _, test := range []struct {
		name      string
		change    option
		tools     []broker.Tool
		bad, says string
		err       string
	}{
		{"role", roles(0), checkTools(time.Hour), "", "is not there\n  do: set the account up", ""},
		{"keys", fails("GetCallerIdentity", "InvalidClientTokenId", 403), checkTools(time.Hour), "", "the broker cannot log in (", ""},
		{"probe", faking(func(c *fakeaws.Config) { c.NoProbe = true }), checkTools(time.Hour), "", "a probe may not ask sts:DecodeAuthorizationMessage", ""},
		{"too large", faking(func(*fakeaws.Config) {}), []broker.Tool{{Name: "big", MaxTTL: time.Minute,
			Scope: json.RawMessage(`{"role":"arn:aws:iam::123456789012:role/mayfly/crm0","statements":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::packed-too-large"}]}`)}}, "big", "larger than AWS takes (", ""},
		{"malformed", fails("AssumeRole", "MalformedPolicyDocument", 400), checkTools(time.Hour), "crm.read", "AWS cannot read its session policy (", ""},
		{"role that is not read", fails("GetRole", "ServiceFailure", 500), checkTools(time.Hour), "", "", "reading role crm0"},
		{"policy that is not read", fails("GetRolePolicy", "Throttling", 400), checkTools(time.Hour), "", "", "reading the policies"},
		{"write that is not answered", fails("PutRolePolicy", "ServiceFailure", 500), checkTools(time.Hour), "", "", "writing a policy"},
		{"deletion that is not answered", fails("DeleteRolePolicy", "Throttling", 400), checkTools(time.Hour), "", "", "deleting a policy"},
		{"throttled", fails("AssumeRole", "Throttling", 400), checkTools(time.Hour), "", "", "Throttling"},
		{"down", fails("ListRolePolicies", "ServiceFailure", 500), checkTools(time.Hour), "", "", "listing the policies"},
		{"who", fails("GetCallerIdentity", "ServiceFailure", http.StatusInternalServerError), checkTools(time.Hour), "", "", "who the broker is"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, test.change)
			if len(w.roles) > 0 {
				w.fake.SetRole("crm0", goodRole())
			}
			all, err := w.check(w.config(), test.tools)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("the error is %v", err)
				}
				return
			}
			if err != nil || !strings.Contains(told(all, true), test.bad+": ") || !strings.Contains(told(all, true), test.says) {
				t.Errorf("%v; it does not say %q:\n%s", err, test.says, told(all, true))
			}
		})
	}
}

// TestCheckLiveOff: who writes no deny list needs no permission of IAM's.
func TestCheckLiveOff(t *testing.T) {
	w := newWorld(t, early(`{"mode":"off"}`))
	w.fake.SetRole("crm0", fakeaws.Role{Refuses: []string{"iam:GetRole", "iam:ListRolePolicies", "iam:GetRolePolicy", "iam:PutRolePolicy", "iam:DeleteRolePolicy"}})
	all, err := w.check(w.config(), checkTools(time.Hour))
	if err != nil || told(all, true) != "" {
		t.Errorf("%v\n%s", err, told(all, true))
	}
	if n := w.fake.Count("PutRolePolicy") + w.fake.Count("DecodeAuthorizationMessage"); n != 0 {
		t.Errorf("%d calls that nobody needs", n)
	}
}

// TestCheckLiveWho: whose credentials the broker's are decides what it can do.
func TestCheckLiveWho(t *testing.T) {
	for _, test := range []struct {
		name, key string
		change    func(raw string) string
		bad       bool
		says      string
	}{
		{"root", "AKIAROOT", nil, true, "the account's root user"},
		{"a user", "AKIAUSER", nil, false, "whoever has them is the broker until they are changed"},
		{"a role that is said to be none", "session", nil, true, "credentials.chained is false, and the broker's credentials are a role's"},
		{"a role", "session", func(raw string) string {
			return strings.Replace(raw, `"method":"key_file"`, `"method":"key_file","chained":true`, 1)
		}, true, ""},
		{"another account", "AKIAUSER", func(raw string) string { return strings.Replace(raw, account, "210987654321", 1) }, true, "IAM writes policies of its caller's own account alone"},
		{"another account, without a list", "AKIAUSER", func(raw string) string {
			return strings.Replace(strings.Replace(raw, account, "210987654321", 1), `{"mode":"deny_list","settle":"2s"}`, `{"mode":"off"}`, 1)
		}, false, "the broker is of account 123456789012, and the tools' roles are in account 210987654321"},
		{"the SDK's default chain", "AKIAUSER", func(raw string) string {
			t.Setenv("AWS_ACCESS_KEY_ID", "AKIAUSER")
			t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
			return keyFileForm.ReplaceAllString(raw, `{"method":"default"}`)
		}, false, "these are the credentials of who runs the check"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			about := goodRole()
			about.MaxSession = 0
			w.fake.SetRole("crm0", about)
			key := test.key
			if key == "session" {
				res, err := http.PostForm(w.server.URL, url.Values{"Action": {"AssumeRole"}, "RoleArn": {arn("crm0")}, "RoleSessionName": {"somebody"}})
				if err != nil || res.StatusCode != http.StatusOK {
					t.Fatal(res.Status, err)
				}
				res.Body.Close()
				key = w.fake.Sessions()[0].Key
			}
			raw := string(w.config())
			raw = keyFileForm.ReplaceAllString(raw, fmt.Sprintf(`{"method":"key_file","key_file":%q}`, keyFile(t, key, "secret")))
			tools := checkTools(time.Hour)
			if test.change != nil {
				raw = test.change(raw)
			}
			if strings.Contains(raw, "210987654321") {
				for i := range tools {
					tools[i].Scope = []byte(strings.Replace(string(tools[i].Scope), account, "210987654321", 1))
				}
			}
			all, err := w.check([]byte(raw), tools)
			if err != nil {
				t.Fatal(err)
			}
			got := told(all, test.bad)
			if test.says == "" && strings.Contains(got, "chained") || test.says != "" && !strings.Contains(got, test.says) {
				t.Errorf("it does not say %q:\n%s", test.says, got)
			}
		})
	}
}

var keyFileForm = regexp.MustCompile(`\{"method":"key_file","key_file":"[^"]*"\}`)

// TestCheckLiveLogin: each way in which AWS refuses the broker's JWT-SVID has its
// next step; without an answer of AWS's the check could not be made.
func TestCheckLiveLogin(t *testing.T) {
	for code, says := range map[string]string{
		"InvalidIdentityToken":  "do: see that IAM has an OIDC provider for the issuer",
		"IDPCommunicationError": "do: AWS must reach the issuer's discovery document",
		"AccessDenied":          "do: the trust policy of arn:aws:iam::123456789012:role/mayfly/crm1 must allow sts:AssumeRoleWithWebIdentity",
		"ValidationError":       "do: compare the broker's role with deploy/aws",
		"no SVID":               "",
	} {
		t.Run(code, func(t *testing.T) {
			w := newWorld(t, roles(2), faking(func(c *fakeaws.Config) {
				c.Fail = func(action string, _ int) (string, int) {
					if action == "AssumeRoleWithWebIdentity" {
						return code, http.StatusBadRequest
					}
					return "", 0
				}
			}))
			source := &webLogin{}
			if says == "" {
				source.fails = errors.New("no Workload API")
			}
			w.driver = New(source)
			raw := keyFileForm.ReplaceAllString(string(w.config()), `{"method":"web_identity","role_arn":"`+arn("crm1")+`"}`)
			all, err := w.check([]byte(raw), checkTools(time.Hour))
			if says == "" {
				if err == nil || !strings.Contains(err.Error(), "no Workload API") {
					t.Errorf("without an SVID: %v, %v", err, all)
				}
				return
			}
			if err != nil || !strings.Contains(told(all, true), says) || len(all) != 1 {
				t.Errorf("%v; it does not say %q:\n%s", err, says, told(all, true))
			}
		})
	}
}

// TestCheckLiveCompatible: a server that is not AWS is asked for sessions alone.
func TestCheckLiveCompatible(t *testing.T) {
	w := newWorld(t, func(w *world, _ *fakeaws.Config) { w.roles = []string{"none"} })
	raw := fmt.Appendf(nil, `{"region":"us-east-1","endpoint_url":%q,"credentials":{"method":"key_file","key_file":%q},"early_revoke":{"mode":"minio"}}`,
		w.server.URL, keyFile(t, "AKIA", "secret"))
	scope := func(bucket string) json.RawMessage {
		return json.RawMessage(`{"statements":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::` + bucket + `"}]}`)
	}
	tools := []broker.Tool{{Name: "good", MaxTTL: time.Minute, Scope: scope("crm")}, {Name: "big", MaxTTL: time.Minute, Scope: scope("packed-too-large")}}
	all, err := w.check(raw, tools)
	if bad := told(all, true); err != nil || !strings.Contains(bad, "big: no session can be made (") || strings.Contains(bad, "good: ") || !strings.Contains(told(all, false), "at nothing else") {
		t.Errorf("%v\n%s%s", err, bad, told(all, false))
	}
	w.server.Close()
	if _, err := w.check(raw, tools); awsclient.KindOf(err) != awsclient.Away {
		t.Errorf("nobody is there, and the error is %v", err)
	}
}

// TestCheckLivePool: every role of a pool is looked at; a policy's size at one.
func TestCheckLivePool(t *testing.T) {
	w := newWorld(t, roles(3))
	for _, name := range w.roles[:2] {
		w.fake.SetRole(name, goodRole())
	}
	w.fake.SetRole("crm2", fakeaws.Role{Refuses: []string{"sts:AssumeRole"}, Boundary: "arn:aws:iam::123456789012:policy/mayfly/mayfly-boundary"})
	pool := `"roles":["` + arn("crm0") + `","` + arn("crm1") + `","` + arn("crm2") + `"]`
	tools := checkTools(time.Hour)
	for i := range tools {
		tools[i].Scope = []byte(strings.Replace(string(tools[i].Scope), `"role":"`+arn("crm0")+`"`, pool, 1))
	}
	all, err := w.check(w.config(), tools)
	bad := told(all, true)
	if err != nil || strings.Count(bad, "do: ") != 1 || !strings.Contains(bad, "role crm2 (of tools crm.read, crm.write): the broker is not allowed sts:AssumeRole") {
		t.Errorf("%v\n%s", err, bad)
	}
	made := map[string]int{}
	for _, s := range w.fake.Sessions() {
		if s.Source != "" {
			made[s.Role]++
		}
	}
	if made["crm0"] != 2 || made["crm1"] != 1 || made["crm2"] != 0 {
		t.Errorf("sessions %v", made)
	}
}

// TestCheckLiveManaged: managed policies are what the check's sessions have, too,
// and no more of them can be used.
func TestCheckLiveManaged(t *testing.T) {
	w := newWorld(t)
	w.fake.SetRole("crm0", goodRole())
	const managed = "arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess"
	all, err := w.check(w.config(), []broker.Tool{{Name: "crm.read", MaxTTL: time.Hour, Scope: json.RawMessage(`{"role":"` + arn("crm0") + `","policy_arns":["` + managed + `"]}`)}})
	if err != nil || told(all, true) != "" {
		t.Errorf("%v\n%s", err, told(all, true))
	}
	found := false
	for _, s := range w.fake.Sessions() {
		if slices.Contains(s.PolicyARNs, managed) {
			if found = true; w.fake.Works(s.Key) {
				t.Error("a session of the check works")
			}
		}
	}
	if !found {
		t.Error("no session had the policy")
	}
}
