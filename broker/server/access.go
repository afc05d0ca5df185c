package server

import (
	"github.com/mayfly-security/mayfly/broker/api/mayfly/v1/mayflyv1connect"
)

// The services of governed access; what is not built yet is unimplemented.
type requestService struct {
	mayflyv1connect.UnimplementedRequestServiceHandler
	s *Server
}

type policyService struct {
	mayflyv1connect.UnimplementedPolicyServiceHandler
	s *Server
}
