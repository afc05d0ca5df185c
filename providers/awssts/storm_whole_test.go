//go:build !race

package awssts

// stormLeases is how many leases TestStorm makes.
const stormLeases = 5000
