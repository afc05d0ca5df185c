package server

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/mayfly-security/mayfly/broker"
	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

// errorFiller gives an ErrorDetail to the errors that the libraries make by
// themselves, so that every error that is answered as JSON has a stable
// reason. It holds back the bodies of error answers only; they are small.
type errorFiller struct {
	http.ResponseWriter
	correlation broker.CorrelationID
	status      int // 0 until the header is written, or held back
	held        bytes.Buffer
	holding     bool
}

func (f *errorFiller) Unwrap() http.ResponseWriter { return f.ResponseWriter }

// Flush hands what was written to the connection, as a stream needs it after
// each message. What is held back stays.
func (f *errorFiller) Flush() {
	if f.holding {
		return
	}
	if f.status == 0 {
		f.status = http.StatusOK
	}
	_ = http.NewResponseController(f.ResponseWriter).Flush() // a caller that is gone is found by the next write
}

func (f *errorFiller) WriteHeader(status int) {
	if f.status != 0 {
		return
	}
	f.status = status
	if status >= 400 {
		f.holding = true
		return
	}
	f.ResponseWriter.WriteHeader(status)
}

func (f *errorFiller) Write(b []byte) (int, error) {
	if f.status == 0 {
		f.WriteHeader(http.StatusOK)
	}
	if f.holding {
		return f.held.Write(b)
	}
	return f.ResponseWriter.Write(b)
}

// connectError is an error as the Connect protocol writes it.
type connectError struct {
	Code    string          `json:"code"`
	Message string          `json:"message,omitempty"`
	Details []connectDetail `json:"details,omitempty"`
}

type connectDetail struct {
	Type  string          `json:"type"`
	Value string          `json:"value"`
	Debug json.RawMessage `json:"debug,omitempty"`
}

// finish writes what was held back. Where it had to find the reason itself it
// returns that refusal, which nobody has recorded.
func (f *errorFiller) finish() error {
	if !f.holding {
		return nil
	}
	body := f.held.Bytes()
	var e connectError
	var refusal *broker.Error
	if isHTML(f.Header().Get("Content-Type")) {
		// A page of ours says what is wrong by itself.
	} else if !isJSON(f.Header().Get("Content-Type")) {
		// Not of the RPC: a path or a type of content that it does not know.
		e.Code, e.Message = codeOfStatus(f.status), strings.ToLower(http.StatusText(f.status))
		body, refusal = f.fill(e, body)
		f.Header().Set("Content-Type", "application/json")
	} else if json.Unmarshal(body, &e) == nil && e.Code != "" && len(e.Details) == 0 {
		body, refusal = f.fill(e, body)
	}
	f.Header().Del("Content-Length")
	f.ResponseWriter.WriteHeader(f.status)
	_, _ = f.ResponseWriter.Write(body) // a caller that is gone is no error of ours
	if refusal == nil {
		return nil
	}
	return refusal
}

func isJSON(contentType string) bool { return isMedia(contentType, "application/json") }
func isHTML(contentType string) bool { return isMedia(contentType, "text/html") }

func isMedia(contentType, want string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	return strings.TrimSpace(media) == want
}

// codeOfStatus names the RPC code of an answer that was not the RPC's own.
func codeOfStatus(status int) string {
	switch {
	case status == http.StatusNotFound:
		return connect.CodeNotFound.String()
	case status >= 500:
		return connect.CodeInternal.String()
	}
	return connect.CodeInvalidArgument.String()
}

func (f *errorFiller) fill(e connectError, body []byte) ([]byte, *broker.Error) {
	var code connect.Code
	if code.UnmarshalText([]byte(e.Code)) != nil {
		return body, nil
	}
	refusal := reasonOfCode(code, e.Message)
	detail := &mayflyv1.ErrorDetail{Reason: string(refusal.Reason), Next: refusal.Next, CorrelationId: string(f.correlation)}
	value, err := proto.Marshal(detail)
	if err != nil {
		return body, refusal
	}
	debug, err := protojson.Marshal(detail)
	if err != nil {
		return body, refusal
	}
	e.Message = refusal.Message
	e.Details = []connectDetail{{
		Type:  string(detail.ProtoReflect().Descriptor().FullName()),
		Value: base64.RawStdEncoding.EncodeToString(value), Debug: debug,
	}}
	filled, err := json.Marshal(e)
	if err != nil {
		return body, refusal
	}
	return filled, refusal
}

// strictJSON is the JSON of the API. Unlike the RPC library's own it refuses
// fields that it does not know: a misspelt limit must not pass as none. The
// library has a codec for each way to name the type of the content, so this
// takes the place of both.
type strictJSON string

const (
	plainJSON   strictJSON = "json"
	charsetJSON strictJSON = "json; charset=utf-8"
)

func (j strictJSON) Name() string { return string(j) }

func (strictJSON) Marshal(m any) ([]byte, error) {
	msg, ok := m.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is no message", m)
	}
	return protojson.Marshal(msg)
}

func (strictJSON) Unmarshal(data []byte, m any) error {
	msg, ok := m.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is no message", m)
	}
	if len(data) == 0 {
		data = []byte("{}")
	}
	return protojson.Unmarshal(data, msg)
}
