package main

import (
	"strings"

	"github.com/mayfly-security/mayfly/broker/client"
)

// quote makes one word of s for any POSIX shell. Within single quotes nothing
// means anything but the single quote itself (POSIX XCU 2.2.2), which is
// written outside of them.
func quote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// exports is what a shell evaluates to set the variables. The names were
// checked by client.Credential.Variables.
func exports(vars []client.Variable) string {
	var b strings.Builder
	for _, v := range vars {
		b.WriteString("export " + v.Name + "=" + quote(v.Value) + "\n")
	}
	return b.String()
}
