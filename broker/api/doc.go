// Package api holds Mayfly's API definition, in mayfly/v1/*.proto. The Go code
// that is generated from it stands beside it; `make generate` renews it.
package api
