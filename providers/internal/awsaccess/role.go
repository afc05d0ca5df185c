package awsaccess

import (
	"errors"
	"regexp"
)

// Role is an IAM role by its ARN.
type Role struct {
	ARN       string
	Partition string
	Account   string
	Path      string // begins and ends with "/"
	Name      string
}

var roleForm = regexp.MustCompile(`^arn:(aws|aws-cn|aws-us-gov|aws-iso|aws-iso-b|aws-iso-e|aws-iso-f|aws-eusc):iam::([0-9]{12}):role(/(?:[A-Za-z0-9+=,.@_-]+/)*)([A-Za-z0-9+=,.@_-]{1,64})$`)

// ParseRole reads the ARN of a role.
func ParseRole(arn string) (Role, error) {
	m := roleForm.FindStringSubmatch(arn)
	if m == nil || len(arn) > MaxText {
		return Role{}, errors.New("which is no ARN of an IAM role, such as arn:aws:iam::123456789012:role/mayfly/crm")
	}
	return Role{ARN: arn, Partition: m[1], Account: m[2], Path: m[3], Name: m[4]}, nil
}
