package vaultscope

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
)

// PEM returns the blocks of raw, all of which must be of one kind
// ("CERTIFICATE" or "PUBLIC KEY") and whole; so that what is printed, and
// given to Vault, can hold no private key.
func PEM(raw []byte, kind string) (string, error) {
	var out bytes.Buffer
	for {
		var block *pem.Block
		if block, raw = pem.Decode(raw); block == nil {
			break
		}
		if block.Type != kind {
			return "", fmt.Errorf("holds a %q; only %q is taken", block.Type, kind)
		}
		var err error
		if kind == "CERTIFICATE" {
			_, err = x509.ParseCertificate(block.Bytes)
		} else {
			_, err = x509.ParsePKIXPublicKey(block.Bytes)
		}
		if err != nil {
			return "", fmt.Errorf("holds a %q that cannot be read: %w", block.Type, err)
		}
		block.Headers = nil
		if err := pem.Encode(&out, block); err != nil {
			return "", fmt.Errorf("writing PEM: %w", err)
		}
	}
	if out.Len() == 0 {
		return "", fmt.Errorf("holds no PEM block %q", kind)
	}
	return out.String(), nil
}
