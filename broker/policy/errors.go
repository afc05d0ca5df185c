package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Position is a place in a file of policies. Lines and columns count from 1; a
// column is one character.
type Position struct {
	File         string
	Line, Column int
}

func (p Position) String() string { return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column) }

// Error is one thing that is wrong in a policy set.
type Error struct {
	Position
	Message string
}

func (e *Error) Error() string { return e.Position.String() + ": " + e.Message }

// Errors is everything that is wrong with a policy set, in the order of files
// and lines. It is never empty.
type Errors []*Error

// maxShown bounds a report: what is beyond is counted.
const maxShown = 50

// Error gives one line for each error. A long list is cut, and says so.
func (e Errors) Error() string {
	var b strings.Builder
	for i, each := range e {
		if i == maxShown {
			fmt.Fprintf(&b, "\nand %d more", len(e)-i)
			break
		}
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(each.Error())
	}
	return b.String()
}

// sort orders errors by file and place, and leaves one of those that say the
// same of the same place.
func (e Errors) sort() Errors {
	slices.SortStableFunc(e, func(a, b *Error) int {
		return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column),
			strings.Compare(a.Message, b.Message))
	})
	return slices.CompactFunc(e, func(a, b *Error) bool { return *a == *b })
}
