// Package client is the Go SDK of Mayfly: it asks a broker for credentials, in
// Mayfly's own words.
//
//	c, err := client.New(ctx, client.Config{})
//	if err != nil { … }
//	defer c.Close()
//	cred, err := c.Get(ctx, client.GetRequest{Tool: "crm.read", Params: map[string]string{"customer": "c-17"}})
//	if err != nil { … }
//	defer c.Revoke(context.WithoutCancel(ctx), cred.Lease.ID, "done")
//	token, _ := cred.Secret.Reveal("access_token")
//
// Both sides prove who they are with X.509-SVIDs over mutual TLS. Ours comes
// from the SPIFFE Workload API and is renewed by it; the broker must have
// exactly the SPIFFE ID that is pinned in Config.BrokerID.
//
// People come in by another listener (Config.PeopleAddr), whose certificate is
// for its host, and with a session's token in place of an SVID: see StartBrowser
// and StartDevice. Config.ComesAs says which of both it is.
//
// What the broker refuses is a *broker.Error, with a stable reason
// (broker.ReasonOf), a message, what to do next, and the correlation ID. Where
// the broker was not heard, the error is a *ConnectionError. Calls are tried
// again for a moment where the broker cannot be reached or cannot write; Get,
// CreateGrant, CreateRequest and OpenIncident carry an idempotency key, so that
// a lost answer never costs a second credential, grant, request or incident.
package client
