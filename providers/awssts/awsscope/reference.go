package awsscope

import (
	"slices"
	"strings"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
)

// checkReferences checks what stands in ${}: parameters of the tool, where they
// may stand, and IAM's own variables. IAM takes whatever else stands there for
// a variable that no request has, and a statement with one matches nothing: one
// that denies would deny nothing.
func checkReferences(at, text string, params []broker.Param, may bool) error {
	for rest := text; ; {
		_, after, found := strings.Cut(rest, "$")
		if !found {
			return nil
		}
		if !strings.HasPrefix(after, "{") {
			return providers.FieldErrorf(at, "has $ that begins no ${}; IAM has ${$} for it")
		}
		name, tail, closed := strings.Cut(after[1:], "}")
		if !closed {
			return providers.FieldErrorf(at, "has ${ without }")
		}
		rest = tail
		param, is := strings.CutPrefix(name, "params.")
		if !is {
			if !variableForm.MatchString(name) {
				return providers.FieldErrorf(at, "has ${%s}, which is no variable of IAM, such as ${aws:PrincipalTag/team}, and no parameter, such as ${params.customer}", broker.Clean(broker.Shorten(name, 60)))
			}
			continue
		}
		if !may {
			return providers.FieldErrorf(at, "holds a parameter: parameters stand in resources and in values of conditions alone")
		}
		i := slices.IndexFunc(params, func(p broker.Param) bool { return p.Name == param })
		switch {
		case i < 0:
			return providers.FieldErrorf(at, "the tool has no parameter %q", broker.Clean(broker.Shorten(param, 60)))
		case params[i].Optional:
			return providers.FieldErrorf(at, "parameter %s is optional, and without it the permissions would be others; make it required", param)
		case params[i].Type == broker.ParamString && params[i].Check("") == nil:
			return providers.FieldErrorf(at, "parameter %s may be empty, and without a value the permissions would be wider; have its pattern ask for one character at least", param)
		}
	}
}

// fill puts the values of parameters into a text.
func fill(text string, value func(name string) string) string {
	return paramForm.ReplaceAllStringFunc(text, func(ref string) string {
		return value(ref[len(reference) : len(ref)-1])
	})
}

// filled is the statement with the values of parameters.
func (s Statement) filled(value func(name string) string) Statement {
	all := func(texts []string) (out []string) {
		for _, t := range texts {
			out = append(out, fill(t, value))
		}
		return out
	}
	out := s
	out.Resource, out.NotResource = all(s.Resource), all(s.NotResource)
	if s.Condition != nil {
		out.Condition = map[string]map[string][]string{}
		for operator, keys := range s.Condition {
			out.Condition[operator] = map[string][]string{}
			for key, values := range keys {
				out.Condition[operator][key] = all(values)
			}
		}
	}
	return out
}
