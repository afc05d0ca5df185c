package vault

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
	"golang.org/x/crypto/ssh"
)

// class is how a credential of Vault's ends. It is in handles.
type class string

// The classes.
const (
	// login: Vault revokes it, and can be asked to wait until that is done. A
	// database login has an end of its own at the database, too.
	classDatabase class = "database"
	// leased: Vault revokes it, and can be asked to wait until that is done.
	// What Vault loses track of does not die (an IAM user).
	classLeased class = "leased"
	// certificate: revoked, it is on a list that verifiers may or may not ask
	// about. It dies at its NotAfter.
	classCertificate class = "certificate"
	// fixed: nothing ends it before its time (a signed SSH key, an STS session).
	classFixed class = "fixed"
	// static: it was there before (KV).
	classStatic class = "static"
)

func (c class) known() bool {
	switch c {
	case classDatabase, classLeased, classCertificate, classFixed, classStatic:
		return true
	}
	return false
}

// diesByItself reports whether credentials of c die without Vault.
func (c class) diesByItself() bool {
	return c == classDatabase || c == classCertificate || c == classFixed
}

// revocable reports whether a lease of c is to be ended at Vault.
func (c class) revocable() bool {
	return c == classDatabase || c == classLeased || c == classCertificate
}

// fieldsOf takes the secret's fields out of an answer.
func fieldsOf(data map[string]any, names []string) (map[string]string, error) {
	fields := make(map[string]string, len(names))
	for _, name := range names {
		value, ok := data[name]
		if !ok || value == nil {
			return nil, fmt.Errorf("there is no field %q in Vault's answer", name)
		}
		text, err := fieldText(value)
		if err != nil {
			return nil, fmt.Errorf("reading the field %q of Vault's answer: %w", name, err)
		}
		fields[name] = text
	}
	return fields, nil
}

// fieldText is a value as text: texts as they are, lists of texts (a chain of
// certificates) on lines of their own, everything else as JSON.
func fieldText(value any) (string, error) {
	switch v := value.(type) {
	case string:
		return v, nil
	case []any:
		lines := make([]string, len(v))
		for i, each := range v {
			line, ok := each.(string)
			if !ok {
				return jsonText(value)
			}
			lines[i] = line
		}
		return strings.Join(lines, "\n"), nil
	}
	return jsonText(value)
}

func jsonText(value any) (string, error) {
	b, err := json.Marshal(value)
	if err != nil {
		return "", errors.New("it has no text form")
	}
	return string(b), nil
}

// keyValues are the data of a KV secret. Version 2 has them one level deeper.
func keyValues(secret *api.Secret, version int) (map[string]any, error) {
	if version == 1 {
		return secret.Data, nil
	}
	data, ok := secret.Data["data"].(map[string]any)
	if !ok {
		return nil, errors.New("there is no secret at this path: it was deleted, or this is no mount of KV version 2")
	}
	return data, nil
}

// notAfter is when a certificate expires (RFC 5280, section 4.1.2.5).
func notAfter(data map[string]any) (time.Time, error) {
	text, _ := data["certificate"].(string)
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return time.Time{}, errors.New("there is no certificate in Vault's answer")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return time.Time{}, fmt.Errorf("reading the certificate: %w", err)
	}
	return cert.NotAfter, nil
}

// validBefore is when a signed SSH key expires (OpenSSH, PROTOCOL.certkeys).
func validBefore(data map[string]any) (time.Time, error) {
	text, _ := data["signed_key"].(string)
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(text))
	if err != nil {
		return time.Time{}, errors.New("there is no signed key in Vault's answer")
	}
	signed, ok := key.(*ssh.Certificate)
	if !ok {
		return time.Time{}, errors.New("the key in Vault's answer is not signed")
	}
	if signed.ValidBefore == ssh.CertTimeInfinity || signed.ValidBefore > math.MaxInt32*1000 {
		return time.Time{}, errors.New("the signed key does not expire")
	}
	return time.Unix(int64(signed.ValidBefore), 0), nil
}

// errNoEnd: design invariant I8, everything dies by itself.
var errNoEnd = errors.New("the answer does not tell when the credential dies")

// wholeSeconds is a duration as Vault takes it, rounded down.
func wholeSeconds(d time.Duration) string {
	return strconv.FormatInt(int64(d/time.Second), 10) + "s"
}
