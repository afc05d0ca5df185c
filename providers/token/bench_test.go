package token

import "testing"

func BenchmarkMint(b *testing.B) {
	f := newFixture(b)
	req := f.request(introspectScope)
	for b.Loop() {
		if _, err := f.Mint(b.Context(), req, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkIntrospect(b *testing.B) {
	f := newFixture(b)
	_, _, token := f.mint(b, introspectScope)
	for b.Loop() {
		if _, ok := f.Introspect(b.Context(), token, server); !ok {
			b.Fatal("not accepted")
		}
	}
}
