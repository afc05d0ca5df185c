package providers

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// EncodeHandle writes a provider's handle as JSON. Its field "v" is the version.
func EncodeHandle(handle any) (Handle, error) {
	b, err := json.Marshal(handle)
	if err != nil {
		return nil, fmt.Errorf("encoding handle: %w", err)
	}
	return b, nil
}

// DecodeHandle reads a handle that EncodeHandle wrote into the struct that into
// points to. version is that struct's, and newest the newest that the provider
// reads. of says what the handle is for, for people: "a token". Whether its
// fields can be is for the provider to say: see NoHandle.
func DecodeHandle(raw Handle, into any, version *int, newest int, of string) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(into); err != nil || dec.More() {
		return NoHandle(of)
	}
	if *version > newest {
		return fmt.Errorf("the handle has version %d and this broker reads up to %d: it was written by a newer Mayfly", *version, newest)
	}
	if *version < 1 {
		return NoHandle(of)
	}
	return nil
}

// NoHandle is the error of what is no handle of the provider's.
func NoHandle(of string) error { return fmt.Errorf("the handle is no handle of %s", of) }
