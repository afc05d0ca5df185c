package awssts

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
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
