package awssts

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
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

// TestRoomOfOthers: what a role has of its own is known before its first lease
// is made, and not a minute later.
func TestRoomOfOthers(t *testing.T) {
	w := newWorld(t)
	w.fake.SetPolicy("crm0", "permissions", strings.Repeat(" x", 9000))
	p := w.open()
	made := 0
	for range 100 {
		if _, err := w.try(p, 10*time.Minute, ""); err == nil {
			made++
		}
	}
	if made > 15 {
		t.Errorf("%d leases were made, and the list has room for about ten", made)
	}
	if n := w.fake.Count("ListRolePolicies"); n != 1 {
		t.Errorf("IAM was asked %d times", n)
	}
}

// TestRoomUnknown: where IAM does not tell, leases are made as if the role had
// nothing of its own, and it is not asked for each of them.
func TestRoomUnknown(t *testing.T) {
	var asked atomic.Int32
	w := newWorld(t, faking(func(c *fakeaws.Config) {
		c.Fail = func(action string, _ int) (string, int) {
			if action == "ListRolePolicies" {
				asked.Add(1)
				return "ServiceFailure", 500
			}
			return "", 0
		}
	}))
	p := w.open()
	for range 20 {
		w.mint(p, 10*time.Minute, "")
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("IAM was asked %d times", n)
	}
}
