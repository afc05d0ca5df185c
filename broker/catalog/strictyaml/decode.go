package strictyaml

import (
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-security/mayfly/broker"
)

var (
	durationType = reflect.TypeFor[time.Duration]()
	rawType      = reflect.TypeFor[json.RawMessage]()
)

func decodeRoot(errs *collector, root *node, into any) {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		panic(fmt.Sprintf("strictyaml: decoding into %T, which is no pointer to a struct", into))
	}
	d := decoder{errs: errs}
	d.mapping(root, v.Elem(), "")
}

type decoder struct{ errs *collector }

// value decodes n into v.
func (d decoder) value(n *node, v reflect.Value) {
	if n.kind == kindNull && v.Type() != rawType {
		return
	}
	switch v.Type() {
	case rawType:
		n.raw = true
		v.SetBytes(d.json(n))
		return
	case durationType:
		d.duration(n, v)
		return
	}
	if text, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if d.is(n, kindText) {
			if err := text.UnmarshalText([]byte(n.text)); err != nil {
				d.errs.add(n.place, "%s: %s", quote(n.text), broker.Clean(broker.Shorten(err.Error(), 200)))
			}
		}
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.value(n, v.Elem())
	case reflect.Struct:
		d.mapping(n, v, " in "+noun(v.Type()))
	case reflect.Slice:
		if !d.is(n, kindSequence) {
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(n.items), len(n.items)))
		for i, item := range n.items {
			if item.kind == kindNull {
				d.errs.add(item.place, "this item of the list is empty")
				continue
			}
			d.value(item, v.Index(i))
		}
	case reflect.Map:
		if !d.is(n, kindMapping) {
			return
		}
		v.Set(reflect.MakeMapWithSize(v.Type(), len(n.entries)))
		for _, e := range n.entries {
			if e.value.kind == kindNull {
				d.errs.add(e.value.place, "%s has no value", quote(e.key))
				continue
			}
			each := reflect.New(v.Type().Elem()).Elem()
			d.value(e.value, each)
			v.SetMapIndex(reflect.ValueOf(e.key).Convert(v.Type().Key()), each)
		}
	case reflect.String:
		if d.is(n, kindText) {
			v.SetString(n.text)
		}
	case reflect.Bool:
		if d.is(n, kindBool) {
			v.SetBool(n.text == "true")
		}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		if d.is(n, kindInteger) {
			i, err := strconv.ParseInt(n.text, 10, v.Type().Bits())
			if err != nil {
				d.errs.add(n.place, "%s is too large", n.text)
				return
			}
			v.SetInt(i)
		}
	default:
		panic(fmt.Sprintf("strictyaml: decoding into a field of type %s", v.Type()))
	}
}

// is reports an error unless n is of kind want.
func (d decoder) is(n *node, want kind) bool {
	if n.kind == want {
		return true
	}
	hint := ""
	if want == kindText && (n.kind == kindBool || n.kind == kindInteger || n.kind == kindNumber) {
		hint = "; put it in quotes"
	}
	d.errs.add(n.place, "%s stands where %s belongs%s", n.kind, want, hint)
	return false
}

// mapping decodes into a struct, whose tags say which keys there are. in says,
// for messages, what the struct is.
func (d decoder) mapping(n *node, v reflect.Value, in string) {
	if !d.is(n, kindMapping) {
		return
	}
	var names []string
	fields := make(map[string]reflect.Value)
	for f, value := range v.Fields() {
		if name, _, _ := strings.Cut(f.Tag.Get("yaml"), ","); name != "" && name != "-" {
			names = append(names, name)
			fields[name] = value
		}
	}
	for _, e := range n.entries {
		field, ok := fields[e.key]
		if !ok {
			d.errs.add(e.value.place, "unknown key %s%s%s", quote(e.key), in, broker.Suggest(e.key, "keys", names))
			continue
		}
		d.value(e.value, field)
	}
}

// noun is what people call a value of a struct type.
func noun(t reflect.Type) string {
	if t.Name() == "" {
		return "this mapping"
	}
	return strings.ToLower(t.Name())
}

func (d decoder) duration(n *node, v reflect.Value) {
	if n.kind != kindText {
		d.errs.add(n.place, `%s stands where a duration such as "90s" or "15m" belongs`, n.kind)
		return
	}
	duration, err := time.ParseDuration(n.text)
	if err != nil {
		d.errs.add(n.place, `%s is no duration such as "90s", "15m" or "1h30m"`, quote(n.text))
		return
	}
	v.SetInt(int64(duration))
}
