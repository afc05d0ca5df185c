// Package fakesecrets is a fake of AWS Secrets Manager, for tests: AWS itself
// cannot run here. It has the calls that reading and rotating secrets needs, with
// the errors that AWS's documentation tells of, and versions with staging labels.
// It takes every signature for good. A rotation is over when the test says so.
package fakesecrets

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// What secrets there are in: their ARNs have these.
const (
	Region  = "eu-central-1"
	Account = "123456789012"
)

// The staging labels.
const (
	current  = "AWSCURRENT"
	pending  = "AWSPENDING"
	previous = "AWSPREVIOUS"
)

// The codes of its own errors.
const (
	codeNotFound = "ResourceNotFoundException"
	codeInvalid  = "InvalidRequestException"
)

// Fake is a fake AWS Secrets Manager, and the STS that one logs in to it with. It
// is an http.Handler.
type Fake struct {
	mu      sync.Mutex
	secrets map[string]*Secret // by ARN
	calls   map[string]int

	Fail   string                      // the code that every call is answered with; empty: none; see Set
	Twist  func(answer map[string]any) // changes what GetSecretValue answers; nil: nothing
	Logins []string                    // role and token of each login with a JWT
}

// Secret is one secret. Its fields are changed within Fake.Set.
type Secret struct {
	Name, ARN string
	Rotates   bool              // it has a rotation
	Deleted   bool              // it is to be deleted
	Versions  map[string]string // ID -> text
	Stages    map[string]string // label -> the version's ID
	Binary    bool
}

// New makes a Fake without secrets.
func New() *Fake {
	return &Fake{secrets: map[string]*Secret{}, calls: map[string]int{}}
}

// Add adds a secret with one version, and a rotation.
func (f *Fake) Add(name, text string) *Secret {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := strings.Repeat("0", 31) + "1"
	s := &Secret{Name: name, ARN: "arn:aws:secretsmanager:" + Region + ":" + Account + ":secret:" + name + "-AbCdEf",
		Rotates: true, Versions: map[string]string{id: text}, Stages: map[string]string{current: id}}
	f.secrets[s.ARN] = s
	return s
}

// Finish has the rotation function do its work: the pending version becomes the
// current one. Without a pending one it does nothing.
func (f *Fake) Finish(s *Secret, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := s.Stages[pending]
	if id == "" {
		return
	}
	s.Versions[id] = text
	s.Stages[previous] = s.Stages[current]
	s.Stages[current] = id
	delete(s.Stages, pending)
}

// Set changes what the test wants, with nobody in between.
func (f *Fake) Set(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

// Count tells how often a call was made.
func (f *Fake) Count(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[call]
}

// find takes a name, an ARN, or an ARN without its suffix, as AWS does.
func (f *Fake) find(id string) *Secret {
	if s := f.secrets[id]; s != nil {
		return s
	}
	for _, s := range f.secrets {
		if s.Name == id || strings.HasPrefix(id, "arn:") && strings.HasPrefix(s.ARN, id) {
			return s
		}
	}
	return nil
}

// ServeHTTP implements http.Handler: the JSON 1.1 protocol of Secrets Manager,
// and AssumeRoleWithWebIdentity of STS.
func (f *Fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	target := r.Header.Get("X-Amz-Target")
	if target == "" {
		f.login(w, r)
		return
	}
	call := target[strings.LastIndexByte(target, '.')+1:]
	f.calls[call]++
	var in struct{ SecretId, VersionId, VersionStage, ClientRequestToken string }
	if json.NewDecoder(r.Body).Decode(&in) != nil || !strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ") {
		refuse(w, "InvalidParameterException", "the request cannot be read")
		return
	}
	s := f.find(in.SecretId)
	switch {
	case f.Fail != "":
		refuse(w, f.Fail, "as the test wants it")
	case s == nil:
		refuse(w, codeNotFound, "Secrets Manager can't find the specified secret.")
	case call == "GetSecretValue":
		f.get(w, s, in.VersionId, in.VersionStage)
	case call == "DescribeSecret":
		out := map[string]any{"ARN": s.ARN, "Name": s.Name, "RotationEnabled": s.Rotates}
		stages := map[string][]string{}
		for label, id := range s.Stages {
			stages[id] = append(stages[id], label)
		}
		out["VersionIdsToStages"] = stages
		if s.Deleted {
			out["DeletedDate"] = float64(time.Now().Unix())
		}
		answer(w, out)
	case call == "RotateSecret":
		f.rotate(w, s, in.ClientRequestToken)
	default:
		refuse(w, "UnknownOperationException", call)
	}
}

func (f *Fake) get(w http.ResponseWriter, s *Secret, version, stage string) {
	id := version
	if id == "" {
		id = s.Stages[stage]
	}
	text, ok := s.Versions[id]
	switch {
	case s.Deleted:
		refuse(w, codeInvalid, "You can't perform this operation on the secret because it was marked for deletion.")
	case !ok:
		refuse(w, codeNotFound, "Secrets Manager can't find the specified secret value for staging label: "+stage)
	default:
		out := map[string]any{"ARN": s.ARN, "Name": s.Name, "VersionId": id}
		stages := []string{}
		for label, at := range s.Stages {
			if at == id {
				stages = append(stages, label)
			}
		}
		out["VersionStages"] = stages
		if s.Binary {
			out["SecretBinary"] = []byte(text)
		} else {
			out["SecretString"] = text
		}
		if f.Twist != nil {
			f.Twist(out)
		}
		answer(w, out)
	}
}

func (f *Fake) rotate(w http.ResponseWriter, s *Secret, token string) {
	_, known := s.Versions[token]
	switch {
	case s.Deleted:
		refuse(w, codeInvalid, "You can't perform this operation on the secret because it was marked for deletion.")
	case !s.Rotates:
		refuse(w, codeInvalid, "No Lambda rotation function ARN is associated with this secret.")
	case s.Stages[pending] != "" && s.Stages[pending] != token:
		refuse(w, codeInvalid, "A previous rotation isn't complete. That rotation will be reattempted.")
	case !known && s.Stages[pending] == "":
		s.Stages[pending] = token
		fallthrough
	default:
		answer(w, map[string]any{"ARN": s.ARN, "Name": s.Name, "VersionId": token})
	}
}

func (f *Fake) login(w http.ResponseWriter, r *http.Request) {
	if r.FormValue("Action") != "AssumeRoleWithWebIdentity" {
		http.Error(w, "no such action", http.StatusBadRequest)
		return
	}
	f.Logins = append(f.Logins, r.FormValue("RoleArn")+" "+r.FormValue("WebIdentityToken"))
	fmt.Fprintf(w, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials>
		<AccessKeyId>ASIAFAKE</AccessKeyId><SecretAccessKey>fake</SecretAccessKey><SessionToken>fake</SessionToken><Expiration>%s</Expiration>
		</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	_ = json.NewEncoder(w).Encode(v)
}

func refuse(w http.ResponseWriter, code, message string) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	status := http.StatusBadRequest
	if slices.Contains([]string{"InternalServiceError", "ServiceUnavailable"}, code) {
		status = http.StatusInternalServerError
	}
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"__type": code, "Message": message})
}

// Current is the text of a secret's current version.
func (f *Fake) Current(s *Secret) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return s.Versions[s.Stages[current]]
}

// Delete deletes a secret at once.
func (f *Fake) Delete(s *Secret) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.secrets, s.ARN)
}
