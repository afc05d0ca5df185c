package acme_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/attestation/oidctest"
)

// What the browser does, by its environment.
const (
	browserPerson = "ACME_PERSON"      // whom it signs in
	browserHow    = "ACME_SIGN_IN"     // the button that it presses: "key", with a security key, or "password"; elsewhere "in"
	browserClass  = "ACME_SIGN_IN_ACR" // the class of authentication, where the page asks for one
	browserAge    = "ACME_SIGN_IN_AGO" // seconds since they signed in; empty: they do it now
)

// browser stands in for a person at a browser: mayfly opens it as $BROWSER, with
// the address of the sign-in. Each has no cookies, as if somebody sat down anew.
func browser() {
	if err := browse(os.Args[len(os.Args)-1]); err != nil {
		fmt.Fprintln(os.Stderr, "browser:", err)
		os.Exit(1)
	}
}

func browse(address string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	authorities, err := os.ReadFile(os.Getenv("MAYFLY_PEOPLE_CA"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authorities)
	b := oidctest.New(&http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}})
	page, err := b.Walk(ctx, address, answers())
	if err != nil {
		return err
	}
	if page.Status >= 400 {
		return fmt.Errorf("%s answered %d: %s", page.URL.Host, page.Status, page.Body)
	}
	return nil
}

// answers are for the forms of both identity providers that stories are told
// with; "auth_age" is the built-in one's.
func answers() map[string]string {
	ago := os.Getenv(browserAge)
	return map[string]string{
		"person": os.Getenv(browserPerson), "how": os.Getenv(browserHow), "acr": os.Getenv(browserClass), "auth_age": ago, "ago": ago,
	}
}

// device stands in for a person without a browser: it runs `mayfly login
// --device` with its own arguments, opens what that says on another device, and
// ends as mayfly does.
func device() {
	cmd := exec.Command("mayfly", append([]string{"login", "--device"}, os.Args[1:]...)...)
	said, err := cmd.StderrPipe()
	if err == nil {
		cmd.Stdout = os.Stdout
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "device:", err)
		os.Exit(1)
	}
	for lines := bufio.NewScanner(said); lines.Scan(); {
		fmt.Fprintln(os.Stderr, lines.Text())
		if _, address, ok := strings.Cut(lines.Text(), "or open:"); ok {
			if err := browse(strings.TrimSpace(address)); err != nil {
				fmt.Fprintln(os.Stderr, "device:", err) // mayfly waits in vain, and says so
			}
		}
	}
	_ = cmd.Wait() // its exit code tells
	os.Exit(cmd.ProcessState.ExitCode())
}
