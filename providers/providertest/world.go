package providertest

import (
	"encoding/json"
	"errors"
	"net/http"
)

// World serves a System over HTTP. It runs in the test's process, outside of
// the broker's, and so survives the broker's SIGKILL. It is no more than the
// wire: everything that it knows and does is the System's.
//
//	POST /session   {name, dies_at}          -> {accessor, token}
//	POST /create    {name, token?, dies_at}  -> {secret, dies_at}
//	POST /end       {mode, handles}          -> [{progress, retry_at?}]
//	POST /status    {mode, handles}          -> [{progress, retry_at?}]
//	GET  /use       Authorization: Bearer S  -> 204, or 401 if S does not work
//
// A definite refusal is 403, and 503 means that nothing is done for anybody now. Every other status but 200 leaves open whether
// something was done.
type World struct {
	*System
	mux http.ServeMux
}

// NewWorld makes a World around s.
func NewWorld(s *System) *World {
	w := &World{System: s}
	w.mux.Handle("POST /session", endpoint(s.session))
	w.mux.Handle("POST /create", endpoint(s.create))
	w.mux.Handle("POST /end", endpoint(s.end))
	w.mux.Handle("POST /status", endpoint(s.status))
	w.mux.HandleFunc("GET /use", func(rw http.ResponseWriter, r *http.Request) {
		status := http.StatusUnauthorized
		if s.Works(bearer(r)) {
			status = http.StatusNoContent
		}
		rw.WriteHeader(status)
	})
	return w
}

// ServeHTTP serves one request.
func (w *World) ServeHTTP(rw http.ResponseWriter, r *http.Request) { w.mux.ServeHTTP(rw, r) }

const maxBody = 1 << 20

func bearer(r *http.Request) string {
	const scheme = "Bearer "
	h := r.Header.Get("Authorization")
	if len(h) < len(scheme) || h[:len(scheme)] != scheme {
		return ""
	}
	return h[len(scheme):]
}

// endpoint serves one kind of request. The body is read whole before the
// System acts, so that r.Context() ends when the caller leaves.
func endpoint[Q, A any](act call[Q, A]) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		var q Q
		if err := json.NewDecoder(http.MaxBytesReader(rw, r.Body, maxBody)).Decode(&q); err != nil {
			http.Error(rw, "no such request", http.StatusForbidden)
			return
		}
		answer, err := act(r.Context(), q)
		switch {
		case err == nil:
			rw.Header().Set("Content-Type", "application/json")
			json.NewEncoder(rw).Encode(answer)
		case errors.Is(err, errRefused):
			http.Error(rw, "refused", http.StatusForbidden)
		case errors.Is(err, errAway):
			http.Error(rw, "away", http.StatusServiceUnavailable)
		case errors.Is(err, errFailed):
			http.Error(rw, "something went wrong", http.StatusInternalServerError)
		default: // cut, or the caller has left
			panic(http.ErrAbortHandler)
		}
	}
}
