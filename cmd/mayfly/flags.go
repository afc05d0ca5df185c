package main

import (
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/broker"
)

// annotationNeeded marks a flag that a verb cannot do without; see need.
const annotationNeeded = "mayfly_needed"

// missingFlags names the needed flags that were not given.
func missingFlags(c *cobra.Command) string {
	var missing []string
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Annotations[annotationNeeded] != nil && !f.Changed {
			missing = append(missing, "--"+f.Name)
		}
	})
	return strings.Join(missing, ", ")
}

// wordFlag is a flag whose value is one of a few words.
type wordFlag struct {
	value *string
	words []string
}

func (w *wordFlag) String() string {
	if w.value == nil {
		return ""
	}
	return *w.value
}

func (w *wordFlag) Type() string { return strings.Join(w.words, "|") }

func (w *wordFlag) Set(s string) error {
	if !slices.Contains(w.words, s) {
		return errors.New("it is " + strings.Join(w.words, " or "))
	}
	*w.value = s
	return nil
}

// durationFlag is a span of time as people write it; see parseDuration. Zero
// means that the flag was not given: a span of zero is refused.
type durationFlag time.Duration

func (d *durationFlag) Type() string { return "duration" }

func (d *durationFlag) String() string {
	if *d == 0 {
		return ""
	}
	return span(time.Duration(*d))
}

func (d *durationFlag) Set(s string) error {
	v, err := parseDuration(s)
	*d = durationFlag(v)
	return err
}

// parseParams reads --param flags, each "name=value".
func parseParams(flags []string) (map[string]string, error) {
	if len(flags) == 0 {
		return nil, nil
	}
	params := make(map[string]string, len(flags))
	for _, f := range flags {
		name, value, ok := strings.Cut(f, "=")
		if !ok || name == "" {
			return nil, usagef("--param %q is not of the form name=value", f)
		}
		if _, twice := params[name]; twice {
			return nil, usagef("--param %s is given twice", name)
		}
		params[name] = value
	}
	return params, nil
}

// parseID reads a SPIFFE ID; empty gives the zero ID.
func parseID(name, s string) (spiffeid.ID, error) {
	if s == "" {
		return spiffeid.ID{}, nil
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return id, usagef("%s %q is no SPIFFE ID (spiffe://<trust domain>/<path>)", name, broker.Shorten(s, 100))
	}
	return id, nil
}

// paramFlag adds --param.
func paramFlag(c *cobra.Command, params *[]string, usage string) {
	c.Flags().StringArrayVar(params, "param", nil, usage)
	_ = c.RegisterFlagCompletionFunc("param", cobra.NoFileCompletions) // the flag is there: see above
}
