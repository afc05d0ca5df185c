package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// session is what is kept of a person's session between two commands.
type session struct {
	// Addr is the only address that the token is sent to.
	Addr      string    `json:"addr"`
	Person    string    `json:"person"`
	ExpiresAt time.Time `json:"expiresAt"`
	Token     string    `json:"token"`
}

// sessionPath is the file of the session at one broker.
func (p *program) sessionPath(addr string) (string, error) {
	dir := p.getenv("XDG_CONFIG_HOME")
	if !filepath.IsAbs(dir) { // the base directory specification: others are to be ignored
		home := p.getenv("HOME")
		if !filepath.IsAbs(home) {
			return "", usagef("there is no place for the session: neither XDG_CONFIG_HOME nor HOME is set to an absolute path")
		}
		dir = filepath.Join(home, ".config")
	}
	sum := sha256.Sum256([]byte(sessionAddr(addr)))
	return filepath.Join(dir, "mayfly", "session-"+hex.EncodeToString(sum[:8])+".json"), nil
}

func sessionAddr(addr string) string { return strings.TrimRight(addr, "/") }

// loadSession reads the session at a broker. What others could have read or
// written is not used.
func (p *program) loadSession(addr string) (session, error) {
	if addr == "" {
		return session{}, broker.Refusef(broker.ReasonInvalidArgument, fmt.Sprintf("set %s to https://host:port of the broker's listener for people", client.EnvPeopleAddr),
			"there is no address to come to as a person")
	}
	path, err := p.sessionPath(addr)
	if err != nil {
		return session{}, err
	}
	data, info, err := readOwn(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return session{}, broker.Refusef(broker.ReasonUnauthenticated, "sign in with `mayfly login`", "you are not signed in at %s", clean(addr))
	case err != nil:
		return session{}, fmt.Errorf("reading the session: %w", err)
	case !oursAlone(info):
		return session{}, &exitError{exitIdentity, fmt.Errorf(
			"%s is not yours alone (mode %04o), so that others may have your session: remove it, and sign in again with `mayfly login`", path, info.Mode().Perm())}
	}
	var s session
	if err := json.Unmarshal(data, &s); err != nil || s.Token == "" || s.Addr != sessionAddr(addr) {
		return session{}, &exitError{exitIdentity, fmt.Errorf("%s is no session at %s: remove it, and sign in again with `mayfly login`", path, clean(addr))}
	}
	return s, nil
}

// saveSession keeps a session, in a file with mode 0600.
func (p *program) saveSession(addr string, s client.Session) error {
	path, err := p.sessionPath(addr)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("making a place for the session: %w", err)
	}
	f, err := newSecretFile(path)
	if err != nil {
		return err
	}
	doc, err := json.Marshal(session{Addr: sessionAddr(addr), Person: s.Person, ExpiresAt: s.ExpiresAt, Token: tokenOf(s)})
	if err != nil {
		f.abort()
		return err
	}
	return f.commit(append(doc, '\n'))
}

// tokenOf is a session's token. It goes into the session's file and to the
// broker, and nowhere else.
func tokenOf(s client.Session) string {
	token, _ := s.Token.Reveal("token")
	return token
}

// dropSession forgets the session at a broker; none is no error.
func (p *program) dropSession(addr string) error {
	path, err := p.sessionPath(addr)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the session: %w", err)
	}
	return nil
}
