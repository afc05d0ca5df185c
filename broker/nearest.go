package broker

import (
	"fmt"
	"strings"
)

// Suggest ends a message about a name that is not there: with the candidate
// that it was probably meant to be, or, if none is near, with a list of them
// all. what names them ("keys", "tools"). It returns "" if there are none.
func Suggest(name, what string, candidates []string) string {
	if near, ok := Nearest(name, candidates); ok {
		return "; did you mean " + fmt.Sprintf("%q", near) + "?"
	}
	const most = 20
	switch n := len(candidates); {
	case n == 0:
		return ""
	case n > most:
		return "; there are " + strings.Join(candidates[:most], ", ") + " and more " + what
	}
	return "; the " + what + " are " + strings.Join(candidates, ", ")
}

// Nearest returns the candidate that needs the fewest changes of one character
// (replaced, added, left out, or two exchanged) to become name, if they are
// few for its length. Of equals it is the first.
func Nearest(name string, candidates []string) (string, bool) {
	if len(name) > 256 {
		return "", false
	}
	best, distance := "", 1+max(1, min(len(name)/3, 4))
	for _, c := range candidates {
		if d := edits(strings.ToLower(name), strings.ToLower(c), distance); d < distance {
			best, distance = c, d
		}
	}
	return best, best != ""
}

// edits is the optimal string alignment distance of a and b, or limit if that
// is less.
func edits(a, b string, limit int) int {
	x, y := []rune(a), []rune(b)
	if max(len(x)-len(y), len(y)-len(x)) >= limit {
		return limit
	}
	before, last, row := make([]int, len(y)+1), make([]int, len(y)+1), make([]int, len(y)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(x); i++ {
		before, last, row = last, row, before
		row[0] = i
		for j := 1; j <= len(y); j++ {
			change := 1
			if x[i-1] == y[j-1] {
				change = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+change)
			if i > 1 && j > 1 && x[i-1] == y[j-2] && x[i-2] == y[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
	}
	return min(row[len(y)], limit)
}
