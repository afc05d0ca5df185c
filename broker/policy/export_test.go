package policy

// DecideUnindexed decides by every policy of the set, with all of the context.
func DecideUnindexed(s *Set, q Query) Verdict {
	f, problem := newFacts(q)
	if problem != "" {
		return Verdict{Errors: []string{problem}, Digest: s.digest}
	}
	if f == nil {
		return Verdict{Digest: s.digest}
	}
	f.context(q, map[string]bool{everything: true})
	all := make([]int32, len(s.policies))
	for i := range all {
		all[i] = int32(i)
	}
	return s.decide(f, all)
}

// Candidates counts the policies that a decision evaluates.
func Candidates(s *Set, q Query) int {
	f, _ := newFacts(q)
	return len(s.candidates(q.Action, f))
}
