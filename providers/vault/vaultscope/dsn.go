package vaultscope

import (
	"fmt"
	"net/url"
	"path"
	"strings"

	"github.com/mayfly-security/mayfly/providers"
)

// dsnKeywords are the connection keywords that a login may use. Those that are
// left out would bring in a secret (password, sslpassword), a file of them
// (passfile), or settings from elsewhere (service, servicefile), or change how
// the functions of the setup run (options).
var dsnKeywords = map[string]bool{
	"host": true, "port": true, "dbname": true, "database": true, "user": true, "connect_timeout": true, "sslmode": true,
	"sslrootcert": true, "sslcert": true, "sslkey": true, "sslsni": true, "sslnegotiation": true,
	"channel_binding": true, "application_name": true, "target_session_attrs": true,
}

// checkDSN checks where and as whom the broker connects to PostgreSQL: by name
// and over verified TLS, or on the machine itself.
func checkDSN(field, dsn string) error {
	if dsn == "" {
		return providers.FieldErrorf(field, "is missing: say where PostgreSQL is and as whom to log in, such as \"host=db.acme.test dbname=crm user=mayfly_sweep sslmode=verify-full\"")
	}
	if len(dsn) > maxText {
		return providers.FieldErrorf(field, "has %d bytes; at most %d are taken", len(dsn), maxText)
	}
	settings, err := parseDSN(dsn)
	if err != nil {
		// The text is not repeated: it may hold a password.
		return providers.FieldErrorf(field, "%v", err)
	}
	for k := range settings {
		switch {
		case strings.Contains(k, "password"):
			return providers.FieldErrorf(field, "holds a password; put it into a file of mode 0600 and name that as password_file")
		case !dsnKeywords[k]:
			return providers.FieldErrorf(field, "has a keyword %q that is not taken here", k)
		}
	}
	for _, k := range []string{"user", "host"} {
		if settings[k] == "" {
			return providers.FieldErrorf(field, "has no %s", k)
		}
	}
	if settings["dbname"] == "" && settings["database"] == "" {
		return providers.FieldErrorf(field, "has no dbname")
	}
	for host := range strings.SplitSeq(settings["host"], ",") {
		if !path.IsAbs(host) && !loopback(host) && settings["sslmode"] != "verify-full" {
			return providers.FieldErrorf(field, "needs sslmode=verify-full: %s is another machine", host)
		}
	}
	return nil
}

// parseDSN reads both forms of libpq's connection strings (PostgreSQL
// documentation, section 34.1.1). Errors never hold the text itself.
func parseDSN(dsn string) (map[string]string, error) {
	settings := map[string]string{}
	if strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://") {
		u, err := url.Parse(dsn)
		if err != nil || u.Opaque != "" {
			return nil, fmt.Errorf("is no URL")
		}
		query, err := url.ParseQuery(u.RawQuery)
		if err != nil {
			return nil, fmt.Errorf("has a query that cannot be read")
		}
		settings["host"], settings["user"], settings["dbname"] = u.Hostname(), u.User.Username(), strings.TrimPrefix(u.Path, "/")
		if _, has := u.User.Password(); has {
			settings["password"] = "given"
		}
		for k, v := range query {
			if len(v) != 1 {
				return nil, fmt.Errorf("has keyword %q twice", k)
			}
			settings[k] = v[0]
		}
		return settings, nil
	}
	rest := strings.TrimSpace(dsn)
	for rest != "" {
		key, after, found := strings.Cut(rest, "=")
		key = strings.TrimSpace(key)
		if !found || key == "" || strings.ContainsAny(key, " \t\n\r'\\") {
			return nil, fmt.Errorf("is neither a postgres:// URL nor a list of keyword=value")
		}
		if _, twice := settings[key]; twice {
			return nil, fmt.Errorf("has keyword %q twice", key)
		}
		value, remaining, err := dsnValue(strings.TrimLeft(after, " \t\n\r"))
		if err != nil {
			return nil, fmt.Errorf("has a value for %q that cannot be read: %w", key, err)
		}
		settings[key], rest = value, strings.TrimSpace(remaining)
	}
	return settings, nil
}

// dsnValue takes one value, quoted or plain, from the front of s.
func dsnValue(s string) (value, rest string, err error) {
	var b strings.Builder
	quoted := strings.HasPrefix(s, "'")
	if quoted {
		s = s[1:]
	}
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\':
			if i++; i == len(s) {
				return "", "", fmt.Errorf("it ends with a backslash")
			}
			b.WriteByte(s[i])
		case quoted && c == '\'':
			return b.String(), s[i+1:], nil
		case !quoted && (c == ' ' || c == '\t' || c == '\n' || c == '\r'):
			return b.String(), s[i:], nil
		default:
			b.WriteByte(c)
		}
	}
	if quoted {
		return "", "", fmt.Errorf("its quote is not closed")
	}
	return b.String(), "", nil
}
