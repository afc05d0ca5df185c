package awssts

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/mayfly-security/mayfly/broker"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts/awsscope"
	"github.com/mayfly-security/mayfly/providers/awssts/fakeaws"
)

// TestLagPasses: once our clock and AWS's agree again, leases do not die later
// for what was.
func TestLagPasses(t *testing.T) {
	w := newWorld(t)
	p := w.open()
	w.clock.behind = 5 * time.Minute
	if l := w.mint(p, time.Minute, ""); l.minted.DiesAt.Sub(l.req.End) < 5*time.Minute {
		t.Errorf("it dies %s after its end, and AWS's clock is 5m behind", l.minted.DiesAt.Sub(l.req.End))
	}
	w.clock.behind = 0
	if l := w.mint(p, time.Minute, ""); l.minted.DiesAt.Sub(l.req.End) > 3*time.Second {
		t.Errorf("it dies %s after its end, and the clocks agree", l.minted.DiesAt.Sub(l.req.End))
	}
}

// TestCompatibleClock: a compatible server ends sessions by its own clock, too.
func TestCompatibleClock(t *testing.T) {
	w := newWorld(t, func(w *world, _ *fakeaws.Config) { w.roles = []string{"none"} })
	w.clock.behind = 20 * time.Second
	raw := json.RawMessage(fmt.Sprintf(`{"region":"eu-central-1","endpoint_url":%q,"credentials":{"method":"key_file","key_file":%q},"early_revoke":{"mode":"off"}}`,
		w.server.URL, keyFile(t, "AKIABROKER", "broker-secret-key-of-the-tests")))
	opened, err := New(nil).Open(t.Context(), providers.Config{Name: "minio", Installation: installation, Raw: raw, Log: slog.New(slog.DiscardHandler), Now: w.clock.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	req := w.request(time.Minute, "")
	req.Tool = broker.Tool{Name: "crm.read", Scope: json.RawMessage(`{"statements":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::crm/*"}]}`), MaxTTL: time.Hour}
	minted, err := opened.Mint(t.Context(), req, nil)
	if err != nil {
		t.Fatal(err)
	}
	if late := minted.DiesAt.Sub(req.End); late < 20*time.Second {
		t.Errorf("it is said to be dead %s after its end, and the server's clock is 20s behind", late)
	}
	if got, _ := minted.Secret.Reveal(awsscope.FieldExpiration); got != awsscope.Instant(req.End) {
		t.Errorf("expiration %s", got)
	}
}
