package providers

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
)

// FieldError says which field of a provider's configuration or of a tool's
// scope is wrong, so that the catalog can point to its line.
type FieldError struct {
	Field   string // dotted path from the top of the configuration or scope; empty for the whole
	Message string // what is wrong and what would be right
}

func (e *FieldError) Error() string {
	if e.Field == "" {
		return e.Message
	}
	return e.Field + ": " + e.Message
}

// FieldErrorf makes a FieldError.
func FieldErrorf(field, format string, args ...any) *FieldError {
	return &FieldError{Field: field, Message: fmt.Sprintf(format, args...)}
}

// Decode reads a configuration or scope into the struct that into points to.
// It is strict: an unknown field is a *FieldError that names the valid fields.
// A missing document is an empty one.
func Decode(raw json.RawMessage, into any) error {
	if len(raw) == 0 || string(raw) == "null" {
		raw = json.RawMessage("{}")
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	err := dec.Decode(into)
	if err == nil {
		if _, err = dec.Token(); err != io.EOF {
			return FieldErrorf("", "there is more than one document")
		}
		return nil
	}
	var typeErr *json.UnmarshalTypeError
	if errors.As(err, &typeErr) {
		return FieldErrorf(typeErr.Field, "a %s stands where a %s belongs", typeErr.Value, typeErr.Type)
	}
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return FieldErrorf(strings.Trim(name, `"`), "there is no such field; there are %s", strings.Join(fieldNames(into), ", "))
	}
	return FieldErrorf("", "%v", err)
}

func fieldNames(into any) []string {
	t := reflect.TypeOf(into)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	var names []string
	if t.Kind() != reflect.Struct {
		return names
	}
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name != "" && name != "-" {
			names = append(names, name)
		}
	}
	return names
}
