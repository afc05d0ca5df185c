//go:build unix

package testbed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// wanted is the version that Debian 12 has; another is taken where it is not
// there.
const wanted = 15

// findPostgres is the folder of the server's programs, and its major version:
// Debian's packages keep one for each version; elsewhere pg_config knows.
func findPostgres() (dir string, version int, err error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	for _, initdb := range found {
		bin := filepath.Dir(initdb)
		v, err := strconv.Atoi(filepath.Base(filepath.Dir(bin)))
		if err != nil {
			continue
		}
		if v == wanted {
			return bin, v, nil
		}
		if v > version {
			dir, version = bin, v
		}
	}
	if dir != "" {
		return dir, version, nil
	}
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		dir = strings.TrimSpace(string(out))
		if _, err := os.Stat(filepath.Join(dir, "initdb")); err == nil {
			out, err := exec.Command(filepath.Join(dir, "postgres"), "--version").Output() // postgres (PostgreSQL) 16.3 (...)
			if err != nil {
				return "", 0, fmt.Errorf("asking PostgreSQL for its version: %w", err)
			}
			if words := strings.Fields(string(out)); len(words) > 2 {
				major, _, _ := strings.Cut(words[2], ".")
				if v, err := strconv.Atoi(major); err == nil {
					return dir, v, nil
				}
			}
		}
	}
	return "", 0, errors.New("there is no PostgreSQL server: apt-get install -y postgresql")
}

// postgresUser is whom the server runs as: nobody else than we are, but
// PostgreSQL refuses to run as root.
func postgresUser() (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, fmt.Errorf("finding the user to run PostgreSQL as: %w; apt-get install -y postgresql", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("finding the user to run PostgreSQL as: %w", err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("finding the user to run PostgreSQL as: %w", err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}
