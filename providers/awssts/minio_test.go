package awssts

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/deploy/testbed"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
)

// s3 makes one call to MinIO's S3 and returns its status.
func s3(t testing.TB, m *testbed.MinIO, keys aws.Credentials, method, path string, body string) (int, string) {
	t.Helper()
	sum := sha256.Sum256([]byte(body))
	r, err := http.NewRequestWithContext(t.Context(), method, m.Addr+path, bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-Amz-Content-Sha256", hex.EncodeToString(sum[:]))
	if err := v4.NewSigner().SignHTTP(t.Context(), keys, r, hex.EncodeToString(sum[:]), "s3", "us-east-1", time.Now()); err != nil {
		t.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(text)
}

// bucket is a MinIO with what the tools are for.
func bucket(t testing.TB) *testbed.MinIO {
	m := testbed.TestMinIO(t)
	root := aws.Credentials{AccessKeyID: m.User, SecretAccessKey: m.Password}
	for _, put := range []string{"/crm", "/pay", "/crm/acme/1", "/crm/globex/1", "/pay/1"} {
		if status, text := s3(t, m, root, http.MethodPut, put, strings.Repeat("x", len(strings.SplitN(put[1:], "/", 2)[0])*min(strings.Count(put, "/")-1, 1))); status != http.StatusOK {
			t.Fatalf("PUT %s: %d %s", put, status, text)
		}
	}
	return m
}

func openMinIO(t testing.TB, m *testbed.MinIO) *provider {
	raw := fmt.Sprintf(`{"region":"us-east-1","endpoint_url":%q,"credentials":{"method":"key_file","key_file":%q},"early_revoke":{"mode":"minio"}}`, m.Addr, keyFile(t, m.User, m.Password))
	p, err := New(nil).Open(t.Context(), providers.Config{Name: "minio", Installation: installation, Raw: json.RawMessage(raw), Log: slog.New(slog.DiscardHandler), Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p.(*provider)
}

var (
	crmRead = broker.Tool{Name: "crm.read", MaxTTL: time.Hour, Params: []broker.Param{{Name: "customer", Type: broker.ParamString, OneOf: []string{"acme", "globex"}}},
		Scope: json.RawMessage(`{"statements":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/${params.customer}/*"},
			{"Effect":"Allow","Action":"s3:ListBucket","Resource":"arn:aws:s3:::crm","Condition":{"StringLike":{"s3:prefix":"${params.customer}/*"}}}]}`)}
	payWrite = broker.Tool{Name: "pay.write", MaxTTL: time.Hour, Scope: json.RawMessage(`{"statements":[{"Effect":"Allow","Action":"s3:PutObject","Resource":"arn:aws:s3:::pay/*"}]}`)}
)

// made is a lease at MinIO.
type made struct {
	keys    aws.Credentials
	ending  providers.Ending
	req     providers.MintRequest
	minted  providers.Minted
	planned providers.Handle
}

func mintAt(t testing.TB, p *provider, tool broker.Tool, ttl time.Duration, params map[string]string) made {
	t.Helper()
	now := time.Now()
	req := providers.MintRequest{Lease: broker.NewLeaseID(now), Agent: agent, Tool: tool, Params: params, Now: now, End: now.Add(ttl)}
	planned, err := p.Plan(req)
	if err != nil {
		t.Fatal(err)
	}
	m, err := p.Mint(t.Context(), req, nil)
	if err != nil {
		t.Fatal(err)
	}
	all := m.Secret.RevealAll()
	return made{
		keys:   aws.Credentials{AccessKeyID: all[awsscope.FieldAccessKeyID], SecretAccessKey: all[awsscope.FieldSecretAccessKey], SessionToken: all[awsscope.FieldSessionToken]},
		ending: providers.Ending{Lease: req.Lease, Tool: tool.Name, Handle: m.Handle, DiesAt: m.DiesAt}, req: req, minted: m, planned: planned,
	}
}

// TestMinIOTwoTools: two tools of one parent's keys can do exactly their own.
func TestMinIOTwoTools(t *testing.T) {
	m := bucket(t)
	p := openMinIO(t, m)
	read, write := mintAt(t, p, crmRead, time.Minute, map[string]string{"customer": "acme"}), mintAt(t, p, payWrite, time.Minute, nil)
	for _, test := range []struct {
		what                string
		method, path, body  string
		mayRead, mayWriteTo bool
	}{
		{"an object of its customer", http.MethodGet, "/crm/acme/1", "", true, false},
		{"a list of its customer", http.MethodGet, "/crm?list-type=2&prefix=acme%2F", "", true, false},
		{"an object of another customer", http.MethodGet, "/crm/globex/1", "", false, false},
		{"a list of another customer", http.MethodGet, "/crm?list-type=2&prefix=globex%2F", "", false, false},
		{"a list of everything", http.MethodGet, "/crm?list-type=2", "", false, false},
		{"writing to its customer", http.MethodPut, "/crm/acme/2", "x", false, false},
		{"deleting", http.MethodDelete, "/crm/acme/1", "", false, false},
		{"a payment", http.MethodPut, "/pay/2", "x", false, true},
		{"reading a payment", http.MethodGet, "/pay/1", "", false, false},
		{"a list of payments", http.MethodGet, "/pay?list-type=2", "", false, false},
		{"a new bucket", http.MethodPut, "/other", "", false, false},
		{"all buckets", http.MethodGet, "/", "", false, false},
	} {
		for name, who := range map[string]struct {
			keys aws.Credentials
			may  bool
		}{"crm.read": {read.keys, test.mayRead}, "pay.write": {write.keys, test.mayWriteTo}} {
			status, text := s3(t, m, who.keys, test.method, test.path, test.body)
			if may := status == http.StatusOK; may != who.may || !may && status != http.StatusForbidden && !(test.path == "/" && status == http.StatusOK && !strings.Contains(text, "<Bucket>")) {
				t.Errorf("%s by %s: %d %s", test.what, name, status, text)
			}
		}
	}
	if _, err := p.Mint(t.Context(), providers.MintRequest{Lease: broker.NewLeaseID(time.Now()), Agent: agent, Tool: broker.Tool{Name: "any", MaxTTL: time.Hour, Scope: crmRead.Scope, Params: []broker.Param{{Name: "customer", Type: broker.ParamString, OneOf: []string{"a*"}}}},
		Params: map[string]string{"customer": "a*"}, Now: time.Now(), End: time.Now().Add(time.Minute)}, nil); err == nil {
		t.Error("a wildcard was taken as a customer")
	}
}

// TestMinIOShortLease: a lease of six seconds is dead within nine, although STS
// gave a quarter of an hour.
func TestMinIOShortLease(t *testing.T) {
	m := bucket(t)
	p := openMinIO(t, m)
	l := mintAt(t, p, crmRead, 6*time.Second, map[string]string{"customer": "acme"})
	if status, text := s3(t, m, l.keys, http.MethodGet, "/crm/acme/1", ""); status != http.StatusOK {
		t.Fatalf("it never worked: %d %s", status, text)
	}
	claims, err := base64.RawURLEncoding.DecodeString(strings.Split(l.keys.SessionToken, ".")[1])
	var token struct{ Exp int64 }
	if err != nil || json.Unmarshal(claims, &token) != nil || time.Until(time.Unix(token.Exp, 0)) < 14*time.Minute {
		t.Errorf("STS gave until %s (%v)", time.Unix(token.Exp, 0), err)
	}
	var dead time.Duration
	for dead == 0 {
		took := time.Since(l.req.Now)
		if status, _ := s3(t, m, l.keys, http.MethodGet, "/crm/acme/1", ""); status == http.StatusForbidden {
			dead = took
		} else if took > 10*time.Second {
			t.Fatalf("it works after %s", took)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if dead < 4*time.Second || dead > 9*time.Second {
		t.Errorf("it was dead after %s", dead)
	}
	if early := l.minted.DiesAt.Sub(l.req.Now.Add(dead)); early < -200*time.Millisecond {
		t.Errorf("DiesAt was %s before its death", -early)
	}
	t.Logf("dead after %s, DiesAt after %s", dead.Round(10*time.Millisecond), l.minted.DiesAt.Sub(l.req.Now))
	time.Sleep(time.Until(l.minted.DiesAt))
	if d := p.Confirm(t.Context(), []providers.Ending{l.ending})[0]; d.Progress != broker.ProgressVerified {
		t.Errorf("%+v", d)
	}
}

// TestMinIOEarly: one lease is ended early, and the other goes on, also where
// MinIO was started anew and has loaded neither.
func TestMinIOEarly(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restart ", restart), func(t *testing.T) {
			m := bucket(t)
			p := openMinIO(t, m)
			a, b := mintAt(t, p, crmRead, 10*time.Minute, map[string]string{"customer": "acme"}), mintAt(t, p, crmRead, 10*time.Minute, map[string]string{"customer": "acme"})
			c := mintAt(t, p, crmRead, 10*time.Minute, map[string]string{"customer": "acme"})
			if restart {
				if err := m.Stop(t.Context()); err != nil {
					t.Fatal(err)
				}
				if d := p.Revoke(t.Context(), []providers.Ending{a.ending})[0]; d.Err == nil || d.Progress != broker.ProgressNone {
					t.Errorf("a MinIO that is down: %+v", d)
				}
				if err := m.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
				// MinIO says that it revoked what it has not loaded; it lives.
				if err := p.minioRevoke(t.Context(), string(c.req.Lease)); err != nil {
					t.Fatal(err)
				}
				status, _ := s3(t, m, c.keys, http.MethodGet, "/crm/acme/1", "")
				t.Logf("revoked without being loaded, and MinIO said yes: GET answers %d", status)
			}
			if d := p.Confirm(t.Context(), []providers.Ending{a.ending})[0]; d.Err != nil || d.Progress != broker.ProgressNone {
				t.Errorf("alive: %+v", d)
			}
			if d := p.Revoke(t.Context(), []providers.Ending{a.ending})[0]; d.Err != nil || d.Progress != broker.ProgressVerified {
				t.Fatalf("%+v", d)
			}
			if status, _ := s3(t, m, a.keys, http.MethodGet, "/crm/acme/1", ""); status != http.StatusForbidden {
				t.Errorf("it was ended, and GET answers %d", status)
			}
			if status, text := s3(t, m, b.keys, http.MethodGet, "/crm/acme/1", ""); status != http.StatusOK {
				t.Errorf("the other: %d %s", status, text)
			}
			// Once more is no failure, and a second restart brings nothing back.
			if err := m.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			if d := p.Revoke(t.Context(), []providers.Ending{a.ending})[0]; d.Err != nil || d.Progress != broker.ProgressVerified {
				t.Errorf("again: %+v", d)
			}
			if status, _ := s3(t, m, a.keys, http.MethodGet, "/crm/acme/1", ""); status != http.StatusForbidden {
				t.Errorf("after another restart GET answers %d", status)
			}
			if status, text := s3(t, m, b.keys, http.MethodGet, "/crm/acme/1", ""); status != http.StatusOK {
				t.Errorf("the other, after another restart: %d %s", status, text)
			}
		})
	}
}

// TestMinIOFalseSuccess: what MinIO says it did, and did not, is no success.
func TestMinIOFalseSuccess(t *testing.T) {
	m := bucket(t)
	p := openMinIO(t, m)
	l := mintAt(t, p, crmRead, 10*time.Minute, map[string]string{"customer": "acme"})
	if err := p.minioRevoke(t.Context(), "l0000000000000000000000000"); err != nil {
		t.Fatalf("MinIO refuses an unknown lease, and the facts say that it does not: %v", err)
	}
	h, err := decodeHandle(l.ending.Handle)
	if err != nil {
		t.Fatal(err)
	}
	h.Session = "l0000000000000000000000000"
	wrong, _ := h.encode()
	d := p.Revoke(t.Context(), []providers.Ending{{Lease: l.req.Lease, Handle: wrong}})[0]
	if d.Err == nil || d.Progress == broker.ProgressVerified || !strings.Contains(d.Err.Error(), "still there") {
		t.Errorf("a lease that MinIO does not know by this name: %+v", d)
	}
	if status, _ := s3(t, m, l.keys, http.MethodGet, "/crm/acme/1", ""); status != http.StatusOK {
		t.Errorf("GET answers %d", status)
	}
	// An attempt whose answer was lost: it is ended, and not said to be verified.
	d = p.Revoke(t.Context(), []providers.Ending{{Lease: l.req.Lease, Handle: l.planned}})[0]
	if d.Err != nil || d.Progress != broker.ProgressRequested || d.RetryAt.IsZero() {
		t.Errorf("%+v", d)
	}
	if status, _ := s3(t, m, l.keys, http.MethodGet, "/crm/acme/1", ""); status != http.StatusForbidden {
		t.Errorf("GET answers %d", status)
	}
	// Another parent's keys end nothing of this one's, and say so.
	raw := fmt.Sprintf(`{"region":"us-east-1","endpoint_url":%q,"credentials":{"method":"key_file","key_file":%q},"early_revoke":{"mode":"minio"}}`, m.Addr, keyFile(t, "nobody", "nobody-has-this-key"))
	q, err := New(nil).Open(t.Context(), providers.Config{Name: "minio", Installation: installation, Raw: json.RawMessage(raw), Log: slog.New(slog.DiscardHandler), Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if d := q.Revoke(t.Context(), []providers.Ending{l.ending})[0]; d.Err == nil || d.Progress != broker.ProgressNone {
		t.Errorf("%+v", d)
	}
}
