package policy

// DecideUnindexed decides by every policy of the set.
func DecideUnindexed(s *Set, q Query) Verdict {
	f, problem := newFacts(q)
	if problem != "" {
		return Verdict{Errors: []string{problem}, Digest: s.digest}
	}
	if f == nil {
		return Verdict{Digest: s.digest}
	}
	all := make([]int32, len(s.policies))
	for i := range all {
		all[i] = int32(i)
	}
	return s.decide(f, all)
}
