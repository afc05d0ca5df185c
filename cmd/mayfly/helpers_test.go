package main

import (
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	mayflyv1 "github.com/mayfly-security/mayfly/broker/api/mayfly/v1"
)

var update = flag.Bool("update", false, "renew the golden files")

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s is not what is made now (renew it with -update):\n%s", path, diff)
	}
}

// verbs are the paths of all verbs.
func verbs(root *cobra.Command) (paths [][]string) {
	walk(root, func(c *cobra.Command) {
		paths = append(paths, strings.Fields(strings.TrimPrefix(c.CommandPath(), "mayfly ")))
		if c.Example == "" {
			panic(c.CommandPath() + " has no example")
		}
	})
	return paths
}

// The JSON has the API's names, so that there is one description of both.
func TestJSONHasTheNamesOfTheAPI(t *testing.T) {
	for _, tt := range []struct {
		view    any
		message proto.Message
	}{
		{identityView{}, &mayflyv1.WhoAmIResponse{}},
		{toolView{}, &mayflyv1.Tool{}},
		{parameterView{}, &mayflyv1.Parameter{}},
		{leaseView{}, &mayflyv1.Lease{}},
		{credentialView{}, &mayflyv1.IssueLeaseResponse{}},
		{grantView{}, &mayflyv1.Grant{}},
		{withdrawalView{}, &mayflyv1.WithdrawGrantResponse{}},
		{incidentView{}, &mayflyv1.Incident{}},
		{closingView{}, &mayflyv1.CloseIncidentResponse{}},
		{eventView{}, &mayflyv1.Event{}},
		{strayView{}, &mayflyv1.Stray{}},
		{strayEndView{}, &mayflyv1.EndStrayResponse{}},
		{cutOffView{}, &mayflyv1.RoleCutOff{}},
		{requestView{}, &mayflyv1.Request{}},
		{approvalView{}, &mayflyv1.Approval{}},
		{explanationView{}, &mayflyv1.ExplainResponse{}},
		{previewView{}, &mayflyv1.PreviewResponse{}},
		{previewGrantView{}, &mayflyv1.PreviewGrant{}},
		{previewDecisionView{}, &mayflyv1.PreviewDecision{}},
		{radiusView{}, &mayflyv1.EndAccessProgress{}},
	} {
		fields := tt.message.ProtoReflect().Descriptor().Fields()
		view := reflect.TypeOf(tt.view)
		for i := range view.NumField() {
			name, _, _ := strings.Cut(view.Field(i).Tag.Get("json"), ",")
			if fields.ByJSONName(name) == nil {
				t.Errorf("%s prints %q, which %T does not have", view.Name(), name, tt.message)
			}
		}
		if view.NumField() != fields.Len() {
			t.Errorf("%s has %d fields and %T has %d", view.Name(), view.NumField(), tt.message, fields.Len())
		}
	}
}
