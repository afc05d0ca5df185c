package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

// The variables that point an SDK to the endpoint ("Container credential
// provider" of the AWS SDKs and Tools Reference Guide).
const (
	envContainerURI       = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
	envContainerToken     = "AWS_CONTAINER_AUTHORIZATION_TOKEN"
	envContainerTokenFile = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE" // goes first, where an SDK knows it

	containerPath = "/credentials"
	// containerWait is how long one request waits for a lease that is made.
	containerWait = 30 * time.Second
)

// awsEndpoint is the endpoint that SDKs get credentials from in a container: on
// loopback, and for those who have its token.
type awsEndpoint struct {
	agent *awsAgent
	ln    net.Listener
	srv   *http.Server
	token string
	sum   [sha256.Size]byte
	file  string // that the token is in; empty if it is in none
	dir   string // made for what the endpoint has in files; empty until there is one
	done  chan error
}

// listenLoopback listens where nobody from outside can come.
func listenLoopback(address string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return nil, usagef("--listen %q is not of the form host:port, such as 127.0.0.1:9911", address)
	}
	if ip, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !ip.IsLoopback()) {
		return nil, usagef("--listen %q is not on loopback: the credentials are for this machine alone, and travel without TLS", address)
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening for SDKs: %w", err)
	}
	if at, err := netip.ParseAddrPort(ln.Addr().String()); err != nil || !at.Addr().IsLoopback() {
		return nil, errors.Join(usagef("--listen %q is not on loopback", address), ln.Close())
	}
	return ln, nil
}

// openAWSEndpoint listens. The token is in no file yet.
func (p *program) openAWSEndpoint(agent *awsAgent, listen string) (*awsEndpoint, error) {
	e := &awsEndpoint{agent: agent, token: rand.Text() + rand.Text(), done: make(chan error, 1)} // 260 bits
	e.sum = sha256.Sum256([]byte(e.token))
	var err error
	if e.ln, err = listenLoopback(listen); err != nil {
		return nil, err
	}
	e.srv = &http.Server{
		Handler: e, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: containerWait + 10*time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: log.New(io.Discard, "", 0), // clients that break off
	}
	go func() { e.done <- e.srv.Serve(e.ln) }()
	return e, nil
}

// writeToken puts the token into a file for its owner alone: where the caller
// wants it, or in a new place. No line end may follow it: SDKs send what is in the
// file as it is.
func (p *program) writeToken(e *awsEndpoint, path string) error {
	if path == "" {
		dir, err := p.placeOf(e)
		if err != nil {
			return err
		}
		path = filepath.Join(dir, "token")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("finding the place for the endpoint's token: %w", err)
	}
	f, err := newSecretFile(path)
	if err != nil {
		return err
	}
	e.file = path
	return f.commit([]byte(e.token))
}

// placeOf is a new directory for what the endpoint has in files. It goes with it.
func (p *program) placeOf(e *awsEndpoint) (string, error) {
	if e.dir != "" {
		return e.dir, nil
	}
	dir, err := os.MkdirTemp(p.runtimeDir(), "mayfly-aws-") // mode 0700
	if err != nil {
		return "", fmt.Errorf("making a place for the endpoint's files: %w", err)
	}
	e.dir = dir
	return dir, nil
}

// removeFiles leaves nothing behind, and alone what is not its own: another
// endpoint may have come to the place that the caller chose.
func (e *awsEndpoint) removeFiles() {
	if text, _, err := readOwn(e.file); err == nil && subtle.ConstantTimeCompare(text, []byte(e.token)) == 1 {
		_ = os.Remove(e.file) // with the endpoint the token opens nothing any more
	}
	if e.dir != "" {
		_ = os.RemoveAll(e.dir) // as above
	}
}

func (e *awsEndpoint) uri() string { return "http://" + e.ln.Addr().String() + containerPath }

// close ends the listening, and what was under way.
func (e *awsEndpoint) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if e.srv.Shutdown(ctx) != nil {
		_ = e.srv.Close() // nobody waits for it any more
	}
	e.removeFiles()
}

// ServeHTTP implements http.Handler.
func (e *awsEndpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	sum := sha256.Sum256([]byte(r.Header.Get("Authorization")))
	switch {
	case subtle.ConstantTimeCompare(sum[:], e.sum[:]) != 1:
		// First of all: nobody else learns anything here, or keeps a connection open.
		w.Header().Set("Connection", "close")
		refuseSDK(w, http.StatusUnauthorized, "unauthorized", "the Authorization header is not the endpoint's token: neither "+envContainerToken+" nor the content of the file at "+envContainerTokenFile+", which SDKs from before the end of 2023 do not read")
		return
	case !loopbackHost(r.Host):
		refuseSDK(w, http.StatusForbidden, "forbidden", "the request is for another host")
		return
	case r.URL.Path != containerPath:
		refuseSDK(w, http.StatusNotFound, "not_found", "the credentials are at "+containerPath)
		return
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		refuseSDK(w, http.StatusMethodNotAllowed, "method_not_allowed", "use GET")
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), containerWait)
	defer cancel()
	lease, err := e.agent.get(ctx)
	if err != nil {
		f := failureOf(err, "")
		message := f.Message
		if f.Next != "" {
			message += "; next: " + f.Next
		}
		refuseSDK(w, statusForSDK(err), cmp.Or(f.Reason, "unavailable"), clean(message))
		return
	}
	doc, err := lease.containerOutput()
	if err != nil {
		refuseSDK(w, http.StatusInternalServerError, "internal", "the credentials cannot be written")
		return
	}
	head(w, http.StatusOK)
	_, _ = w.Write(doc) // a client that is gone asks again
}

// loopbackHost refuses names that somebody else's DNS points to us.
func loopbackHost(hostPort string) bool {
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil {
		host = hostPort
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// statusForSDK is the status of an error: SDKs ask again after 5xx, and give up
// after 4xx.
func statusForSDK(err error) int {
	var refusal *broker.Error
	switch code := codeOf(err); {
	case errors.As(err, &refusal) && refusal.Reason == broker.ReasonRateLimited:
		return http.StatusTooManyRequests
	case code == exitUsage:
		return http.StatusBadRequest
	case code == exitRefused, code == exitNotFound:
		return http.StatusForbidden
	case code == exitUnexpected:
		return http.StatusInternalServerError
	}
	return http.StatusServiceUnavailable
}

func head(w http.ResponseWriter, status int) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
}

// refuseSDK writes an error as SDKs read it: that for Go has small letters, and
// that for JavaScript has capitals.
func refuseSDK(w http.ResponseWriter, status int, code, message string) {
	doc, err := json.Marshal(map[string]string{"code": code, "message": message, "Code": code, "Message": message})
	if err != nil {
		doc = []byte("{}")
	}
	head(w, status)
	_, _ = w.Write(append(doc, '\n')) // a client that is gone asks again
}
