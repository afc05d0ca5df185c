package awsscope

import (
	"math/rand/v2"
	"time"
)

// Largest is a session policy of the tool's at the longest values that its
// parameters admit, and over at end. With an end that is past, a session with it
// can do nothing, and is as large for AWS as one can be: the values are drawn from
// many characters, so that they pack no better than real ones.
func (s Scope) Largest(end time.Time) (string, error) {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	draw := rand.New(rand.NewPCG(1, 2))
	policy, err := s.render(func(name string) string {
		for _, p := range s.params {
			if p.Name == name {
				b := make([]byte, longest(p))
				for i := range b {
					b[i] = letters[draw.IntN(len(letters))]
				}
				return string(b)
			}
		}
		return ""
	}, end)
	return string(policy), err
}
