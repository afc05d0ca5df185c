package strictyaml

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
)

// json gives n as canonical JSON: keys sorted, no space, numbers in their
// plainest form. Equal values have equal bytes.
func (d decoder) json(n *node) json.RawMessage {
	var b bytes.Buffer
	d.writeJSON(&b, n)
	return b.Bytes()
}

func (d decoder) writeJSON(b *bytes.Buffer, n *node) {
	switch n.kind {
	case kindNull:
		b.WriteString("null")
	case kindText:
		writeString(b, n.text)
	case kindBool, kindInteger, kindNumber:
		b.WriteString(n.text)
	case kindSequence:
		b.WriteByte('[')
		for i, item := range n.items {
			if i > 0 {
				b.WriteByte(',')
			}
			d.writeJSON(b, item)
		}
		b.WriteByte(']')
	case kindMapping:
		d.refuseFolded(n)
		b.WriteByte('{')
		entries := slices.SortedFunc(slices.Values(n.entries), func(x, y entry) int { return strings.Compare(x.key, y.key) })
		for i, e := range entries {
			if i > 0 {
				b.WriteByte(',')
			}
			writeString(b, e.key)
			b.WriteByte(':')
			d.writeJSON(b, e.value)
		}
		b.WriteByte('}')
	}
}

// refuseFolded refuses keys that differ in case alone: readers of JSON that
// fold case, Go's among them, take the last of them.
func (d decoder) refuseFolded(n *node) {
	seen := make(map[string]entry, len(n.entries))
	for _, e := range n.entries {
		folded := strings.ToLower(e.key)
		if first, again := seen[folded]; again {
			d.errs.add(e.value.place, "key %s differs from %s on line %d in case alone", quote(e.key), quote(first.key), first.value.line)
		}
		seen[folded] = e
	}
}

func writeString(b *bytes.Buffer, s string) {
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(s)       // no string fails, and bytes.Buffer takes all
	b.Truncate(b.Len() - 1) // Encode ends the line
}
