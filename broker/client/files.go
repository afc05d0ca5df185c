package client

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Files are an identity as PEM files, as spiffe-helper or `mayfly svid` write
// them. All three are needed, or none.
type Files struct {
	Cert   string // the X.509-SVID, leaf first, with its intermediates
	Key    string // its private key, PKCS #8
	Bundle string // the authorities of the SVID's trust domain
}

// fileSource is a Source that reads its files again when they have changed.
// While new ones do not fit together (somebody is in the middle of writing
// them), the last good ones stay.
type fileSource struct {
	files Files

	mu     sync.Mutex
	seen   [3]fileStamp
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
}

// fileStamp tells whether a file is the one that was read.
type fileStamp struct {
	modified time.Time
	size     int64
}

func openFiles(f Files) (Source, error) {
	if f.Cert == "" || f.Key == "" || f.Bundle == "" {
		return nil, identityError(nil, fmt.Sprintf("set all of %s, %s and %s, or none of them", EnvCert, EnvKey, EnvBundle),
			"an identity from files needs a certificate, a key and a bundle")
	}
	s := &fileSource{files: f}
	if err := s.refresh(); err != nil {
		return nil, identityError(err, "write the SVID, its key and its trust domain's bundle as PEM; `mayfly svid --dir` does",
			"the identity cannot be read from %s, %s and %s: %s", clean(f.Cert), clean(f.Key), clean(f.Bundle), clean(err.Error()))
	}
	return s, nil
}

func (s *fileSource) stamps() (stamps [3]fileStamp, err error) {
	for i, name := range []string{s.files.Cert, s.files.Key, s.files.Bundle} {
		info, err := os.Stat(name)
		if err != nil {
			return stamps, err
		}
		stamps[i] = fileStamp{info.ModTime(), info.Size()}
	}
	return stamps, nil
}

// refresh reads the files if they have changed. The caller holds mu, or is the
// only one to know s.
func (s *fileSource) refresh() error {
	stamps, err := s.stamps()
	if err != nil || stamps == s.seen {
		return err
	}
	svid, err := x509svid.Load(s.files.Cert, s.files.Key)
	if err != nil {
		return err
	}
	bundle, err := x509bundle.Load(svid.ID.TrustDomain(), s.files.Bundle)
	if err != nil {
		return err
	}
	s.svid, s.bundle, s.seen = svid, bundle, stamps
	return nil
}

func (s *fileSource) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.refresh() // the last good identity stays; the broker says when it is too old
	return s.svid, nil
}

func (s *fileSource) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.refresh()
	return s.bundle.GetX509BundleForTrustDomain(td)
}

func (s *fileSource) Close() error { return nil }
