package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// processLine is the line of a credential_process that runs mayfly with the
// words, and with the global flags that were given.
func (p *program) processLine(words []string) (string, error) {
	self, err := ownPath(os.Args[0])
	if err != nil {
		return "", err
	}
	for _, f := range []struct{ name, value string }{
		{"--addr", p.addr}, {"--broker-id", p.brokerID}, {"--as", p.as}, {"--timeout", p.timeout.String()},
	} {
		if f.value != "" {
			words = append(words, f.name, f.value)
		}
	}
	words = append([]string{self}, words...)
	for i, word := range words {
		if words[i], err = processWord(word); err != nil {
			return "", err
		}
	}
	return strings.Join(words, " "), nil
}

// ownPath is where mayfly is: the path that it was called by, if that leads here,
// because a link outlives an upgrade of what it leads to.
func ownPath(called string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("finding out where mayfly is: %w", err)
	}
	called, err = exec.LookPath(called)
	if err != nil {
		return self, nil
	}
	if called, err = filepath.Abs(called); err != nil {
		return self, nil
	}
	a, errA := os.Stat(self)
	b, errB := os.Stat(called)
	if errA != nil || errB != nil || !os.SameFile(a, b) {
		return self, nil
	}
	return called, nil
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// processWord is one word of the line. Some SDKs give the line to a shell, and
// others cut it into words as one would; both know single quotes. A line of the
// file can hold neither line ends nor what begins a comment there.
func processWord(word string) (string, error) {
	switch {
	case plainWord.MatchString(word):
		return word, nil
	case word != clean(word) || strings.ContainsAny(word, "\r\n\t") || strings.Contains(word, " #") || strings.Contains(word, " ;"):
		return "", usagef("%q cannot stand in a profile: it has a line end, a control character, or what begins a comment there", word)
	}
	return quote(word), nil
}
