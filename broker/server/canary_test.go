package server_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/common/expfmt"

	"github.com/mayfly-security/mayfly/attestation/devidp"
	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
	"github.com/mayfly-security/mayfly/broker/audit"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/providertest"
	"github.com/mayfly-security/mayfly/store"
)

// canary knows secrets and looks for them wherever they must not be.
type canary struct {
	secrets []broker.Secret
	said    bytes.Buffer // every error that a client saw
}

func (c *canary) watch(secret map[string]string) {
	c.secrets = append(c.secrets, broker.NewSecret(secret))
}

// heard keeps what a client was told.
func (c *canary) heard(a answer) {
	c.said.Write(a.body)
	for k, v := range a.header {
		c.said.WriteString(k + ": " + strings.Join(v, ",") + "\n")
	}
}

// places is everything that the broker leaves behind.
func (c *canary) places(r *rig) map[string][]byte {
	r.t.Helper()
	file, err := os.ReadFile(r.storeFile())
	if err != nil {
		r.t.Fatal(err)
	}
	var evidence bytes.Buffer
	if err := r.db.View(context.Background(), func(rd store.Reader) error {
		for e, err := range rd.Log(audit.Log, 0) {
			if err != nil {
				return err
			}
			evidence.Write(e.Value)
		}
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	var exposition bytes.Buffer
	families, err := r.metrics.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&exposition, f); err != nil {
			r.t.Fatal(err)
		}
	}
	return map[string][]byte{"store": file, "log": r.logs.Bytes(), "evidence": evidence.Bytes(),
		"metrics": exposition.Bytes(), "errors": bytes.Clone(c.said.Bytes())}
}

// find returns where a secret is, and which, or nothing.
func (c *canary) find(places map[string][]byte) (found []string) {
	for place, text := range places {
		for _, s := range c.secrets {
			if leak := providertest.FindLeak(text, s, "username"); leak != "" {
				found = append(found, place+": "+leak)
			}
		}
	}
	slices.Sort(found)
	return found
}

// TestI7_NoSecretAtRest runs whole lives of leases with everything logged, and
// then looks for their secrets, and for the keys that sign them, in all that
// the broker leaves behind. What a hostile provider says comes no further than
// the operator's log.
func TestI7_NoSecretAtRest(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	c := &canary{}
	c.watch(signingKeys(t, filepath.Join(r.dir, "keys")))
	for _, tool := range []string{"crm.read", "db.read", "hostile.read"} {
		r.grant(support, tool)
	}
	agent, operator, server := r.client(support), r.client(sam), r.client(crm)
	access := func(method, body string) { t.Helper(); c.heard(agent.post(method, body)) }

	// Issue, replay, introspect, return, revoke, refuse.
	for _, tool := range []string{"crm.read", "db.read", "hostile.read"} {
		first := agent.issueKeyed(tool, "key-"+tool)
		c.watch(first.GetSecret())
		if again := agent.issueKeyed(tool, "key-"+tool); again.GetSecret()["password"] != first.GetSecret()["password"] {
			t.Errorf("%s: the replay gave another secret", tool)
		}
		token := first.GetSecret()["access_token"]
		c.heard(server.introspect("x" + token))
		c.heard(r.client(billing).introspect(token))
		access("AccessService/IssueLease", `{"tool": "`+tool+`", "idempotencyKey": "key-`+tool+`", "ttl": "1s"}`)
		access("AccessService/IssueLease", `{"tool": "`+tool+`", "ttl": "-1s"}`)
		access("AccessService/RevokeLease", `{"id": "`+first.GetLease().GetId()+`", "reason": "done"}`)
		access("AccessService/IssueLease", `{"tool": "`+tool+`", "idempotencyKey": "key-`+tool+`"}`)
		c.heard(server.introspect(token))
		second := agent.issue(tool)
		c.watch(second.GetSecret())
		c.heard(operator.post("AccessService/RevokeLease", `{"id": "`+second.GetLease().GetId()+`"}`))
	}
	// Hostile providers: what they make is ended, what they say is not passed on.
	for _, fault := range []func(providers.MintRequest, providers.Minted) error{failsWithText, refusesWithText, deniesWithText, panicsWithText} {
		r.hostile.set(func(q providers.MintRequest, m providers.Minted) error {
			c.watch(m.Secret.RevealAll())
			return fault(q, m)
		})
		a := agent.post("AccessService/IssueLease", `{"tool": "hostile.read"}`)
		if a.reason() != broker.ReasonProvider && a.reason() != broker.ReasonProviderRefused {
			t.Errorf("a hostile provider: %d %s", a.status, a.body)
		}
		c.heard(a)
	}
	r.hostile.set(nil)
	// A window that closes while the provider refuses to revoke.
	window := r.client(pager).open("hostile.read", "crm.read")
	c.watch(agent.issue("hostile.read").GetSecret())
	token := agent.issue("crm.read").GetSecret()
	c.watch(token)
	r.hostile.deaf.Store(true)
	c.heard(r.client(pager).post("IncidentService/CloseIncident", `{"id": "`+window.GetId()+`"}`))
	c.heard(server.introspect(token["access_token"]))
	access("AccessService/ListLeases", `{"all": true}`)
	c.heard(operator.post("AuditService/ListEvents", `{"pageSize": 1000}`))

	places := c.places(r)
	for place, text := range places {
		if len(text) < 500 {
			t.Errorf("%s has only %d bytes: nothing was looked at", place, len(text))
		}
		said := bytes.Contains(text, []byte("upstream-says")) || bytes.Contains(text, []byte("db-7.corp"))
		if said != (place == "log") {
			t.Errorf("%s: has the text of the hostile provider: %t", place, said)
		}
	}
	if len(c.secrets) < 12 {
		t.Errorf("only %d secrets were looked for", len(c.secrets))
	}
	if found := c.find(places); found != nil {
		t.Errorf("secrets were found: %v", found)
	}
	r.hostile.deaf.Store(false)
	r.stop()
	r.start()
	if found := c.find(c.places(r)); found != nil {
		t.Errorf("after a restart, secrets were found: %v", found)
	}
}

// TestI7_NoSecretOfPeople runs sign-ins, sessions and requests for users with
// everything logged, and then looks for tokens, codes, verifiers and cookies in
// all that the broker leaves behind.
func TestI7_NoSecretOfPeople(t *testing.T) {
	t.Parallel()
	r := newRig(t, withPeople)
	c := &canary{}
	watch := func(what, secret string) {
		t.Helper()
		if len(secret) < 16 {
			t.Fatalf("the %s is %q", what, secret)
		}
		c.watch(map[string]string{what: secret})
	}
	watch("verifier", verifier)

	// A sign-in, a code that is never redeemed, one that comes again, a device.
	browser := r.browser()
	var idpCode, idpState string
	stop := browser.Stop
	browser.Stop = func(u *url.URL) bool {
		if u.Path == "/signin/callback" {
			idpCode, idpState = u.Query().Get("code"), u.Query().Get("state")
		}
		return stop(u)
	}
	code := r.walk(browser, ada).Get("code")
	watch("the provider's code", idpCode)
	watch("the provider's state", idpState)
	watch("code", code)
	address, err := url.Parse(r.people.url)
	if err != nil {
		t.Fatal(err)
	}
	for _, cookie := range browser.Client.Jar.Cookies(address) {
		if strings.HasPrefix(cookie.Name, "__Host-") {
			watch("cookie", cookie.Value)
		}
	}
	s := r.redeem(code)
	watch("session", s.GetToken())
	watch("session without its prefix", s.GetToken()[len(s.GetToken())-43:])
	unused := r.walk(r.browser(), finn).Get("code")
	watch("unused code", unused)
	c.heard(r.person("").post("SignInService/RedeemCode", `{"code": "`+unused+`", "codeVerifier": "x", "redirectUri": "`+loopback+`"}`))
	device, err := r.person("").signIn().StartDevice(bounded(t), connect.NewRequest(&mayflyv1.StartDeviceRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	watch("handle", device.Msg.GetHandle())
	c.heard(r.person("").post("SignInService/PollDevice", `{"handle": "`+device.Msg.GetHandle()+`"}`))
	c.heard(r.person("").post("SignInService/PollDevice", `{"handle": "`+device.Msg.GetHandle()+`x"}`))

	// Bearer tokens and users' tokens, good and bad.
	good, elsewhere, user := r.mint(devidp.Mint{Person: ada}), r.mint(devidp.Mint{Person: ada, Audience: "https://other.acme.test"}), r.mint(devidp.Mint{Person: finn, Audience: userAudience})
	for what, token := range map[string]string{"bearer token": good, "token for another audience": elsewhere, "user's token": user} {
		watch(what, token)
		watch(what+"'s signature", token[strings.LastIndexByte(token, '.')+1:])
	}
	for _, token := range []string{s.GetToken(), good, elsewhere, s.GetToken() + "x", good + "x"} {
		c.heard(r.person(token).post("AccessService/WhoAmI", "{}"))
		c.heard(r.person(token).post("AccessService/ListLeases", "{}"))
	}
	for _, token := range []string{user, elsewhere, user + "x"} {
		body := `{"tool": "db.asked", "reason": "for finn", "subjectToken": "` + token + `"}`
		c.heard(r.client(support).post("RequestService/CreateRequest", body))
		c.heard(r.client(other).post("RequestService/CreateRequest", body))
	}
	q := r.ask()
	c.heard(r.person(s.GetToken()).post("RequestService/ApproveRequest", approve(q)))
	c.heard(r.person("").post("SignInService/RedeemCode", `{"code": "`+code+`", "codeVerifier": "`+verifier+`", "redirectUri": "`+loopback+`"}`))
	operator := r.login(olga).GetToken()
	watch("operator's session", operator)
	c.heard(r.person(operator).post("AuditService/ListEvents", `{"pageSize": 1000}`))
	c.heard(r.person(operator).post("SignInService/SignOut", "{}"))

	places := c.places(r)
	for place, text := range places {
		if len(text) < 300 {
			t.Errorf("%s has only %d bytes: nothing was looked at", place, len(text))
		}
	}
	if !bytes.Contains(places["evidence"], []byte("session.started")) || !bytes.Contains(places["evidence"], []byte(finn)) || len(c.secrets) < 15 {
		t.Errorf("too little happened: %d secrets", len(c.secrets))
	}
	if found := c.find(places); found != nil {
		t.Errorf("secrets were found: %v", found)
	}
	r.stop()
	r.start()
	if found := c.find(c.places(r)); found != nil {
		t.Errorf("after a restart, secrets were found: %v", found)
	}
	// The canary knows what it looks for.
	r.log().Debug("authenticating", "header", "Bearer "+operator)
	if found := c.find(c.places(r)); found == nil {
		t.Error("a planted token was not found")
	}
}

// signingKeys returns the private keys of a directory, in each form that they
// could leak in.
func signingKeys(t *testing.T, dir string) map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("there are no signing keys: %v", err)
	}
	secret := map[string]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		if block == nil {
			t.Fatalf("%s is no PEM", file)
		}
		if _, err := x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
			t.Fatal(err)
		}
		seed := block.Bytes[len(block.Bytes)-32:] // RFC 8410 section 7: it ends with the seed
		secret["seed"] = string(seed)
		secret["PEM"] = strings.Split(string(text), "\n")[1]
	}
	return secret
}

// TestI7_APlantedLeakIsFound plants a secret in each place that the canary
// looks at, by the ways that a broker could leak it.
func TestI7_APlantedLeakIsFound(t *testing.T) {
	for place, plant := range map[string]func(r *rig, c *canary, secret string){
		"log": func(r *rig, _ *canary, secret string) {
			r.log().Debug("minted", "token", map[string]any{"access_token": secret})
		},
		"log, by a provider's error": func(r *rig, c *canary, _ string) {
			r.grant(support, "hostile.read")
			r.hostile.set(func(_ providers.MintRequest, m providers.Minted) error {
				c.watch(m.Secret.RevealAll())
				password, _ := m.Secret.Reveal("password")
				return errors.New("setting the password " + base64.StdEncoding.EncodeToString([]byte("user:"+password)))
			})
			c.heard(r.client(support).post("AccessService/IssueLease", `{"tool": "hostile.read"}`))
		},
		"evidence": func(r *rig, _ *canary, secret string) {
			r.write(func(tx store.Txn) error {
				b, err := audit.Encode(audit.Event{Time: time.Now(), Type: audit.LeaseActive, Details: map[string]string{"minted": secret}})
				if err != nil {
					return err
				}
				return tx.Append(audit.Log, b)
			})
		},
		"store": func(r *rig, _ *canary, secret string) {
			r.write(func(tx store.Txn) error {
				return tx.Put("replay|"+"key", []byte(base64.RawURLEncoding.EncodeToString([]byte("k"+secret))))
			})
		},
		"errors, by a provider's word to the caller": func(r *rig, c *canary, _ string) {
			r.grant(support, "hostile.read")
			r.hostile.set(func(_ providers.MintRequest, m providers.Minted) error {
				c.watch(m.Secret.RevealAll())
				password, _ := m.Secret.Reveal("password")
				return errors.Join(providers.ErrNothingMade, broker.Refuse(broker.ReasonProviderRefused, "not "+password, "try another"))
			})
			c.heard(r.client(support).post("AccessService/IssueLease", `{"tool": "hostile.read"}`))
		},
	} {
		t.Run(place, func(t *testing.T) {
			t.Parallel()
			r, c := newRig(t), &canary{}
			r.grant(support, "crm.read")
			res := r.client(support).issue("crm.read")
			c.watch(res.GetSecret())
			if found := c.find(c.places(r)); found != nil {
				t.Fatalf("before the leak: %v", found)
			}
			plant(r, c, res.GetSecret()["access_token"])
			want, _, _ := strings.Cut(place, ",")
			found := c.find(c.places(r))
			if !slices.ContainsFunc(found, func(s string) bool { return strings.HasPrefix(s, want+": ") }) {
				t.Errorf("the leak in the %s was not found; found: %v", place, found)
			}
		})
	}
}

func (r *rig) write(fn func(store.Txn) error) {
	r.t.Helper()
	if err := r.db.Update(r.t.Context(), fn); err != nil {
		r.t.Fatal(err)
	}
}

// TestSecretsAreShownOnce: nothing but the answer to IssueLease has the secret.
func TestSecretsAreShownOnce(t *testing.T) {
	r := newRig(t)
	r.grant(support, "crm.read")
	agent := r.client(support)
	res, err := agent.access().IssueLease(bounded(t), connect.NewRequest(&mayflyv1.IssueLeaseRequest{Tool: "crm.read"}))
	if err != nil {
		t.Fatal(err)
	}
	if got := res.Header().Get("Cache-Control"); got != "no-store" {
		t.Errorf("the answer may be cached: %q", got)
	}
	if res.Msg.GetEnv()["CRM_TOKEN"] != "access_token" {
		t.Errorf("env: %v", res.Msg.GetEnv())
	}
	for method, body := range map[string]string{
		"AccessService/GetLease": `{"id": "` + res.Msg.GetLease().GetId() + `"}`, "AccessService/ListLeases": `{"all": true}`,
		"AccessService/ListTools": `{}`, "GrantService/ListGrants": `{}`,
	} {
		a := agent.post(method, body)
		if leak := providertest.FindLeak(a.body, broker.NewSecret(res.Msg.GetSecret())); a.status != 200 || leak != "" {
			t.Errorf("%s: %d, %s", method, a.status, leak)
		}
	}
}
