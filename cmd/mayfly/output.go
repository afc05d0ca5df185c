package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/broker/client"
)

// show prints a result: v as JSON, or what text writes into a page.
func (p *program) show(v any, text func(*page)) error {
	if p.output == "json" {
		return writeJSON(p.stdout, v)
	}
	var out page
	text(&out)
	_, err := io.WriteString(p.stdout, out.String())
	return err
}

func writeJSON(w io.Writer, v any) error {
	doc, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = w.Write(append(escapeUnsafe(doc), '\n'))
	return err
}

// writeLine writes v as one line, for what comes bit by bit.
func writeLine(w io.Writer, v any) error {
	doc, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(escapeUnsafe(doc), '\n'))
	return err
}

// escapeUnsafe escapes what a terminal could act on and JSON leaves as it is,
// such as bidirectional overrides and the controls above ASCII. A document's
// strings are the only place for such characters, and mean the same escaped.
func escapeUnsafe(doc []byte) []byte {
	out := make([]byte, 0, len(doc))
	for len(doc) > 0 {
		r, size := utf8.DecodeRune(doc)
		if r < utf8.RuneSelf && r != 0x7f || clean(string(r)) == string(r) {
			out = append(out, doc[:size]...)
		} else {
			for _, unit := range utf16.Encode([]rune{r}) {
				out = fmt.Appendf(out, `\u%04x`, unit)
			}
		}
		doc = doc[size:]
	}
	return out
}

// page is text for people. Everything that is put in is cleaned: no control,
// bidirectional or invisible character gets from anybody's text to a terminal.
type page struct{ strings.Builder }

func (p *page) line(format string, args ...any) {
	p.WriteString(clean(fmt.Sprintf(format, args...)))
	p.WriteByte('\n')
}

// table writes aligned columns. Columns that are empty in all rows are left out.
func (p *page) table(head []string, rows [][]string) {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	used := make([]bool, len(head))
	for _, row := range rows {
		for i, cell := range row {
			used[i] = used[i] || cell != ""
		}
	}
	for _, row := range append([][]string{head}, rows...) {
		var cells []string
		for i, cell := range row {
			if used[i] {
				cells = append(cells, clean(cell))
			}
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	w.Flush() // a Builder takes everything
	for line := range strings.Lines(b.String()) {
		p.WriteString(strings.TrimRight(line, " \n"))
		p.WriteByte('\n')
	}
}

// fields writes pairs of a name and a value, aligned. Empty values are left out.
func (p *page) fields(prefix string, pairs ...string) {
	w := tabwriter.NewWriter(p, 0, 0, 2, ' ', 0)
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(w, "%s%s\t%s\n", prefix, pairs[i], clean(pairs[i+1]))
		}
	}
	w.Flush() // a Builder takes everything
}

// paramText is parameters as people read them: "a=1 b=2".
func paramText(params map[string]string) string { return strings.Join(pairs(params), " ") }

// pairs are parameters as "name=value", in order.
func pairs(params map[string]string) (all []string) {
	for _, name := range slices.Sorted(maps.Keys(params)) {
		all = append(all, name+"="+params[name])
	}
	return all
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// failure is an error as JSON, on standard error with --output json.
type failure struct {
	Error failureBody `json:"error"`
}

type failureBody struct {
	Reason        string `json:"reason,omitempty"` // of the broker's reasons; empty for what the broker did not say
	Message       string `json:"message"`
	Next          string `json:"next,omitempty"`
	CorrelationID string `json:"correlationId,omitempty"`
	LeaseID       string `json:"leaseId,omitempty"`
	// What a new sign-in must be, with insufficient_user_authentication.
	MaxAge    int64    `json:"maxAge,omitempty"`
	ACRValues []string `json:"acrValues,omitempty"`
	ExitCode  int      `json:"exitCode"`
}

func failureOf(err error, path string) failureBody {
	f := failureBody{Message: err.Error(), ExitCode: codeOf(err)}
	var refusal *broker.Error
	var unheard *client.ConnectionError
	switch {
	case errors.As(err, &refusal):
		f.Reason, f.Message, f.Next = string(refusal.Reason), refusal.Message, refusal.Next
		f.CorrelationID, f.LeaseID = string(refusal.Correlation), string(refusal.Lease)
		f.MaxAge, f.ACRValues = int64(refusal.StepUp.MaxAge.Seconds()), refusal.StepUp.ACR
	case errors.As(err, &unheard):
		f.Message, f.Next = unheard.Message, unheard.Next
	case codeOf(err) == exitUsage, errors.As(err, new(*exitError)) && codeOf(err) == exitExec:
		f.Next = "see `mayfly help`"
		if path != "" {
			f.Next = fmt.Sprintf("see `%s --help`", path)
		}
	case codeOf(err) > exitSignal:
		f.Message = "interrupted"
	}
	return f
}

// complain tells on standard error what happened, why, and what to do next.
func (p *program) complain(err error) {
	var exit *exitError
	if errors.As(err, &exit) && exit.err == nil || errors.Is(err, syscall.EPIPE) {
		return // there is nothing to say, or nobody who reads
	}
	f := failureOf(err, p.path)
	if p.output == "json" {
		_ = writeJSON(p.stderr, failure{f}) // where standard error is gone, nobody can be told
		return
	}
	var out page
	out.line("mayfly: %s%s", f.Message, inBrackets(f.Reason))
	if f.Next != "" {
		out.line("  next: %s", f.Next)
	}
	if f.LeaseID != "" {
		out.line("  lease: %s", f.LeaseID)
	}
	if f.CorrelationID != "" {
		out.line("  correlation ID: %s", f.CorrelationID)
	}
	_, _ = io.WriteString(p.stderr, out.String()) // as above
}

// tell writes a page to a person, beside the result of the verb.
func (p *program) tell(text func(*page)) {
	var out page
	text(&out)
	_, _ = io.WriteString(p.stderr, out.String()) // as above
}

// warn tells something on standard error that is no failure of the verb.
func (p *program) warn(format string, args ...any) {
	_, _ = io.WriteString(p.stderr, clean("mayfly: "+fmt.Sprintf(format, args...))+"\n") // as above
}

func inBrackets(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}
