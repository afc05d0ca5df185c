package main

import (
	"bytes"
	"regexp"
	"slices"
	"strings"
)

// awsMark is in every profile that is ours. SDKs take it for a comment.
const awsMark = "# written by mayfly aws configure"

// profileName is what may name a profile without quotes, in all SDKs.
var profileName = regexp.MustCompile(`^[A-Za-z0-9._@+:/-]{1,100}$`)

// awsProfile is one profile of a configuration file.
type awsProfile struct {
	name    string
	process string // the line of credential_process
	region  string // empty: as it is
}

// profileState is what is at a profile's place.
type profileState int

const (
	profileAbsent  profileState = iota
	profileOurs                 // it has our mark
	profileForeign              // somebody else's
	profileRival                // ours, and somebody has added what SDKs take before us
	profileTwice                // it is there more than once; SDKs mix them
)

// rivals are settings that SDKs take before a credential_process of the same
// profile, or may.
var rivals = []string{"aws_access_key_id", "role_arn", "source_profile", "credential_source", "web_identity_token_file", "sso_session", "sso_start_url", "login_session"}

// sectionHead reads a section's line: "[profile x]", or "[default]".
var sectionHead = regexp.MustCompile(`^\[\s*(?:(profile)\s+)?(?:"([^"]*)"|'([^']*)'|([^\]"']*?))\s*\](?:\s*[#;].*)?\s*$`)

// sectionName is the profile that a line begins. plain says that the file is the
// one for credentials, where names have no "profile" before them.
func sectionName(line string, plain bool) (name string, begins bool) {
	if !strings.HasPrefix(line, "[") {
		return "", false
	}
	m := sectionHead.FindStringSubmatch(strings.TrimRight(line, "\r\n"))
	if m == nil {
		return "", true // a section, and none that we know
	}
	name = m[2] + m[3] + m[4]
	if m[1] == "" && name != "default" && !plain {
		return "", true // "[sso-session x]", "[services x]", or what SDKs pass over
	}
	return name, true
}

// find tells where the profile's section is: from its head to the line that
// begins the next one. Empty lines and comments before that belong to the next.
func (w awsProfile) find(lines []string, plain bool) (from, to int, state profileState) {
	for i := 0; i < len(lines); i++ {
		name, begins := sectionName(lines[i], plain)
		if !begins || name != w.name {
			continue
		}
		if state != profileAbsent {
			return 0, 0, profileTwice
		}
		from, to, state = i, i+1, profileForeign
		for to < len(lines) {
			if _, next := sectionName(lines[to], plain); next {
				break
			}
			to++
		}
		last := to
		for to > from+1 && isRemark(lines[to-1]) && (last < len(lines) || strings.TrimSpace(lines[to-1]) == "") {
			to--
		}
		for _, line := range lines[from:last] {
			if strings.TrimSpace(line) == awsMark {
				state = profileOurs
				to = max(to, from+2) // the mark is the section's, also where it is all that there is
			}
		}
		if state == profileOurs && slices.ContainsFunc(lines[from:to], func(line string) bool { return slices.Contains(rivals, setting(line)) }) {
			state = profileRival
		}
	}
	return from, to, state
}

// setting is the name of what a line sets; empty if it sets nothing. What is
// indented belongs to the setting before it.
func setting(line string) string {
	key, _, ok := strings.Cut(line, "=")
	if !ok || line[0] == ' ' || line[0] == '\t' || isRemark(line) {
		return ""
	}
	return strings.ToLower(strings.TrimSpace(key))
}

// isRemark reports whether a line is empty or a comment.
func isRemark(line string) bool {
	text := strings.TrimSpace(line)
	return text == "" || strings.HasPrefix(text, "#") || strings.HasPrefix(text, ";")
}

// put gives the file with the profile in it, everything else byte for byte as it
// was, and what was at its place. A profile that is somebody else's, or has what
// goes before ours, is replaced only with force, and one that is there twice never.
func (w awsProfile) put(file []byte, force bool) ([]byte, profileState) {
	lines := linesOf(file)
	eol := lineEnd(strings.Join(lines[:min(1, len(lines))], ""))
	from, to, state := w.find(lines, false)
	if state != profileAbsent {
		eol = lineEnd(lines[from])
	}
	var out bytes.Buffer
	switch {
	case state == profileAbsent:
		out.Write(file)
		if len(file) > 0 {
			if !bytes.HasSuffix(file, []byte("\n")) {
				out.WriteString(eol)
			}
			out.WriteString(eol)
		}
		out.WriteString(w.section(eol))
	case state == profileOurs:
		out.WriteString(strings.Join(lines[:from], ""))
		out.WriteString(w.renewed(lines[from:to], eol))
		out.WriteString(strings.Join(lines[to:], ""))
	case (state == profileForeign || state == profileRival) && force:
		out.WriteString(strings.Join(lines[:from], ""))
		out.WriteString(w.section(eol))
		out.WriteString(strings.Join(lines[to:], ""))
	default:
		return file, state
	}
	return out.Bytes(), state
}

// cut gives the file without the profile, everything else byte for byte as it was.
// Only one that is ours is taken out, with all that is in it.
func (w awsProfile) cut(file []byte) ([]byte, profileState) {
	lines := linesOf(file)
	from, to, state := w.find(lines, false)
	if state != profileOurs && state != profileRival {
		return file, state
	}
	// The empty line before it was put there with it.
	if from > 0 && strings.TrimSpace(lines[from-1]) == "" && (to == len(lines) || strings.TrimSpace(lines[to]) == "") {
		from--
	}
	return []byte(strings.Join(lines[:from], "") + strings.Join(lines[to:], "")), state
}

func linesOf(file []byte) []string {
	lines := strings.SplitAfter(string(file), "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}

// lineEnd is the line end that a line has, or else the usual one.
func lineEnd(line string) string {
	if strings.HasSuffix(line, "\r\n") {
		return "\r\n"
	}
	return "\n"
}

func (w awsProfile) section(eol string) string {
	head := "[profile " + w.name + "]"
	if w.name == "default" {
		head = "[default]"
	}
	all := []string{head, awsMark, "credential_process = " + w.process}
	if w.region != "" {
		all = append(all, "region = "+w.region)
	}
	return strings.Join(all, eol) + eol
}

// renewed is our own section with its settings as they are to be. What somebody
// has added to it stays.
func (w awsProfile) renewed(section []string, eol string) string {
	want := map[string]string{"credential_process": w.process}
	if w.region != "" {
		want["region"] = w.region
	}
	var out strings.Builder
	for _, line := range section {
		key := setting(line)
		if value, ours := want[key]; ours {
			if value != "" {
				out.WriteString(key + " = " + value + eol)
			}
			want[key] = "" // a second one goes
			continue
		}
		out.WriteString(line)
		if !strings.HasSuffix(line, "\n") {
			out.WriteString(eol)
		}
	}
	for _, key := range []string{"credential_process", "region"} {
		if value := want[key]; value != "" {
			out.WriteString(key + " = " + value + eol)
		}
	}
	return out.String()
}
