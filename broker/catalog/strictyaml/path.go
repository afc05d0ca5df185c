package strictyaml

import (
	"fmt"
	"strconv"
	"strings"
)

// At is the place of a value, by its path from the top: "tools[2].max_ttl". A
// value in a mapping is where its key is. If there is none of that path, it is
// the place of the nearest value above that there is: what is missing is
// reported where it is missing.
//
// Of a list, an index may be left away: "introspectors.id" is the first item's
// that has it. And if only the last name of a path cannot be found where it
// should be, a key of that name further below is taken. Both are for paths
// that come from decoders of JSON, which are not exact.
func (d *Document) At(path string) Position {
	n := d.root
	names := segments(path)
	for i, name := range names {
		next := n.child(name)
		if next == nil && i == len(names)-1 {
			next = n.below(name)
		}
		if next == nil {
			break
		}
		n = next
	}
	return Position{File: d.file, Line: n.line, Column: n.column}
}

// Errorf makes an error about the value of a path; see At.
func (d *Document) Errorf(path, format string, args ...any) *Error {
	return &Error{Position: d.At(path), Message: fmt.Sprintf(format, args...)}
}

// File is the file's name as it was given.
func (d *Document) File() string { return d.file }

// segments splits a path: "tools[2].max_ttl" is tools, [2], max_ttl.
func segments(path string) []string {
	return strings.FieldsFunc(strings.ReplaceAll(path, "[", ".["), func(r rune) bool { return r == '.' })
}

func (n *node) child(segment string) *node {
	if index, ok := strings.CutPrefix(segment, "["); ok {
		i, err := strconv.Atoi(strings.TrimSuffix(index, "]"))
		if err != nil || i < 0 || i >= len(n.items) {
			return nil
		}
		return n.items[i]
	}
	for _, item := range n.items {
		if found := item.child(segment); found != nil {
			return found
		}
	}
	return n.entry(segment)
}

// below is the first value of a key anywhere in n.
func (n *node) below(key string) *node {
	if found := n.entry(key); found != nil {
		return found
	}
	for _, e := range n.entries {
		if found := e.value.below(key); found != nil {
			return found
		}
	}
	for _, item := range n.items {
		if found := item.below(key); found != nil {
			return found
		}
	}
	return nil
}
