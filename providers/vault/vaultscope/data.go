package vaultscope

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

const (
	maxData      = 16 << 10 // bytes of JSON
	maxDataDepth = 8
)

// reference begins the place of a parameter's value in data.
const reference = "${params."

// data reads and checks what is written to the path.
func (s *Scope) data(raw json.RawMessage, params []broker.Param) error {
	if len(raw) == 0 || string(raw) == "null" {
		return nil
	}
	if !s.Write {
		return providers.FieldErrorf("data", "is for paths that are written to, and this one is read")
	}
	if len(raw) > maxData {
		return providers.FieldErrorf("data", "has %d bytes; at most %d are taken", len(raw), maxData)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber() // a large number stays as it is written
	if err := dec.Decode(&s.Data); err != nil {
		return providers.FieldErrorf("data", "must be a mapping of names to values")
	}
	if s.SetsTTL() {
		for _, key := range []string{"ttl", "not_after"} {
			if _, set := s.Data[key]; set {
				return providers.FieldErrorf("data."+key, "is set by the broker, to what is left of the lease")
			}
		}
	}
	known := map[string]broker.Param{}
	s.optional = map[string]bool{}
	for _, p := range params {
		known[p.Name] = p
		s.optional[p.Name] = p.Optional
	}
	for _, key := range slices.Sorted(maps.Keys(s.Data)) {
		if key == "" || broker.Clean(key) != key || strings.ContainsAny(key, "\"\\ *") || len(key) > maxField {
			return providers.FieldErrorf("data", "%q is no name of a parameter in Vault", broker.Clean(broker.Shorten(key, 80)))
		}
		if err := checkValue("data."+key, s.Data[key], known, 1); err != nil {
			return err
		}
	}
	return nil
}

// checkValue checks the references in a value. An optional parameter stands
// alone as the value of one of Vault's parameters, which is left out without it.
func checkValue(field string, value any, known map[string]broker.Param, depth int) error {
	if depth > maxDataDepth {
		return providers.FieldErrorf(field, "is nested more than %d deep", maxDataDepth)
	}
	switch v := value.(type) {
	case string:
		return expandText(v, func(name string) (string, error) {
			p, ok := known[name]
			switch {
			case !ok:
				return "", providers.FieldErrorf(field, "the tool has no parameter %q", broker.Clean(broker.Shorten(name, 80)))
			case p.Optional && (depth > 1 || v != reference+name+"}"):
				return "", providers.FieldErrorf(field, "parameter %q is optional, so it must be the whole value: ${params.%s}", name, name)
			}
			return "", nil
		}, func(string) {}, field)
	case []any:
		for i, e := range v {
			if err := checkValue(fmt.Sprintf("%s[%d]", field, i), e, known, depth+1); err != nil {
				return err
			}
		}
	case map[string]any:
		for k, e := range v {
			if err := checkValue(field+"."+k, e, known, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// expandText calls text for what stands literally and for the values of
// parameters, in order.
func expandText(s string, lookup func(name string) (string, error), text func(string), field string) error {
	for {
		before, after, found := strings.Cut(s, "${")
		text(before)
		if !found {
			return nil
		}
		name, rest, closed := strings.Cut(after, "}")
		name, isParam := strings.CutPrefix(name, "params.")
		if !closed || !isParam {
			return providers.FieldErrorf(field, "has ${ that begins no ${params.NAME}")
		}
		value, err := lookup(name)
		if err != nil {
			return err
		}
		text(value)
		s = rest
	}
}

// Body is what is written to the path, or what is asked with where it is read:
// the scope's data with the values of the parameters, which the engine has
// checked against the tool, and how long the credential may live where the
// request says it. It is nil if there is nothing to send.
func (s Scope) Body(params map[string]string, ttl time.Duration) (map[string]any, error) {
	body := map[string]any{}
	for key, value := range s.Data {
		if text, ok := value.(string); ok {
			name := strings.TrimSuffix(strings.TrimPrefix(text, reference), "}")
			if _, given := params[name]; !given && s.optional[name] && text == reference+name+"}" {
				continue
			}
		}
		filled, err := fill(value, params)
		if err != nil {
			return nil, fmt.Errorf("filling %s of the data: %w", key, err)
		}
		body[key] = filled
	}
	if s.SetsTTL() {
		body["ttl"] = fmt.Sprintf("%ds", int64(ttl/time.Second))
	}
	if len(body) == 0 {
		return nil, nil
	}
	return body, nil
}

// fill returns a copy of value with its references replaced.
func fill(value any, params map[string]string) (any, error) {
	switch v := value.(type) {
	case string:
		var b strings.Builder
		err := expandText(v, func(name string) (string, error) {
			value, ok := params[name]
			if !ok {
				return "", fmt.Errorf("parameter %q has no value", name)
			}
			return value, nil
		}, func(s string) { b.WriteString(s) }, "data")
		return b.String(), err
	case []any:
		all := make([]any, len(v))
		for i, e := range v {
			var err error
			if all[i], err = fill(e, params); err != nil {
				return nil, err
			}
		}
		return all, nil
	case map[string]any:
		all := make(map[string]any, len(v))
		for k, e := range v {
			var err error
			if all[k], err = fill(e, params); err != nil {
				return nil, err
			}
		}
		return all, nil
	}
	return value, nil
}
