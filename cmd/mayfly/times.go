package main

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"time"
)

const day = 24 * time.Hour

var days = regexp.MustCompile(`^([0-9]{1,4})d(.*)$`)

// parseDuration reads spans such as 90s, 5m, 1h30m, 1d or 1d12h. They are
// greater than zero.
func parseDuration(s string) (time.Duration, error) {
	wrong := errors.New("it is a number with a unit, such as 90s, 5m, 1h30m or 1d")
	var total time.Duration
	rest := s
	if m := days.FindStringSubmatch(s); m != nil {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			return 0, wrong
		}
		total, rest = time.Duration(n)*day, m[2]
	}
	if rest != "" || total == 0 && s == "" {
		d, err := time.ParseDuration(rest)
		if err != nil || d < 0 {
			return 0, wrong
		}
		total += d
	}
	if total <= 0 {
		return 0, errors.New("it must be more than zero")
	}
	return total, nil
}

// parseInstant reads an RFC 3339 time, or a span from now.
func parseInstant(s string, now time.Time) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	if d, err := parseDuration(s); err == nil {
		return now.Add(d), nil
	}
	return time.Time{}, errors.New("it is a time such as 2026-05-01T08:00:00Z, or a span from now such as 2h")
}

// span is a span of time as people say it: its two largest units, rounded
// to the second and then down.
func span(d time.Duration) string {
	d = d.Abs().Round(time.Second)
	two := func(big time.Duration, a string, small time.Duration, b string) string {
		if rest := d % big / small; rest > 0 {
			return fmt.Sprintf("%d%s%d%s", d/big, a, rest, b)
		}
		return fmt.Sprintf("%d%s", d/big, a)
	}
	switch {
	case d >= day:
		return two(day, "d", time.Hour, "h")
	case d >= time.Hour:
		return two(time.Hour, "h", time.Minute, "m")
	case d >= time.Minute:
		return fmt.Sprintf("%dm", d/time.Minute)
	}
	return fmt.Sprintf("%ds", d/time.Second)
}

// relative is an instant as people say it: "in 4m", "2m ago". The zero
// instant is empty.
func relative(t, now time.Time) string {
	switch d := t.Sub(now); {
	case t.IsZero():
		return ""
	case d >= time.Second:
		return "in " + span(d)
	case d <= -time.Second:
		return span(d) + " ago"
	}
	return "now"
}

// when is an instant in both forms: "in 4m (2026-05-01T08:00:00Z)".
func when(t, now time.Time) string {
	if t.IsZero() {
		return ""
	}
	return relative(t, now) + " (" + t.UTC().Format(time.RFC3339) + ")"
}
