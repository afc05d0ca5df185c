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
// Paths from decoders of JSON are not exact. So an index may be left away:
// "introspectors.id" is that of the first item that has one. And a name that
// is not at the top of a json.RawMessage is looked for further below.
func (d *Document) At(path string) Position {
	at := d.root.find(path).place
	return Position{File: d.file, Line: at.line, Column: at.column}
}

// File is the file's name as it was given.
func (d *Document) File() string { return d.file }

// Errorf makes an error about the value of a path; see At.
func (d *Document) Errorf(path, format string, args ...any) *Error {
	return &Error{Position: d.At(path), Message: fmt.Sprintf(format, args...)}
}

func (n *node) find(path string) *node {
	path = strings.TrimPrefix(path, ".")
	if path == "" {
		return n
	}
	if next, rest := n.step(path); next != nil {
		return next.find(rest)
	}
	if n.raw && !strings.ContainsAny(path, ".[") {
		if found := n.below(path); found != nil {
			return found
		}
	}
	return n
}

// step goes down by the first part of a path. A key may itself hold dots: the
// longest that fits is meant.
func (n *node) step(path string) (next *node, rest string) {
	if n.kind == kindSequence {
		if in, ok := strings.CutPrefix(path, "["); ok {
			index, rest, _ := strings.Cut(in, "]")
			if i, err := strconv.Atoi(index); err == nil && i >= 0 && i < len(n.items) {
				return n.items[i], rest
			}
			return nil, ""
		}
		for _, item := range n.items {
			if next, rest := item.step(path); next != nil {
				return next, rest
			}
		}
		return nil, ""
	}
	longest := -1
	for _, e := range n.entries {
		after, ok := strings.CutPrefix(path, e.key)
		if ok && len(e.key) > longest && (after == "" || after[0] == '.' || after[0] == '[') {
			next, rest, longest = e.value, after, len(e.key)
		}
	}
	return next, rest
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
