package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// confirm asks a person on a terminal to type a word. Elsewhere it refuses.
func (p *program) confirm(what, word string) error {
	typed, err := p.typed(fmt.Sprintf("%s\nType %q to go on: ", clean(what), word))
	if err != nil {
		return err
	}
	if typed != word {
		return &exitError{exitRefused, fmt.Errorf("not done: %q was not typed", word)}
	}
	return nil
}

// agree asks a person on a terminal for yes or no. Elsewhere it refuses;
// everything but yes is no.
func (p *program) agree(question string) error {
	typed, err := p.typed(clean(question) + " [y/N] ")
	if err != nil {
		return err
	}
	if answer := strings.ToLower(typed); answer != "y" && answer != "yes" {
		return &exitError{exitRefused, errors.New("not done: the answer was not yes")}
	}
	return nil
}

// typed is the line that a person types after the prompt.
func (p *program) typed(prompt string) (string, error) {
	if !p.interactive() {
		return "", usagef("it is asked of nobody here: say --yes if you mean it")
	}
	if _, err := io.WriteString(p.stderr, prompt); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(io.LimitReader(p.stdin, 100)).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", err
	}
	return strings.TrimSpace(line), nil
}

// interactive reports whether a person can answer.
func (p *program) interactive() bool {
	if p.terminal != nil {
		return p.terminal()
	}
	f, ok := p.stdin.(*os.File)
	return ok && isTerminal(f)
}
