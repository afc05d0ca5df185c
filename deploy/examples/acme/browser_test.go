package acme_test

import (
	"fmt"
	"os"
)

// browserPerson names whom the browser signs in.
const browserPerson = "ACME_TEST_PERSON"

// browser stands in for a person at a browser: $BROWSER of `mayfly login`.
func browser() {
	fmt.Fprintln(os.Stderr, "not written yet")
	os.Exit(1)
}
