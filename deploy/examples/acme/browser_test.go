package acme_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/mayfly-security/mayfly/attestation/oidctest"
)

// What the browser does, by its environment.
const (
	browserPerson = "ACME_PERSON"      // whom it signs in
	browserHow    = "ACME_SIGN_IN"     // "key", with a security key, or "password"
	browserAge    = "ACME_SIGN_IN_AGO" // seconds since they signed in; empty: they do it now
)

// browser stands in for a person at a browser: mayfly opens it as $BROWSER, with
// the address of the sign-in. Each has no cookies, as if somebody sat down anew.
func browser() {
	if err := browse(); err != nil {
		fmt.Fprintln(os.Stderr, "browser:", err)
		os.Exit(1)
	}
}

func browse() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	authorities, err := os.ReadFile(os.Getenv("MAYFLY_PEOPLE_CA"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authorities)
	b := oidctest.New(&http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}})
	page, err := b.Walk(ctx, os.Args[len(os.Args)-1], map[string]string{
		"person": os.Getenv(browserPerson), "how": os.Getenv(browserHow), "auth_age": os.Getenv(browserAge),
	})
	if err != nil {
		return err
	}
	if page.Status >= 400 {
		return fmt.Errorf("%s answered %d: %s", page.URL.Host, page.Status, page.Body)
	}
	return nil
}
