package devtrust_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mayfly-security/mayfly/attestation/devtrust"
)

var agentID = spiffeid.RequireFromString("spiffe://dev.test/agent/support-bot")

// start runs a server; its sockets' paths are kept short.
func start(t *testing.T, c devtrust.Config) *devtrust.Server {
	t.Helper()
	if c.TrustDomain.IsZero() {
		c.TrustDomain = agentID.TrustDomain()
	}
	if c.Dir == "" {
		c.Dir = shortDir(t)
	}
	s, err := devtrust.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "td")
}

func add(t *testing.T, s *devtrust.Server, identity devtrust.Identity) string {
	t.Helper()
	addr, err := s.Add(identity)
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func at(addr string) workloadapi.SourceOption {
	return workloadapi.WithClientOptions(workloadapi.WithAddr(addr))
}

func x509Source(t *testing.T, addr string) *workloadapi.X509Source {
	t.Helper()
	src, err := workloadapi.NewX509Source(bounded(t), at(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close() })
	return src
}

func svidOf(t *testing.T, src x509svid.Source) *x509svid.SVID {
	t.Helper()
	svid, err := src.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

// until waits for updates of a source until done says so.
func until(t *testing.T, src interface {
	WaitUntilUpdated(context.Context) error
}, done func() bool) {
	t.Helper()
	ctx := bounded(t)
	for !done() {
		if err := src.WaitUntilUpdated(ctx); err != nil {
			t.Fatalf("waiting for an update: %v", err)
		}
	}
}

func authorities(t *testing.T, src *workloadapi.X509Source) []*x509.Certificate {
	t.Helper()
	b, err := src.GetX509BundleForTrustDomain(agentID.TrustDomain())
	if err != nil {
		t.Fatal(err)
	}
	return b.X509Authorities()
}

func TestX509SVID(t *testing.T) {
	s := start(t, devtrust.Config{SVIDTTL: 3 * time.Minute})
	src := x509Source(t, add(t, s, devtrust.Identity{ID: agentID, DNSNames: []string{"localhost"}}))
	svid := svidOf(t, src)
	id, _, err := x509svid.Verify(svid.Certificates, src)
	if err != nil || id != agentID {
		t.Fatalf("Verify gives %v, %v", id, err)
	}
	leaf := svid.Certificates[0]
	if left := time.Until(leaf.NotAfter); left <= 2*time.Minute || left > 3*time.Minute {
		t.Errorf("the SVID lives for %s more", left)
	}
	if !slices.Equal(leaf.DNSNames, []string{"localhost"}) {
		t.Errorf("DNS SANs are %q", leaf.DNSNames)
	}
	// A client that knows no SPIFFE gets through by the DNS SAN.
	roots := x509.NewCertPool()
	roots.AddCert(authorities(t, src)[0])
	if _, err := leaf.Verify(x509.VerifyOptions{DNSName: "localhost", Roots: roots}); err != nil {
		t.Errorf("verifying as a web client does: %v", err)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{DNSName: "example.org", Roots: roots}); err == nil {
		t.Error("the certificate is good for any name")
	}
}

func TestRotationAtHalfLife(t *testing.T) {
	t.Parallel()
	s := start(t, devtrust.Config{SVIDTTL: 4 * time.Second})
	src := x509Source(t, add(t, s, devtrust.Identity{ID: agentID}))
	first := svidOf(t, src)
	until(t, src, func() bool { return !svidOf(t, src).Certificates[0].Equal(first.Certificates[0]) })
	if time.Now().After(first.Certificates[0].NotAfter) {
		t.Error("the new SVID came after the old one had expired")
	}
	if first.PrivateKey.(*ecdsa.PrivateKey).Equal(svidOf(t, src).PrivateKey) {
		t.Error("the new SVID has the old key")
	}
}

func TestRotateCA(t *testing.T) {
	s := start(t, devtrust.Config{})
	addr := add(t, s, devtrust.Identity{ID: agentID})
	src := x509Source(t, addr)
	jwts, err := workloadapi.NewJWTSource(bounded(t), at(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer jwts.Close()
	bundles, err := workloadapi.NewBundleSource(bounded(t), at(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer bundles.Close()

	first := svidOf(t, src)
	token := func() *jwtsvid.SVID {
		t.Helper()
		svid, err := jwts.FetchJWTSVID(bounded(t), jwtsvid.Params{Audience: "vault"})
		if err != nil {
			t.Fatal(err)
		}
		return svid
	}
	firstToken := token()
	firstBundle := s.Bundle().JWTBundle()
	valid := func(svid *jwtsvid.SVID) bool {
		_, err := jwtsvid.ParseAndValidate(svid.Marshal(), jwts, []string{"vault"})
		return err == nil
	}

	if err := s.RotateCA(); err != nil {
		t.Fatal(err)
	}
	until(t, src, func() bool { return len(authorities(t, src)) == 2 })
	if !svidOf(t, src).Certificates[0].Equal(first.Certificates[0]) {
		t.Error("the SVID changed before the new authority was known")
	}
	until(t, jwts, func() bool {
		b, err := jwts.GetJWTBundleForTrustDomain(agentID.TrustDomain())
		return err == nil && len(b.JWTAuthorities()) == 2
	})
	until(t, bundles, func() bool {
		b, err := bundles.GetBundleForTrustDomain(agentID.TrustDomain())
		return err == nil && len(b.X509Authorities()) == 2 && len(b.JWTAuthorities()) == 2
	})

	if _, err := jwtsvid.ParseAndValidate(token().Marshal(), firstBundle, []string{"vault"}); err != nil {
		t.Errorf("a JWT-SVID is signed by an authority that may not be known yet: %v", err)
	}

	if err := s.RotateSVIDs(); err != nil {
		t.Fatal(err)
	}
	until(t, src, func() bool { return !svidOf(t, src).Certificates[0].Equal(first.Certificates[0]) })
	second := svidOf(t, src)
	for _, svid := range []*x509svid.SVID{first, second} {
		if _, _, err := x509svid.Verify(svid.Certificates, src); err != nil {
			t.Errorf("an SVID is not valid while both authorities stand: %v", err)
		}
	}
	if second.Certificates[0].CheckSignatureFrom(authorities(t, src)[1]) != nil {
		t.Error("the new authority did not sign the new SVID")
	}
	secondToken := token()
	if !valid(firstToken) || !valid(secondToken) {
		t.Error("a JWT-SVID is not valid while both authorities stand")
	}

	if err := s.DropOldAuthorities(); err != nil {
		t.Fatal(err)
	}
	until(t, src, func() bool { return len(authorities(t, src)) == 1 })
	if _, _, err := x509svid.Verify(first.Certificates, src); err == nil {
		t.Error("an SVID of the dropped authority is valid")
	}
	if _, _, err := x509svid.Verify(svidOf(t, src).Certificates, src); err != nil {
		t.Errorf("the present SVID is not valid: %v", err)
	}
	until(t, jwts, func() bool { return !valid(firstToken) })
	if !valid(secondToken) {
		t.Error("a JWT-SVID of the present authority is not valid")
	}
}

// An SVID that the dropped authority signed is replaced in the very message
// that takes the authority away.
func TestDropReplacesSVIDsAtOnce(t *testing.T) {
	s := start(t, devtrust.Config{})
	src := x509Source(t, add(t, s, devtrust.Identity{ID: agentID}))
	old := authorities(t, src)[0]
	if err := s.RotateCA(); err != nil {
		t.Fatal(err)
	}
	if err := s.DropOldAuthorities(); err != nil {
		t.Fatal(err)
	}
	until(t, src, func() bool { return !slices.ContainsFunc(authorities(t, src), old.Equal) })
	if _, _, err := x509svid.Verify(svidOf(t, src).Certificates, src); err != nil {
		t.Errorf("after the drop: %v", err)
	}
}

func TestJWTSVID(t *testing.T) {
	s := start(t, devtrust.Config{})
	client, err := workloadapi.New(bounded(t), workloadapi.WithAddr(add(t, s, devtrust.Identity{ID: agentID})))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	svid, err := client.FetchJWTSVID(bounded(t), jwtsvid.Params{Audience: "vault", ExtraAudiences: []string{"aws"}})
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID != agentID || !slices.Equal(svid.Audience, []string{"vault", "aws"}) {
		t.Errorf("got %v for %q", svid.ID, svid.Audience)
	}
	if left := time.Until(svid.Expiry); left <= 4*time.Minute || left > 5*time.Minute {
		t.Errorf("the JWT-SVID lives for %s more", left)
	}
	if _, err := client.ValidateJWTSVID(bounded(t), svid.Marshal(), "vault"); err != nil {
		t.Errorf("validating: %v", err)
	}
	refused := map[string]func() error{
		"another audience": func() error {
			_, err := client.ValidateJWTSVID(bounded(t), svid.Marshal(), "gcp")
			return err
		},
		"a forged signature": func() error {
			token := svid.Marshal()
			cut := strings.LastIndexByte(token, '.') + 1
			_, err := client.ValidateJWTSVID(bounded(t), token[:cut]+strings.Repeat("A", len(token)-cut), "vault")
			return err
		},
		"another's token": func() error {
			other := start(t, devtrust.Config{})
			theirs, err := workloadapi.FetchJWTSVID(bounded(t), jwtsvid.Params{Audience: "vault"}, workloadapi.WithAddr(add(t, other, devtrust.Identity{ID: agentID})))
			if err != nil {
				t.Fatal(err)
			}
			_, err = client.ValidateJWTSVID(bounded(t), theirs.Marshal(), "vault")
			return err
		},
		"no audience": func() error {
			_, err := client.FetchJWTSVID(bounded(t), jwtsvid.Params{})
			return err
		},
	}
	for name, try := range refused {
		if code := status.Code(try()); code != codes.InvalidArgument {
			t.Errorf("%s: %v", name, code)
		}
	}
	_, err = client.FetchJWTSVID(bounded(t), jwtsvid.Params{Audience: "vault", Subject: spiffeid.RequireFromPath(agentID.TrustDomain(), "/admin")})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("another's JWT-SVID: %v", err)
	}
}

func TestFederation(t *testing.T) {
	s := start(t, devtrust.Config{})
	otherID := spiffeid.RequireFromString("spiffe://partner.test/agent")
	other := start(t, devtrust.Config{TrustDomain: otherID.TrustDomain()})
	theirs := svidOf(t, x509Source(t, add(t, other, devtrust.Identity{ID: otherID})))
	addr := add(t, s, devtrust.Identity{ID: agentID})
	src := x509Source(t, addr)
	if _, _, err := x509svid.Verify(theirs.Certificates, src); err == nil {
		t.Error("a stranger's SVID is valid")
	}
	if err := s.Federate(other.Bundle()); err != nil {
		t.Fatal(err)
	}
	until(t, src, func() bool { _, err := src.GetX509BundleForTrustDomain(otherID.TrustDomain()); return err == nil })
	if id, _, err := x509svid.Verify(theirs.Certificates, src); err != nil || id != otherID {
		t.Errorf("federated: %v, %v", id, err)
	}
	set, err := workloadapi.FetchX509Bundles(bounded(t), workloadapi.WithAddr(addr))
	if err != nil || set.Len() != 2 {
		t.Errorf("FetchX509Bundles: %v, %v", set, err)
	}
	jwtSet, err := workloadapi.FetchJWTBundles(bounded(t), workloadapi.WithAddr(addr))
	if err != nil || jwtSet.Len() != 2 {
		t.Errorf("FetchJWTBundles: %v, %v", jwtSet, err)
	}
	s.Unfederate(otherID.TrustDomain())
	until(t, src, func() bool { _, err := src.GetX509BundleForTrustDomain(otherID.TrustDomain()); return err != nil })
	if err := s.Federate(s.Bundle()); err == nil {
		t.Error("a trust domain federates with itself")
	}
}

// The header keeps browsers and confused deputies out.
func TestSecurityHeaderIsRequired(t *testing.T) {
	s := start(t, devtrust.Config{})
	conn, err := grpc.NewClient(add(t, s, devtrust.Identity{ID: agentID}), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	api := workload.NewSpiffeWorkloadAPIClient(conn)
	for name, ctx := range map[string]context.Context{
		"none":  bounded(t),
		"false": metadata.AppendToOutgoingContext(bounded(t), "workload.spiffe.io", "false"),
	} {
		calls := map[string]func() error{
			"FetchX509SVID": func() error {
				stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
				if err != nil {
					return err
				}
				_, err = stream.Recv()
				return err
			},
			"FetchJWTSVID": func() error {
				_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"vault"}})
				return err
			},
		}
		for call, try := range calls {
			if code := status.Code(try()); code != codes.InvalidArgument {
				t.Errorf("%s with header %s: %v", call, name, code)
			}
		}
	}
}

func TestSocketModes(t *testing.T) {
	dir := shortDir(t)
	s := start(t, devtrust.Config{Dir: dir})
	add(t, s, devtrust.Identity{ID: agentID})
	add(t, s, devtrust.Identity{ID: spiffeid.RequireFromPath(agentID.TrustDomain(), "/shared"), Name: "g", SocketMode: 0o660})
	for name, want := range map[string]fs.FileMode{".": 0o700, "agent-support-bot.sock": 0o600, "g.sock": 0o660} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, not %v", name, info.Mode().Perm(), want)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("the directory holds %v (%v)", entries, err)
	}
}

func TestRefusals(t *testing.T) {
	open := filepath.Join(shortDir(t), "open")
	if err := os.MkdirAll(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]devtrust.Config{
		"no trust domain":            {Dir: open},
		"no directory":               {TrustDomain: agentID.TrustDomain()},
		"a directory open to others": {TrustDomain: agentID.TrustDomain(), Dir: open},
		"a mode open to others":      {TrustDomain: agentID.TrustDomain(), Dir: filepath.Join(open, "x"), DirMode: 0o777},
		"a negative TTL":             {TrustDomain: agentID.TrustDomain(), Dir: filepath.Join(open, "x"), SVIDTTL: -1},
	} {
		if s, err := devtrust.New(c); err == nil {
			t.Errorf("%s: no error", name)
			s.Close()
		}
	}

	dir := shortDir(t)
	s := start(t, devtrust.Config{Dir: dir})
	add(t, s, devtrust.Identity{ID: agentID, Name: "a"})
	id := spiffeid.RequireFromPath(agentID.TrustDomain(), "/b")
	for name, identity := range map[string]devtrust.Identity{
		"no ID":                {},
		"another trust domain": {ID: spiffeid.RequireFromString("spiffe://elsewhere/b")},
		"no path":              {ID: agentID.TrustDomain().ID()},
		"the same ID":          {ID: agentID, Name: "b"},
		"the same name":        {ID: id, Name: "a"},
		"a name with a slash":  {ID: id, Name: "../b"},
		"a hidden name":        {ID: id, Name: ".b"},
		"a name that is long":  {ID: id, Name: strings.Repeat("b", 64) + "b"},
		"a mode with set-user": {ID: id, SocketMode: 0o600 | fs.ModeSetuid},
	} {
		if _, err := s.Add(identity); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	deep := start(t, devtrust.Config{Dir: filepath.Join(dir, strings.Repeat("d", 90))})
	if _, err := deep.Add(devtrust.Identity{ID: agentID, Name: "a"}); err == nil {
		t.Error("a path that no socket can have: no error")
	}
	second := start(t, devtrust.Config{Dir: dir})
	if _, err := second.Add(devtrust.Identity{ID: agentID, Name: "a"}); err == nil {
		t.Error("a living server's socket was replaced")
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	dir := shortDir(t)
	s := start(t, devtrust.Config{Dir: dir})
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "a.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	x509Source(t, add(t, s, devtrust.Identity{ID: agentID, Name: "a"}))
}

func TestRemove(t *testing.T) {
	s := start(t, devtrust.Config{})
	addr := add(t, s, devtrust.Identity{ID: agentID})
	x509Source(t, addr)
	s.Remove(agentID)
	s.Remove(agentID)
	if _, err := os.Stat(strings.TrimPrefix(addr, "unix://")); !os.IsNotExist(err) {
		t.Errorf("the socket is there still: %v", err)
	}
	if again := add(t, s, devtrust.Identity{ID: agentID}); again != addr {
		t.Errorf("added again at %s, not %s", again, addr)
	}
}

func TestClose(t *testing.T) {
	s := start(t, devtrust.Config{})
	addr := add(t, s, devtrust.Identity{ID: agentID})
	x509Source(t, addr) // a stream that is open must not hold Close up
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(strings.TrimPrefix(addr, "unix://")); !os.IsNotExist(err) {
		t.Errorf("the socket is there still: %v", err)
	}
	for name, err := range map[string]error{
		"Add":                func() error { _, err := s.Add(devtrust.Identity{ID: agentID}); return err }(),
		"RotateCA":           s.RotateCA(),
		"RotateSVIDs":        s.RotateSVIDs(),
		"DropOldAuthorities": s.DropOldAuthorities(),
	} {
		if err != devtrust.ErrClosed {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

// A client comes back by itself when the server does. (go-spiffe stops watching
// for good where it is told Canceled or InvalidArgument.)
func TestClientsSurviveARestart(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	s := start(t, devtrust.Config{Dir: dir})
	src := x509Source(t, add(t, s, devtrust.Identity{ID: agentID}))
	first := svidOf(t, src)
	s.Close()
	again := start(t, devtrust.Config{Dir: dir})
	add(t, again, devtrust.Identity{ID: agentID})
	until(t, src, func() bool { return !svidOf(t, src).Certificates[0].Equal(first.Certificates[0]) })
	if again.Bundle().X509Bundle().Equal(s.Bundle().X509Bundle()) {
		t.Error("the authority outlived its server")
	}
}

func TestIssue(t *testing.T) {
	s := start(t, devtrust.Config{})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-time.Hour)
	for name, template := range map[string]*x509.Certificate{
		"no ID":   {},
		"two IDs": {URIs: []*url.URL{agentID.URL(), agentID.URL()}},
		"a CA":    {URIs: []*url.URL{agentID.URL()}, IsCA: true, BasicConstraintsValid: true},
		"expired": {URIs: []*url.URL{agentID.URL()}, NotBefore: past.Add(-time.Hour), NotAfter: past},
	} {
		cert, err := s.Issue(template, key.Public())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := cert.CheckSignatureFrom(s.Bundle().X509Authorities()[0]); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if len(cert.URIs) != len(template.URIs) || cert.IsCA != template.IsCA {
			t.Errorf("%s: the certificate is not what the template says", name)
		}
	}
	if _, err := s.Issue(nil, key.Public()); err == nil {
		t.Error("no template: no error")
	}
}
