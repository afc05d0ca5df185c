package strictyaml

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/mayfly-security/mayfly/broker"
)

// Position is a place in a file.
type Position = broker.Position

// Error is one thing that is wrong in a file.
type Error = broker.PlacedError

// Errors is everything that is wrong, in the order of files and lines. It is
// never empty.
type Errors []*Error

// Error gives one line for each error. A long list is cut, and says so.
func (e Errors) Error() string { return broker.PlacedLines(e) }

// Unwrap lets errors.As find a single *Error.
func (e Errors) Unwrap() []error {
	all := make([]error, len(e))
	for i, each := range e {
		all[i] = each
	}
	return all
}

// Sort orders errors by line and column within each file, and leaves the order
// of files as it is.
func (e Errors) Sort() {
	order := make(map[string]int)
	for _, each := range e {
		if _, ok := order[each.File]; !ok {
			order[each.File] = len(order)
		}
	}
	slices.SortStableFunc(e, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(order[a.File], order[b.File]), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}

// collector gathers the errors of one file.
type collector struct {
	file   string
	errors Errors
}

func (c *collector) add(at place, format string, args ...any) {
	c.errors = append(c.errors, &Error{
		Position: Position{File: c.file, Line: at.line, Column: at.column},
		Message:  fmt.Sprintf(format, args...),
	})
}

func (c *collector) err() error {
	if len(c.errors) == 0 {
		return nil
	}
	c.errors.Sort()
	return c.errors
}

// quote shows text of the file in a message: short, and harmless to a terminal.
func quote(s string) string { return fmt.Sprintf("%q", broker.Shorten(s, 60)) }
