package devtrust

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// maxSocketPath is what fits into a Unix socket's address on every system that
// we run on: Linux has 108 bytes with the final zero, macOS 104.
const maxSocketPath = 103

var nameForm = regexp.MustCompile(`^[a-z0-9_-][a-z0-9._-]{0,63}$`)

// check validates an identity and fills in what it leaves zero.
func (s *Server) check(identity Identity) (Identity, error) {
	id := identity.ID
	if !id.MemberOf(s.trustDomain) || id.Path() == "" {
		return identity, fmt.Errorf("adding %q: an identity needs a SPIFFE ID of the trust domain %s, with a path", id, s.trustDomain)
	}
	if identity.Name == "" {
		identity.Name = strings.ToLower(strings.ReplaceAll(strings.Trim(id.Path(), "/"), "/", "-"))
	}
	if !nameForm.MatchString(identity.Name) {
		return identity, fmt.Errorf("adding %s: %q cannot name a socket; give a name of at most 64 lowercase letters, digits, '.', '_' and '-'", id, identity.Name)
	}
	if identity.SocketMode == 0 {
		identity.SocketMode = 0o600
	}
	if identity.SocketMode&^fs.ModePerm != 0 {
		return identity, fmt.Errorf("adding %s: %v is no mode for a socket", id, identity.SocketMode)
	}
	return identity, nil
}

// openDir makes the directory, or refuses one in which others could replace
// the sockets.
func openDir(dir string, mode fs.FileMode) (string, error) {
	if dir == "" {
		return "", errors.New("no directory is given")
	}
	if mode == 0 {
		mode = 0o700
	}
	if mode&^fs.ModePerm != 0 || mode&0o022 != 0 {
		return "", fmt.Errorf("the mode %v would let others replace the sockets", mode)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return "", err
	}
	switch err := os.Mkdir(dir, 0o700); {
	case err == nil:
		if err := os.Chmod(dir, mode); err != nil { // the umask may have taken bits away
			return "", err
		}
	case !errors.Is(err, fs.ErrExist):
		return "", err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return "", err
	}
	if !info.IsDir() {
		return "", fmt.Errorf("%s is no directory", dir)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("others may write to %s and could replace the sockets; take that right away: chmod go-w %s", dir, dir)
	}
	return dir, nil
}

// listen opens a Unix socket that never has another mode than the one wanted:
// it is made in a directory that only we can enter and moved when it is ready.
func listen(dir, name string, mode fs.FileMode) (_ net.Listener, path string, err error) {
	path = filepath.Join(dir, name+".sock")
	if n := max(len(path), len(dir)+len("/.4294967295/s")); n > maxSocketPath {
		return nil, "", fmt.Errorf("the path %s is %d bytes too long for a socket; choose a shorter directory", path, n-maxSocketPath)
	}
	if served(path) {
		return nil, "", fmt.Errorf("another process serves %s: stop it, or take another directory", path)
	}
	private, err := os.MkdirTemp(dir, ".")
	if err != nil {
		return nil, "", err
	}
	defer os.RemoveAll(private)
	made := filepath.Join(private, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, "", err
	}
	l.SetUnlinkOnClose(false) // its path is about to change
	if err := errors.Join(os.Chmod(made, mode), os.Rename(made, path)); err != nil {
		l.Close()
		return nil, "", err
	}
	return l, path, nil
}

// served reports whether somebody answers at the socket.
func served(path string) bool {
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// socketURI is the socket's address as the SPIFFE Workload Endpoint
// specification, section 4, writes it.
func socketURI(path string) string {
	return (&url.URL{Scheme: "unix", Path: path}).String()
}
