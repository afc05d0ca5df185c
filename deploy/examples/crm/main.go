// Crm is an example of a resource server: a small HTTP API over customer
// records that asks Mayfly about every token it is shown (RFC 7662), over
// mutual TLS with its own SVID. It holds no key and no list of revoked tokens:
// the moment Mayfly says that a token is not active, it is refused here.
//
//	crm serve             run the API (SPIFFE_ENDPOINT_SOCKET says who it is)
//	crm get CUSTOMER      call it with the token in CRM_TOKEN
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// customers are the records.
var customers = map[string]string{
	"c-17": "Ada Lovelace, London, open ticket: cannot export invoices",
	"c-42": "Grace Hopper, Arlington, no open tickets",
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "crm:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("crm", flag.ContinueOnError)
	addr := flags.String("addr", "127.0.0.1:8500", "where the API listens")
	broker := flags.String("broker", "https://localhost:8443", "Mayfly's address")
	brokerID := flags.String("broker-id", "spiffe://acme.test/mayfly", "Mayfly's SPIFFE ID")
	if len(args) == 0 {
		return errors.New("usage: crm serve | crm get CUSTOMER")
	}
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	switch {
	case args[0] == "serve" && flags.NArg() == 0:
		return serve(ctx, *addr, *broker, *brokerID)
	case args[0] == "get" && flags.NArg() == 1:
		return get(ctx, *addr, flags.Arg(0))
	}
	return errors.New("usage: crm serve | crm get CUSTOMER")
}

// serve runs the API until ctx ends.
func serve(ctx context.Context, addr, broker, brokerID string) error {
	id, err := spiffeid.FromString(brokerID)
	if err != nil {
		return err
	}
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return fmt.Errorf("fetching our SVID: %w", err)
	}
	defer source.Close()
	introspector := &http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig:   tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id)),
			ForceAttemptHTTP2: true,
		},
	}
	api := crm{client: introspector, endpoint: broker + "/oauth2/introspect"}
	srv := &http.Server{
		Addr: addr, Handler: api,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		MaxHeaderBytes: 16 << 10,
	}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		shut, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		stopped <- srv.Shutdown(shut)
	}()
	fmt.Printf("crm: serving http://%s\n", addr)
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}

// crm is the API: GET /customers/{id}.
type crm struct {
	client   *http.Client
	endpoint string
}

// token is what Mayfly says of one.
type token struct {
	Active bool              `json:"active"`
	Sub    string            `json:"sub"`
	Scope  string            `json:"scope"`
	Params map[string]string `json:"params"`
}

func (c crm) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		c.refuse(w, http.StatusUnauthorized, "invalid_request", "show a token")
		return
	}
	t, err := c.introspect(r.Context(), bearer)
	if err != nil {
		fmt.Fprintln(os.Stderr, "crm: asking about a token:", err)
		http.Error(w, "cannot ask about tokens now", http.StatusServiceUnavailable)
		return
	}
	customer, isRecord := strings.CutPrefix(r.URL.Path, "/customers/")
	switch {
	case !t.Active:
		c.refuse(w, http.StatusUnauthorized, "invalid_token", "the token is not active")
	case !slices.Contains(strings.Fields(t.Scope), "crm.read"):
		c.refuse(w, http.StatusForbidden, "insufficient_scope", "the token is not for reading records")
	case t.Params["customer"] != customer:
		c.refuse(w, http.StatusForbidden, "insufficient_scope", "the token is for another customer")
	case r.Method != http.MethodGet || !isRecord || customers[customer] == "":
		http.NotFound(w, r)
	default:
		fmt.Fprintln(w, customers[customer])
	}
}

// refuse answers as RFC 6750 section 3 has it.
func (crm) refuse(w http.ResponseWriter, status int, code, description string) {
	w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer error=%q, error_description=%q", code, description))
	http.Error(w, description, status)
}

func (c crm) introspect(ctx context.Context, bearer string) (t token, err error) {
	form := strings.NewReader(url.Values{"token": {bearer}}.Encode())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.endpoint, form)
	if err != nil {
		return t, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	res, err := c.client.Do(req)
	if err != nil {
		return t, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return t, fmt.Errorf("the broker answered %s", res.Status)
	}
	return t, json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&t)
}

// get is a client of the API, as an agent would be.
func get(ctx context.Context, addr, customer string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/customers/"+url.PathEscape(customer), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+os.Getenv("CRM_TOKEN"))
	client := &http.Client{Timeout: 10 * time.Second}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", res.Status, strings.TrimSpace(string(body)))
	}
	fmt.Print(string(body))
	return nil
}
