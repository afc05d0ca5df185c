package aws

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// simulation is one question to the judge.
type simulation struct {
	Principal        string            `json:"principal"`
	Action           string            `json:"action"`
	Resource         string            `json:"resource"`
	Context          map[string]string `json:"context"`
	SessionPolicy    string            `json:"sessionPolicy"`
	IdentityPolicies []string          `json:"identityPolicies"`
	Boundary         string            `json:"boundary"`
	ResourcePolicy   string            `json:"resourcePolicy"`
}

type judgement struct {
	Result  string   `json:"result"`
	Ignored []string `json:"ignored"`
	Error   string   `json:"error"`
}

// judge asks @cloud-copilot/iam-simulate, in a process of its own.
func judge(t *testing.T, questions []simulation) (all []judgement) {
	t.Helper()
	dir, err := filepath.Abs("../testbed/iamsim")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "@cloud-copilot", "iam-simulate")); err != nil {
		t.Fatal("the judge of AWS policies is not installed: run `make testbed-iamsim`, which needs Node.js")
	}
	var in, out, errs bytes.Buffer
	enc := json.NewEncoder(&in)
	for _, q := range questions {
		if err := enc.Encode(q); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "node", "judge.mjs")
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = dir, &in, &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("the judge: %v\n%s", err, errs.String())
	}
	for line := range strings.Lines(out.String()) {
		var j judgement
		if err := json.Unmarshal([]byte(line), &j); err != nil {
			t.Fatalf("the judge says %q: %v", line, err)
		}
		all = append(all, j)
	}
	if len(all) != len(questions) {
		t.Fatalf("%d judgements of %d questions: %s", len(all), len(questions), errs.String())
	}
	return all
}
