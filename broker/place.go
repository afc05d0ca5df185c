package broker

import (
	"fmt"
	"strings"
)

// Position is a place in a file that people write. Lines and columns count
// from 1; a column is one character.
type Position struct {
	File         string
	Line, Column int
}

func (p Position) String() string { return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column) }

// PlacedError is one thing that is wrong in a file.
type PlacedError struct {
	Position
	Message string
}

func (e *PlacedError) Error() string { return e.Position.String() + ": " + e.Message }

// MaxPlaced bounds a report of what is wrong in files: what is beyond is counted.
const MaxPlaced = 50

// PlacedLines gives one line for each error. A long list is cut, and says so.
func PlacedLines(errs []*PlacedError) string {
	var b strings.Builder
	for i, each := range errs {
		if i == MaxPlaced {
			fmt.Fprintf(&b, "\nand %d more", len(errs)-i)
			break
		}
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(each.Error())
	}
	return b.String()
}
