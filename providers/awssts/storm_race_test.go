//go:build race

package awssts

// stormLeases is how many leases TestStorm makes. The race detector makes them
// slow; `make test` runs the storm once more without it, with 5,000.
const stormLeases = 1000
