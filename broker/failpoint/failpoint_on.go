//go:build failpoints && unix

// Package failpoint lets the torture test kill the broker at named points. It
// does something only in a build with the tag "failpoints", which nobody ships.
package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
)

// plan is what the environment asks for.
type plan struct {
	name   string
	n      int64
	mutant string
}

var read = sync.OnceValue(func() plan {
	p := plan{mutant: os.Getenv("MAYFLY_MUTATE")}
	spec := os.Getenv("MAYFLY_FAILPOINT")
	if spec == "" {
		return p
	}
	name, n, _ := strings.Cut(spec, ":")
	count, err := strconv.ParseInt(n, 10, 64)
	if name == "" || err != nil || count < 1 {
		panic(fmt.Sprintf("MAYFLY_FAILPOINT is %q; it is NAME:N, N from 1", spec))
	}
	p.name, p.n = name, count
	return p
})

var passed atomic.Int64

// At kills the process, with SIGKILL, at the nth passing of the point that
// MAYFLY_FAILPOINT names as NAME:N.
func At(name string) {
	p := read()
	if p.name != name || passed.Add(1) != p.n {
		return
	}
	fmt.Fprintf(os.Stderr, `{"msg":"failpoint","name":%q,"n":%d}`+"\n", p.name, p.n)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // it does not return from that
}

// Mutated reports whether MAYFLY_MUTATE asks for a broker without a protection.
func Mutated(what string) bool { return read().mutant == what }
