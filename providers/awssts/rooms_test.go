package awssts

import (
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/providers"
)

// TestPlannedOnly: whoever has leases planned, and refused before they are
// made, takes no room from others.
func TestPlannedOnly(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	for range 1000 {
		if _, err := p.Plan(w.request(time.Hour, "")); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		w.mint(p, 10*time.Minute, "")
	}
}

// TestPlannedTogether: of leases that were planned at the same time no more are
// made than the list has room for.
func TestPlannedTogether(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	var all []providers.MintRequest
	for range 400 {
		req := w.request(10*time.Minute, "")
		if _, err := p.Plan(req); err != nil {
			t.Fatal(err)
		}
		all = append(all, req)
	}
	made := 0
	for _, req := range all {
		if _, err := p.Mint(t.Context(), req, nil); err == nil {
			made++
		}
	}
	if made < 280 || made > 310 {
		t.Errorf("%d were made", made)
	}
}

// TestRoomOfTwo: two providers of one broker that share a role share its room.
func TestRoomOfTwo(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	b, err := w.driver.Open(t.Context(), w.opening("other"))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	made := 0
	for i := range 700 {
		p := a
		if i%2 == 1 {
			p = b.(*provider)
		}
		if _, err := w.try(p, 10*time.Minute, ""); err == nil {
			made++
		}
	}
	if made < 280 || made > 310 {
		t.Errorf("%d leases are open, and the role's list has room for about 300", made)
	}
}
