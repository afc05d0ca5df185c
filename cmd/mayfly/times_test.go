package main

import (
	"testing"
	"time"
)

func TestParseDuration(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"90s": 90 * time.Second, "5m": 5 * time.Minute, "1h": time.Hour, "1d": day, "1d12h": 36 * time.Hour, "1h30m": 90 * time.Minute, "500ms": 500 * time.Millisecond,
		"": 0, "0s": 0, "-5m": 0, "5": 0, "d": 0, "1d-1h": 0, "1d1d": 0, "x": 0, "0d": 0, "99999d": 0, "5 m": 0, "1w": 0,
	} {
		got, err := parseDuration(s)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("%q is %v, %v; %v was expected", s, got, err, want)
		}
	}
}

func TestRelative(t *testing.T) {
	now := time.Date(2026, 5, 1, 8, 0, 0, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		0: "now", 999 * time.Millisecond: "now", 59 * time.Second: "in 59s", 4*time.Minute + 59*time.Second: "in 4m", time.Hour - time.Millisecond: "in 1h",
		-2 * time.Minute: "2m ago", -(time.Hour + 5*time.Minute): "1h5m ago", 3 * time.Hour: "in 3h", 50 * time.Hour: "in 2d2h", -24 * time.Hour: "1d ago",
	} {
		if got := relative(now.Add(d), now); got != want {
			t.Errorf("%v is %q; %q was expected", d, got, want)
		}
	}
	if got := relative(time.Time{}, now); got != "" {
		t.Errorf("no time is %q", got)
	}
}

func TestParseInstant(t *testing.T) {
	now := time.Date(2026, 5, 1, 8, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Time{
		"2026-06-01T00:00:00Z": time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC), "2h": now.Add(2 * time.Hour), "tomorrow": {}, "": {},
	} {
		got, err := parseInstant(s, now)
		if !got.Equal(want) || (err == nil) == want.IsZero() {
			t.Errorf("%q is %v, %v; %v was expected", s, got, err, want)
		}
	}
}
