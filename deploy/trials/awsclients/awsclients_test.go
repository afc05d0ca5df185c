//go:build unix

package awsclients

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"

	"github.com/mayfly-security/mayfly/deploy/examples/story"
	"github.com/mayfly-security/mayfly/deploy/testbed"
)

// envRead makes the test's binary the program that reads with the SDK for Go.
const envRead = "AWSCLIENTS_READ"

func TestMain(m *testing.M) {
	if os.Getenv(envRead) != "" {
		if err := read(context.Background(), os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const (
	ttl     = 12 * time.Second // of a lease
	reading = 18 * time.Second // how long each program reads: longer than any lease lives

	content = "what acme wrote"
	catalog = `
agents:
  - {id: "spiffe://acme.test/agent/support", owner: support@acme.test, environment: production}
groups:
  - {name: sre, members: ["spiffe://acme.test/operator/sam"]}
operators: [{group: sre}]
providers:
  - name: minio
    driver: awssts
    config:
      region: us-east-1
      endpoint_url: @URL@
      credentials: {method: key_file, key_file: @KEYS@}
      early_revoke: {mode: minio}
tools:
  - name: crm.export
    provider: minio
    description: Reads the exports of one customer
    max_ttl: 1h
    params: {customer: {type: string, pattern: "[a-z]{1,20}"}}
    scope:
      statements:
        - {Effect: Allow, Action: "s3:GetObject", Resource: "arn:aws:s3:::crm/${params.customer}/*"}
        - {Effect: Allow, Action: "s3:ListBucket", Resource: "arn:aws:s3:::crm"}
`
)

// TestAWSClients: the AWS CLI and boto3 through credential_process and through the
// container endpoint, and the SDKs for Go and JavaScript through the endpoint, list
// and read for longer than a lease lives. By the broker's evidence they share few leases.
func TestAWSClients(t *testing.T) {
	bin := t.TempDir()
	if err := story.Build(t.Context(), "../../..", bin, "mayfly", "mayflyd"); err != nil {
		t.Fatal(err)
	}
	minio := testbed.TestMinIO(t)
	root := open(minio, minio.User, minio.Password, "")
	if _, err := root.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: aws.String("crm")}); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"acme/1", "globex/1"} {
		if _, err := root.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("crm"), Key: &key, Body: strings.NewReader(content)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := story.Tell(t.Context(), bin, func(s *story.Story) error { return tell(t, s, minio) }); err != nil {
		t.Fatal(err)
	}
}

func open(minio *testbed.MinIO, id, secret, token string) *s3.Client {
	return s3.New(s3.Options{Region: "us-east-1", BaseEndpoint: &minio.Addr, UsePathStyle: true, DisableLogOutputChecksumValidationSkipped: true, Credentials: credentials.NewStaticCredentialsProvider(id, secret, token)})
}

func tell(t *testing.T, s *story.Story, minio *testbed.MinIO) error {
	keys := filepath.Join(s.Dir, "keys.json")
	text := strings.NewReplacer("@URL@", minio.Addr, "@KEYS@", keys).Replace(catalog)
	if err := errors.Join(
		os.WriteFile(keys, fmt.Appendf(nil, `{"access_key_id":%q,"secret_access_key":%q}`, minio.User, minio.Password), 0o600),
		os.Mkdir(s.State(), 0o700), os.WriteFile(filepath.Join(s.State(), "catalog.yaml"), []byte(text), 0o600),
		s.StartBroker(),
	); err != nil {
		return err
	}
	if _, err := s.Mayfly("operator/sam", 0, "grant", "create", "--agent", "spiffe://acme.test/agent/support", "--tool", "crm.export",
		"--param", "customer=acme", "--for", "1h", "--reason", "reads"); err != nil {
		return err
	}
	w := world{t: t, s: s, minio: minio, config: filepath.Join(s.Dir, "aws", "config")}
	// What one lease's credentials are worth after its end, so that what comes
	// below is known to be renewal.
	single, err := w.single()
	if err != nil {
		return err
	}
	if _, err := w.mayfly("aws", "configure", "crm.export", "--param", "customer=acme", "--ttl", "12s", "--profile", "crm", "--region", "us-east-1"); err != nil {
		return err
	}
	w.everybodyReads()
	if t.Failed() {
		return nil
	}
	if _, err := readOne(t.Context(), single, "crm", "acme/1"); !denied(err) {
		t.Errorf("the credentials of a lease that ended are worth: %v", err)
	}
	return w.evidence()
}

type world struct {
	t      *testing.T
	s      *story.Story
	minio  *testbed.MinIO
	config string

	mu    sync.Mutex
	reads int
}

// agent is the environment of a program that comes as the agent and has no
// configuration of AWS but ours.
func (w *world) agent(more ...string) []string {
	env := slices.DeleteFunc(w.s.As("agent/support"), func(e string) bool { return strings.HasPrefix(e, "AWS_") })
	env = append(env, "PATH=/usr/bin:"+os.Getenv("PATH")) // the distribution's own AWS CLI and boto3, before any other
	env = append(env, "AWS_CONFIG_FILE="+w.config, "AWS_SHARED_CREDENTIALS_FILE="+filepath.Join(w.s.Dir, "none"), "AWS_EC2_METADATA_DISABLED=true",
		"XDG_RUNTIME_DIR="+w.s.Dir, "HOME="+w.s.Dir)
	return append(env, more...)
}

func (w *world) mayfly(args ...string) ([]byte, error) {
	cmd := exec.CommandContext(w.t.Context(), filepath.Join(w.s.Bin, "mayfly"), args...)
	cmd.Env = w.agent()
	return w.run(cmd)
}

func (w *world) run(cmd *exec.Cmd) ([]byte, error) {
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil || said.Len() > 0 {
		return nil, fmt.Errorf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, out, said.String())
	}
	return out, nil
}

// single is a client with the credentials of one lease, and no other.
func (w *world) single() (*s3.Client, error) {
	out, err := w.mayfly("aws", "credentials", "crm.export", "--param", "customer=acme", "--ttl", "12s", "--no-cache")
	if err != nil {
		return nil, err
	}
	var keys struct{ AccessKeyID, SecretAccessKey, SessionToken string }
	if err := json.Unmarshal(out, &keys); err != nil {
		return nil, errors.New("what credentials prints is no JSON")
	}
	c := open(w.minio, keys.AccessKeyID, keys.SecretAccessKey, keys.SessionToken)
	if got, err := readOne(w.t.Context(), c, "crm", "acme/1"); err != nil || got != content {
		return nil, fmt.Errorf("it read %q: %w", got, err)
	}
	// It is for one customer.
	if _, err := readOne(w.t.Context(), c, "crm", "globex/1"); !denied(err) {
		w.t.Errorf("another customer's object: %v", err)
	}
	return c, nil
}

func denied(err error) bool {
	var e smithy.APIError
	// At its end the session is denied everything, and the broker then has MinIO forget it.
	return errors.As(err, &e) && (e.ErrorCode() == "AccessDenied" || e.ErrorCode() == "InvalidAccessKeyId")
}

// everybodyReads has all programs read at the same time.
func (w *world) everybodyReads() {
	seconds := fmt.Sprint(int(reading.Seconds()))
	mayfly := filepath.Join(w.s.Bin, "mayfly")
	within := []string{mayfly, "aws", "exec", "crm.export", "--param", "customer=acme", "--ttl", "12s", "--region", "us-east-1", "--"}
	self, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	js, err := filepath.Abs("../../../bin/testbed/awsjs/read.mjs")
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := os.Stat(js); err != nil {
		w.t.Fatal("AWS's SDK for JavaScript is not there; run `make testbed-awsjs`")
	}
	python := "python3"
	if _, err := os.Stat("/usr/bin/python3"); err == nil {
		python = "/usr/bin/python3" // whose boto3 is the distribution's
	}
	for _, version := range [][]string{{"sh", "-c", "aws --version"}, {python, "-c", "import boto3; print('boto3', boto3.__version__)"}} {
		cmd := exec.CommandContext(w.t.Context(), version[0], version[1:]...)
		cmd.Env = w.agent()
		if said, err := cmd.CombinedOutput(); err != nil {
			w.t.Fatalf("the AWS CLI and boto3 are needed (apt-get install -y awscli python3-boto3): %v\n%s", err, said)
		} else {
			w.t.Logf("%s", said)
		}
	}
	var all sync.WaitGroup
	for _, program := range []struct {
		name  string
		args  []string
		env   []string
		reads int // at least
	}{
		{"AWS CLI", []string{"sh", "testdata/read.sh", w.minio.Addr, "crm", "acme/1", seconds}, []string{"AWS_PROFILE=crm"}, 2},
		{"boto3", []string{python, "testdata/read.py", w.minio.Addr, "crm", "acme/1", seconds}, []string{"AWS_PROFILE=crm"}, 10},
		{"AWS CLI, endpoint", append(slices.Clone(within), "sh", "testdata/read.sh", w.minio.Addr, "crm", "acme/1", seconds), nil, 2},
		{"boto3, endpoint", append(slices.Clone(within), python, "testdata/read.py", w.minio.Addr, "crm", "acme/1", seconds), nil, 10},
		{"SDK for Go", append(slices.Clone(within), self, "crm", "acme/1", seconds), []string{envRead + "=1", "AWS_ENDPOINT_URL=" + w.minio.Addr}, 20},
		{"SDK for JavaScript, served", append([]string{"sh", "testdata/served.sh", filepath.Join(w.s.Dir, "served"), mayfly}, "node", js, "crm", "acme/1", seconds), []string{"AWS_ENDPOINT_URL=" + w.minio.Addr, "NODE_NO_WARNINGS=1", "AWS_REGION=us-east-1"}, 20},
	} {
		all.Go(func() {
			cmd := exec.CommandContext(w.t.Context(), program.args[0], program.args[1:]...)
			cmd.Env = w.agent(program.env...)
			out, err := w.run(cmd)
			var got readings
			if err == nil {
				err = json.Unmarshal(out, &got)
			}
			if err != nil || got.Content != content || got.Reads < program.reads {
				w.t.Errorf("%s: %d reads of %q: %v", program.name, got.Reads, got.Content, err)
				return
			}
			w.t.Logf("%s: %d reads, each a list and an object", program.name, got.Reads)
			w.mu.Lock()
			w.reads += got.Reads
			w.mu.Unlock()
		})
	}
	all.Wait()
}

// evidence has the broker tell how many leases it were: one at a time for the
// two that share a profile, and for each of the others.
func (w *world) evidence() error {
	cmd := exec.CommandContext(w.t.Context(), filepath.Join(w.s.Bin, "mayfly"), "audit", "list", "--type", "lease.active", "--tool", "crm.export", "--output", "json")
	cmd.Env = w.s.As("operator/sam")
	out, err := w.run(cmd)
	if err != nil {
		return err
	}
	var told struct{ Events []json.RawMessage }
	if err := json.Unmarshal(out, &told); err != nil {
		return err
	}
	made := len(told.Events) - 1 // the single one
	w.t.Logf("%d reads (%d calls of S3) with %d leases of %s, in %s", w.reads, 2*w.reads, made, ttl, reading)
	// Each of five holders needs two at least for the time, and renews an early
	// third of a lease's life at most: no more than one every 4.5 s.
	if made < 10 || made > 25 || w.reads < 5*made {
		w.t.Errorf("%d leases were made for %d reads", made, w.reads)
	}
	return nil
}
