//go:build unix

package main

import (
	"bufio"
	"encoding/json"
	"os"
	"sync"
	"time"
)

// history is the compact record of a run: one JSON array a line, with the
// milliseconds since the beginning, who did what, and about what. It holds no
// secret.
type history struct {
	mu    sync.Mutex
	began time.Time
	file  *os.File
	w     *bufio.Writer
}

func openHistory(path string) (*history, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	return &history{began: time.Now(), file: f, w: bufio.NewWriterSize(f, 1<<16)}, nil
}

// note writes one line.
func (h *history) note(who, what string, about ...any) {
	line := append([]any{time.Since(h.began).Milliseconds(), who, what}, about...)
	b, err := json.Marshal(line)
	if err != nil {
		b = []byte(`[0,"history","unreadable"]`)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	_, _ = h.w.Write(append(b, '\n')) // a full disk shows at close
}

func (h *history) close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.w.Flush(); err != nil {
		h.file.Close()
		return err
	}
	return h.file.Close()
}
