package server

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"
)

// introspect answers resource servers (RFC 7662). The resource server is
// authenticated by its SVID like every caller. About a token that is not
// active, or not for this server, nothing is said but that (section 2.2).
func (s *Server) introspect(w http.ResponseWriter, r *http.Request) {
	v := visitOf(r.Context())
	if err := r.ParseForm(); err != nil || r.PostForm.Get("token") == "" {
		s.oauthError(w, http.StatusBadRequest, "invalid_request", "send a form with the field token")
		return
	}
	token := r.PostForm.Get("token")
	answer := map[string]any{"active": false}
	for _, p := range s.engine.Introspectors() {
		in, ok := p.Introspect(r.Context(), token, v.caller.ID)
		if !ok {
			continue
		}
		_, usable, err := s.engine.Usable(r.Context(), in.Lease)
		if err != nil {
			// Whether it is active is not known; RFC 7662 has no word for
			// that, and "active": false would be a claim.
			s.log.ErrorContext(r.Context(), "introspecting a token", "lease", in.Lease, "correlation", v.caller.Correlation, "error", err)
			s.oauthError(w, http.StatusServiceUnavailable, "temporarily_unavailable", "try again")
			return
		}
		if usable {
			answer = maps.Clone(in.Claims)
			answer["active"] = true
		}
		break
	}
	s.writeJSON(w, http.StatusOK, answer)
}

// jwks serves the public keys of every provider that has some (RFC 7517).
func (s *Server) jwks(w http.ResponseWriter, r *http.Request) {
	set := struct {
		Keys []json.RawMessage `json:"keys"`
	}{Keys: []json.RawMessage{}}
	for _, p := range s.engine.KeySets() {
		var one struct {
			Keys []json.RawMessage `json:"keys"`
		}
		if err := json.Unmarshal(p.JWKS(), &one); err != nil {
			s.log.ErrorContext(r.Context(), "reading a provider's key set", "error", err)
			s.oauthError(w, http.StatusInternalServerError, "server_error", "see the log")
			return
		}
		set.Keys = slices.Concat(set.Keys, one.Keys)
	}
	s.writeJSON(w, http.StatusOK, set)
}

func (s *Server) oauthError(w http.ResponseWriter, status int, code, description string) {
	s.writeJSON(w, status, map[string]string{"error": code, "error_description": description})
}

func (s *Server) writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.log.Debug("writing an answer", "error", err)
	}
}
