// Package awsdeny is a trial: the broker and the command line as they are, with
// an AWS account whose roles have deny lists, from the request to the last
// entry's collection, through kills, a restore and outages. AWS itself is
// fakeaws, served over HTTP; it sees real JWT-SVIDs. It is all in its test.
package awsdeny
