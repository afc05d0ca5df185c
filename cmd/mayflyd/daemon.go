package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mayfly-security/mayfly/attestation"
	"github.com/mayfly-security/mayfly/attestation/spiffe"
	"github.com/mayfly-security/mayfly/broker/catalog"
	"github.com/mayfly-security/mayfly/broker/lease"
	"github.com/mayfly-security/mayfly/broker/server"
	"github.com/mayfly-security/mayfly/broker/signin"
	"github.com/mayfly-security/mayfly/providers"
	"github.com/mayfly-security/mayfly/providers/awssts"
	"github.com/mayfly-security/mayfly/providers/secretsmanager"
	"github.com/mayfly-security/mayfly/providers/token"
	"github.com/mayfly-security/mayfly/providers/vault"
	"github.com/mayfly-security/mayfly/store"
	"github.com/mayfly-security/mayfly/store/bolt"
)

// drainTime is how long a stopping broker waits for requests under way.
const drainTime = 30 * time.Second

// drivers are the kinds of provider that this broker knows. login is what they
// log in to other systems with; nil where they are asked about configuration
// only, and open nothing.
func drivers(login attestation.LoginSource) map[string]providers.Driver {
	return map[string]providers.Driver{
		"awssts":         awssts.New(login),
		"secretsmanager": secretsmanager.Driver{Login: login},
		"token":          token.Driver{},
		"vault":          vault.Driver{Login: login},
	}
}

// settings are what a daemon is started with: the configuration file's
// content, or dev's.
type settings struct {
	store        string
	listen       string
	opsListen    string // empty: no ops listener
	workload     string // empty: SPIFFE_ENDPOINT_SOCKET
	trustDomains []spiffeid.TrustDomain
	catalog      []string        // files
	people       *peopleSettings // nil: people do not come in
	log          *slog.Logger
	// sampleToken makes a token of a sample person's; nil but in dev.
	sampleToken func(person string, forAgent bool) (string, error)

	drivers   map[string]providers.Driver   // nil: drivers(), with the broker's identity
	wrapStore func(store.Store) store.Store // nil: the store as it is; tests crash in it
	tune      func(*lease.Config)           // nil: defaults; tests shorten waits
}

// daemon is the broker, wired and running.
type daemon struct {
	settings settings
	log      *slog.Logger
	store    store.Store
	identity *spiffe.Source
	engine   *lease.Engine
	server   *server.Server
	ops      *server.Ops
	control  *control        // nil where there can be none
	signIn   *signin.Manager // nil where people do not come in
	ln       net.Listener
	opsLn    net.Listener
	peopleLn net.Listener

	reloading sync.Mutex
	closing   sync.Once
	closeErr  error
	failed    chan error // a listener that ended by itself
	serving   sync.WaitGroup
}

// start brings the broker up; when it has returned, agents are served. What
// was opened before a failure is closed.
func start(ctx context.Context, s settings) (_ *daemon, err error) {
	d := &daemon{settings: s, log: s.log, failed: make(chan error, 4)}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close(ctx))
		}
	}()
	known := d.settings.drivers
	if known == nil {
		known = drivers(nil)
	}
	snapshot, err := catalog.Load(s.catalog, known)
	if err != nil {
		return nil, err
	}
	db, err := bolt.Open(s.store, bolt.Config{})
	if err != nil {
		return nil, err
	}
	d.store = db
	if s.wrapStore != nil {
		d.store = s.wrapStore(db)
	}
	waiting := time.AfterFunc(5*time.Second, func() {
		d.log.Warn("still waiting for the Workload API to give the broker its SVID")
	})
	d.identity, err = spiffe.Open(ctx, spiffe.Config{Addr: s.workload, TrustDomains: s.trustDomains, Log: d.log})
	waiting.Stop()
	if err != nil {
		return nil, err
	}
	if d.settings.drivers == nil {
		d.settings.drivers = drivers(d.identity)
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	config := lease.Config{Store: d.store, Catalog: snapshot, Drivers: d.settings.drivers, Log: d.log, Metrics: metrics,
		Room: func() error { return roomFor(filepath.Dir(s.store)) }}
	if s.tune != nil {
		s.tune(&config)
	}
	if err := endRestoredSessions(ctx, d.store, d.log); err != nil {
		return nil, err
	}
	if d.engine, err = lease.New(ctx, config); err != nil {
		return nil, err
	}
	face := server.Config{Engine: d.engine, Attestor: d.identity, Identity: d.identity, Log: d.log}
	if s.people != nil {
		if face.People, err = d.openPeople(s.people, metrics); err != nil {
			return nil, err
		}
	}
	if d.server, err = server.New(face); err != nil {
		return nil, err
	}
	d.ops, err = server.NewOps(server.OpsConfig{
		Metrics: metrics, Log: d.log,
		Ready: []func(context.Context) error{d.engine.Ready, d.identity.Ready},
	})
	if err != nil {
		return nil, err
	}
	if err := d.listen(); err != nil {
		return nil, err
	}
	if path := controlPath(s.store); len(path) > maxSocketPath {
		d.log.Warn("the path of the control socket is too long for a socket: to make a backup, stop the broker", "path", path)
	} else if d.control, err = openControl(s.store, d.engine, db.WriteTo, d.log); err != nil {
		return nil, err
	} else {
		d.control.token = s.sampleToken
		d.serving.Go(func() { d.served("the control socket", d.control.serve()) })
	}
	d.log.Info("serving", "id", d.identity.ID().String(), "listen", d.ln.Addr().String(),
		"installation", d.engine.InstallationID(), "catalog", snapshot.Digest())
	return d, nil
}

// openPeople makes what the listener for people needs.
func (d *daemon) openPeople(p *peopleSettings, metrics prometheus.Registerer) (_ *server.People, err error) {
	d.signIn, err = signin.New(signin.Config{
		Store: d.store, Provider: p.provider, Log: d.log, Now: d.engine.Now, Late: d.engine.Late,
		PersonSeen: d.engine.PersonSeen, SessionTTL: p.sessionTTL, Metrics: metrics,
	})
	if err != nil {
		return nil, err
	}
	return &server.People{SignIn: d.signIn, Certificate: p.certificate, URL: p.url}, nil
}

// endRestoredSessions ends the sessions of a store that came back from a
// backup, before the engine takes the backup's mark away: some of them were
// signed out since.
func endRestoredSessions(ctx context.Context, db store.Store, log *slog.Logger) error {
	backup, err := lease.IsBackup(ctx, db)
	if err != nil || !backup {
		return err
	}
	n, err := signin.EndAll(ctx, db, time.Now())
	if err == nil && n > 0 {
		log.Warn("the sessions that the backup holds are ended", "sessions", n)
	}
	return err
}

func (d *daemon) listen() (err error) {
	if d.ln, err = net.Listen("tcp", d.settings.listen); err != nil {
		return fmt.Errorf("listening for agents: %w", err)
	}
	d.serving.Go(func() { d.served("agents", d.server.Serve(d.ln)) })
	if p := d.settings.people; p != nil {
		if d.peopleLn = p.ln; d.peopleLn == nil {
			if d.peopleLn, err = net.Listen("tcp", p.listen); err != nil {
				return fmt.Errorf("listening for people: %w", err)
			}
		}
		d.serving.Go(func() { d.served("people", d.server.ServePeople(d.peopleLn)) })
		d.log.Info("serving people", "url", p.url, "listen", d.peopleLn.Addr().String(), "issuer", p.provider.Issuer())
	}
	if d.settings.opsListen == "" {
		return nil
	}
	if d.opsLn, err = net.Listen("tcp", d.settings.opsListen); err != nil {
		return fmt.Errorf("listening for operations: %w", err)
	}
	d.serving.Go(func() { d.served("operations", d.ops.Serve(d.opsLn)) })
	return nil
}

func (d *daemon) served(what string, err error) {
	if err != nil {
		d.failed <- fmt.Errorf("serving %s: %w", what, err)
	}
}

// reload reads the catalog again. When it has returned nil, every later
// delivery is decided by the new one. A bad set is refused and told, and the
// present one stays.
func (d *daemon) reload(ctx context.Context, actor string) error {
	d.reloading.Lock()
	defer d.reloading.Unlock()
	snapshot, err := catalog.Load(d.settings.catalog, d.settings.drivers)
	if err != nil {
		d.engine.RefuseLoad(ctx, err, actor)
		return err
	}
	return d.engine.Load(ctx, snapshot, actor)
}

// run waits until ctx ends or a listener fails, reloading whenever hup says
// so, and then stops the broker.
func (d *daemon) run(ctx context.Context, hup <-chan struct{}) error {
	var err error
	for err == nil {
		select {
		case <-ctx.Done():
			d.log.Info("stopping: waiting for requests under way", "at_most", drainTime.String())
			return d.close(context.WithoutCancel(ctx))
		case <-hup:
			switch err := d.reload(ctx, "signal:SIGHUP"); {
			case errors.Is(err, lease.ErrExchanged):
				d.log.Warn("the catalog was exchanged", "digest", d.engine.Catalog().Digest(), "error", err)
			case err != nil:
				d.log.Error("the catalog was not exchanged; the present one stays", "error", err)
			default:
				d.log.Info("the catalog was exchanged", "digest", d.engine.Catalog().Digest())
			}
		case err = <-d.failed:
		}
	}
	return errors.Join(err, d.close(context.WithoutCancel(ctx)))
}

// close stops the broker, last things first: no new requests, those under way
// to their end, then the engine, the identity and the store. Leases stay as
// they are; the next start goes on with them.
func (d *daemon) close(ctx context.Context) error {
	d.closing.Do(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		var errs []error
		if d.server != nil {
			errs = append(errs, d.server.Shutdown(ctx))
		}
		if d.ops != nil {
			errs = append(errs, d.ops.Shutdown(ctx))
		}
		if d.control != nil {
			errs = append(errs, d.control.shutdown(ctx))
		}
		d.serving.Wait()
		if d.signIn != nil {
			d.signIn.Close()
		}
		if d.engine != nil {
			d.engine.Close()
		}
		if d.identity != nil {
			errs = append(errs, d.identity.Close())
		}
		if d.store != nil {
			errs = append(errs, d.store.Close())
		}
		d.closeErr = errors.Join(errs...)
		if d.ln != nil {
			d.log.Info("stopped")
		}
	})
	return d.closeErr
}
