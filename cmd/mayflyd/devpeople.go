package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/attestation/devidp"
	"github.com/mayfly-security/mayfly/attestation/oidc"
	"github.com/mayfly-security/mayfly/broker/catalog/strictyaml"
	"github.com/mayfly-security/mayfly/broker/server"
	"github.com/mayfly-security/mayfly/deploy/examples"
)

const (
	devClient   = "mayfly"
	devCertTime = 30 * 24 * time.Hour // mayflyd dev makes a new one at each start
)

// devPeople are the sample people of dev, with what signs them in, and what the
// listener for people is started with.
type devPeople struct {
	settings *peopleSettings
	provider *devidp.Provider
	people   []devidp.Person
	caFile   string
	ln       net.Listener
}

// samplePeople is the file of sample people.
type samplePeople struct {
	People []samplePerson `yaml:"people"` // at least one
}

type samplePerson struct {
	Name     string   `yaml:"name"`      // the e-mail address; required
	FullName string   `yaml:"full_name"` // none
	Groups   []string `yaml:"groups"`    // none
}

func readSamplePeople() (people []devidp.Person, err error) {
	var f samplePeople
	if _, err := strictyaml.Decode("people.yaml", []byte(examples.People), &f); err != nil {
		return nil, err
	}
	for _, p := range f.People {
		people = append(people, devidp.Person{Name: p.Name, FullName: p.FullName, Groups: p.Groups})
	}
	return people, nil
}

// openDevPeople starts the identity provider and takes the port for people: the
// one must know where the other is.
func openDevPeople(f devFlags) (_ *devPeople, err error) {
	d := &devPeople{caFile: filepath.Join(f.dir, "people-ca.pem")}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if d.people, err = readSamplePeople(); err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", f.people)
	if err != nil {
		return nil, fmt.Errorf("listening for people: %w", err)
	}
	d.ln, d.settings = ln, &peopleSettings{ln: ln}
	d.settings.url = "https://localhost" + ln.Addr().String()[strings.LastIndexByte(ln.Addr().String(), ':'):]
	cert, err := devCertificate(d.caFile, time.Now())
	if err != nil {
		return nil, err
	}
	d.settings.certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }
	redirect, err := server.RedirectURI(d.settings.url)
	if err != nil {
		return nil, err
	}
	idp, err := net.Listen("tcp", f.idp)
	if err != nil {
		return nil, fmt.Errorf("listening for the sample people's identity provider: %w", err)
	}
	d.provider, err = devidp.New(devidp.Config{
		Listener: idp, People: d.people, Audience: d.settings.url,
		Clients: []devidp.Client{{ID: devClient, RedirectURIs: []string{redirect}}},
	})
	if err != nil {
		return nil, errors.Join(err, idp.Close())
	}
	d.settings.provider, err = oidc.New(oidc.Config{
		Issuer: d.provider.Issuer(), ClientID: devClient, RedirectURL: redirect, Audience: d.settings.url, UserAudience: d.userAudience(), Sample: true,
	})
	return d, err
}

// userAudience is that of the tokens that agents show of their users: another
// than people's own, so that no agent can come as its user.
func (d *devPeople) userAudience() string { return d.settings.url + "/on-behalf-of" }

func (d *devPeople) token(person string, forAgent bool) (string, error) {
	m := devidp.Mint{Person: person}
	if forAgent {
		m.Audience = d.userAudience()
	}
	return d.provider.MintToken(m)
}

func (d *devPeople) close() error {
	var errs []error
	if d.provider != nil {
		errs = append(errs, d.provider.Close())
	}
	if d.ln != nil {
		if err := d.ln.Close(); !errors.Is(err, net.ErrClosed) { // the server has closed it
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// devCertificate makes a certificate for this machine's names, and an authority
// for it that signs nothing else: its key is forgotten, and it may speak for
// this machine alone.
func devCertificate(caFile string, now time.Time) (*tls.Certificate, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	loopback := []net.IP{net.IPv4(127, 0, 0, 1).To4(), net.IPv6loopback}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "mayflyd dev, for localhost alone"},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(devCertTime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
		PermittedDNSDomainsCritical: true, PermittedDNSDomains: []string{"localhost"},
		PermittedIPRanges: []*net.IPNet{
			{IP: loopback[0], Mask: net.CIDRMask(32, 32)}, {IP: loopback[1], Mask: net.CIDRMask(128, 128)},
		},
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return nil, fmt.Errorf("making the certificate for people: %w", err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano() + 1), Subject: pkix.Name{CommonName: "localhost"},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost"}, IPAddresses: loopback,
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		return nil, fmt.Errorf("making the certificate for people: %w", err)
	}
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), 0o600); err != nil {
		return nil, fmt.Errorf("writing the certificate's authority: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
