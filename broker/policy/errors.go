package policy

import (
	"cmp"
	"slices"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
)

// Position is a place in a file of policies.
type Position = broker.Position

// Error is one thing that is wrong in a policy set.
type Error = broker.PlacedError

// Errors is everything that is wrong with a policy set, in the order of files
// and lines. It is never empty.
type Errors []*Error

// Error gives one line for each error. A long list is cut, and says so.
func (e Errors) Error() string { return broker.PlacedLines(e) }

// sort orders errors by file and place, and leaves one of those that say the
// same of the same place.
func (e Errors) sort() Errors {
	slices.SortStableFunc(e, func(a, b *Error) int {
		return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column),
			strings.Compare(a.Message, b.Message))
	})
	return slices.CompactFunc(e, func(a, b *Error) bool { return *a == *b })
}
