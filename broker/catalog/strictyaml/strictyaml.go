// Package strictyaml reads YAML that people write and that decides who gets
// what. It takes the plain part of YAML 1.2 and refuses, with file, line and
// column, everything that a reader of the file could take for something else:
// unknown and repeated keys, values of another type, more than one document,
// anchors, aliases, tags and merge keys, numbers in odd forms, control and
// invisible characters. It finds all errors, not the first alone.
//
// What is wrong with a value's meaning is found later, by the caller;
// Document.Errorf reports it in the same form.
package strictyaml

import (
	"fmt"
	"io"
	"os"
)

// Limits on a file. They are far above what people write and far below what
// would cost the reader time, memory or stack.
const (
	MaxSize  = 1 << 20 // bytes: some 5,000 agents; a catalog may have many files
	MaxDepth = 32      // collections within one another
	MaxKeys  = 1000    // keys of one mapping; the parser's time grows with their square
)

// Document is a file that was read: it knows where everything stands. It is
// immutable.
type Document struct {
	file string
	root *node
}

// ReadFile reads and decodes one regular file; see Decode. An error that has
// no place in the file (it does not exist) is no Errors.
func ReadFile(path string, into any) (*Document, error) {
	data, err := ReadRegular(path)
	if err != nil {
		return nil, err
	}
	return Decode(path, data, into)
}

// ReadRegular reads one regular file, of which it takes one byte more than
// MaxSize at most: whoever reads the content refuses what is too large.
func ReadRegular(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading configuration: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading configuration: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("reading configuration: %s is no regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("reading configuration %s: %w", path, err)
	}
	return data, nil
}

// Decode decodes data into the struct that into points to; file is its name in
// errors. Every error about the content is an Errors. With one, into may be
// partly filled and is not to be used.
//
// A struct's fields are named by their yaml tags; fields without one are not
// read. Fields may be structs, slices, maps with string keys, pointers
// (absent: nil), strings, booleans, integers, time.Duration ("15m"),
// json.RawMessage (any value, as canonical JSON) and whatever implements
// encoding.TextUnmarshaler. A key without a value is one that is absent.
//
// Decode panics if into is not such a struct: that is a mistake in the
// program, which every file would show.
func Decode(file string, data []byte, into any) (*Document, error) {
	errs := &collector{file: file}
	root := parse(errs, data)
	if root == nil {
		return nil, errs.err()
	}
	decodeRoot(errs, root, into)
	if err := errs.err(); err != nil {
		return nil, err
	}
	return &Document{file: file, root: root}, nil
}
