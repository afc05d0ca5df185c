package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"github.com/mayfly-security/mayfly/broker"
)

// opsConnections is how many connections the ops listener takes at once:
// scrapers and probers are few.
const opsConnections = 64

// OpsConfig is what an Ops listener is made of.
type OpsConfig struct {
	// Metrics is served at /metrics. Required.
	Metrics prometheus.Gatherer
	// Ready is asked by /readyz; the first error says why the broker is not
	// ready. None means that it always is.
	Ready []func(context.Context) error
	Log   *slog.Logger // required
}

// Ops is the plain HTTP listener for the operator's machines: metrics, health
// and readiness. It says nothing secret and takes no orders; it is meant for
// loopback or a private network.
type Ops struct {
	http *http.Server
}

// NewOps makes an Ops; Serve starts it.
func NewOps(cfg OpsConfig) (*Ops, error) {
	if cfg.Metrics == nil || cfg.Log == nil {
		return nil, errors.New("server: OpsConfig.Metrics or OpsConfig.Log is nil")
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(cfg.Metrics, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		_, _ = w.Write([]byte("ok\n")) // a prober that is gone is no error of ours
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		for _, ready := range cfg.Ready {
			if err := ready(ctx); err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = w.Write([]byte(string(broker.ReasonOf(err)) + "\n"))
				cfg.Log.Debug("not ready", "error", err)
				return
			}
		}
		_, _ = w.Write([]byte("ready\n"))
	})
	return &Ops{http: &http.Server{
		Handler:           http.MaxBytesHandler(mux, 1<<10),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}}, nil
}

// Serve answers on ln until Shutdown; then it returns nil.
func (o *Ops) Serve(ln net.Listener) error {
	if err := o.http.Serve(netutil.LimitListener(ln, opsConnections)); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Shutdown stops the listener.
func (o *Ops) Shutdown(ctx context.Context) error {
	if err := o.http.Shutdown(ctx); err != nil {
		return o.http.Close()
	}
	return nil
}
