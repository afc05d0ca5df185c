// Package awsclients is a trial: the AWS CLI, boto3 and AWS's SDKs for Go and
// JavaScript, as they come, read from a real MinIO with credentials that Mayfly
// makes, through the ends of leases. It is all in its test.
package awsclients
