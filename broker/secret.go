package broker

import (
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
)

const redacted = "[secret]"

// Secret is a credential's material: named fields, such as "access_token", or
// "username" and "password". It shows itself to nobody: printing, formatting,
// logging and marshalling give a placeholder. Reveal and Fields are the only
// ways to the bytes. The zero Secret is empty. A Secret is immutable and may
// be used from many goroutines.
//
// The fields are in a closure because package fmt calls no method on an
// unexported field of a struct and prints what it finds there: of a function,
// an address.
type Secret struct {
	fields func() map[string]string
}

func (s Secret) all() map[string]string {
	if s.fields == nil {
		return nil
	}
	return s.fields()
}

// NewSecret makes a Secret of a copy of fields.
func NewSecret(fields map[string]string) Secret {
	fields = maps.Clone(fields)
	return Secret{fields: func() map[string]string { return fields }}
}

// Names returns the names of the fields, sorted. Names are not secret.
func (s Secret) Names() []string { return slices.Sorted(maps.Keys(s.all())) }

// Reveal returns one field's bytes. Every call of it is a place to review.
func (s Secret) Reveal(name string) (string, bool) {
	v, ok := s.all()[name]
	return v, ok
}

// RevealAll returns a copy of all fields. Every call of it is a place to review.
func (s Secret) RevealAll() map[string]string { return maps.Clone(s.all()) }

// IsZero reports whether there is nothing in s.
func (s Secret) IsZero() bool { return len(s.all()) == 0 }

func (Secret) String() string               { return redacted }
func (Secret) GoString() string             { return redacted }
func (Secret) Format(f fmt.State, _ rune)   { io.WriteString(f, redacted) }
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
