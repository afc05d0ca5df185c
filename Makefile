# Everything that a developer types. `make help` lists it.

SHELL     := /bin/bash
GO        ?= go
BIN       := $(CURDIR)/bin
TOOLS     := $(BIN)/tools
TESTBED   := $(BIN)/testbed
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS   := -s -w -X main.version=$(VERSION)
TEST_ARGS ?=
ARGS      ?=

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build mayfly and mayflyd into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/mayfly ./cmd/mayflyd

.PHONY: demo
demo: build ## The main job, from no access to access and back, on embedded defaults
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/examples/ ./deploy/examples/crm ./deploy/examples/demo
	$(BIN)/examples/demo --bin $(BIN)

.PHONY: demo-vault
demo-vault: build need-postgres $(TESTBED)/vault ## The same with a real Vault and PostgreSQL: a login that is gone at the close
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/examples/ ./deploy/examples/demo-vault
	$(BIN)/examples/demo-vault --bin $(BIN)

.PHONY: torture
torture: need-postgres $(TESTBED)/vault ## Kill the broker under load, and compare; ARGS="--seed 7 --rounds 40 --clients 24"
	@mkdir -p $(BIN)/torture
	CGO_ENABLED=0 $(GO) build -trimpath -tags failpoints -ldflags '$(LDFLAGS)' -o $(BIN)/torture/ ./cmd/mayflyd
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/torture/ ./deploy/torture
	$(BIN)/torture/torture --mayflyd $(BIN)/torture/mayflyd --vault $(TESTBED)/vault $(ARGS)

.PHONY: test
test: need-cc need-postgres $(TESTBED)/vault $(TESTBED)/oidc $(TESTBED)/minio $(TESTBED)/awsjs need-aws testbed-iamsim testbed-terraform testbed-cfn ## Run every test, with the race detector; builds Vault, MinIO and Terraform with its AWS provider once (minutes)
	$(GO) test -race -p 3 -parallel 8 -timeout 15m $(TEST_ARGS) ./... # three packages at once: much of it waits
	$(GO) test -timeout 10m $(TEST_ARGS) -run '^TestStorm$$' ./providers/awssts # whole: too slow with the race detector

.PHONY: need-cc
need-cc:
	@command -v $$($(GO) env CC) >/dev/null || { \
	  echo "make test needs a C compiler for the race detector: apt-get install -y gcc libc6-dev" >&2; exit 1; }

.PHONY: need-postgres
need-postgres:
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || command -v pg_config >/dev/null || { \
	  echo "this needs the PostgreSQL server, and starts its own: apt-get install -y postgresql" >&2; exit 1; }

.PHONY: need-node
need-node:
	@command -v npm >/dev/null && node -e 'process.exit(process.versions.node.split(".")[0] >= 20 ? 0 : 1)' 2>/dev/null || { \
	  echo "this needs Node.js 20 or newer with npm, for the OpenID provider and AWS's SDK of the tests: apt-get install -y nodejs npm" >&2; exit 1; }

.PHONY: need-aws
need-aws:
	@PATH=/usr/bin:$$PATH; command -v aws >/dev/null && python3 -c 'import boto3' 2>/dev/null || { \
	  echo "make test needs the AWS CLI and boto3, as Debian has them: apt-get install -y awscli python3-boto3" >&2; exit 1; }

# The servers that tests, demonstrations and the torture use. Each is pinned in
# a module of its own, and built again when that changes.
.PHONY: testbed testbed-vault testbed-minio testbed-etcd testbed-oidc testbed-awsjs testbed-iamsim testbed-terraform testbed-cfn
testbed: testbed-vault testbed-minio testbed-etcd testbed-oidc testbed-awsjs testbed-iamsim testbed-terraform testbed-cfn ## Build the real servers that tests use: Vault, MinIO, etcd, an OpenID provider; AWS's SDK for JavaScript; and what judges the templates for AWS
testbed-vault: $(TESTBED)/vault
testbed-minio: $(TESTBED)/minio
testbed-etcd: $(TESTBED)/etcd
testbed-oidc: $(TESTBED)/oidc
testbed-awsjs: $(TESTBED)/awsjs
testbed-terraform: $(TESTBED)/terraform $(TESTBED)/terraform-provider-aws
testbed-cfn: $(TESTBED)/cfn

$(TESTBED)/vault: deploy/testbed/vault/main.go deploy/testbed/vault/go.mod deploy/testbed/vault/go.sum
	@GO='$(GO)' deploy/testbed/build vault . $@
$(TESTBED)/minio: deploy/testbed/minio/go.mod deploy/testbed/minio/go.sum
	@GO='$(GO)' deploy/testbed/build minio github.com/minio/minio $@
# The judge of AWS policies: JavaScript, under the AGPL, and only ever a process of its own.
testbed-iamsim: deploy/testbed/iamsim/node_modules/.package-lock.json
deploy/testbed/iamsim/node_modules/.package-lock.json: deploy/testbed/iamsim/package-lock.json
	@command -v npm >/dev/null || { echo "the judge of AWS policies needs Node.js: apt-get install -y nodejs npm" >&2; exit 1; }
	cd deploy/testbed/iamsim && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

$(TESTBED)/etcd: deploy/testbed/etcd/go.mod deploy/testbed/etcd/go.sum
	@GO='$(GO)' deploy/testbed/build etcd go.etcd.io/etcd/server/v3 $@
# For the templates of deploy/aws: the last Terraform under the MPL, and the
# newest AWS provider that there is as a Go module. See docs/aws.md.
$(TESTBED)/terraform: deploy/testbed/terraform/go.mod deploy/testbed/terraform/go.sum
	@GO='$(GO)' deploy/testbed/build terraform github.com/hashicorp/terraform $@
$(TESTBED)/terraform-provider-aws: deploy/testbed/terraform-aws/go.mod deploy/testbed/terraform-aws/go.sum
	@GO='$(GO)' deploy/testbed/build terraform-aws github.com/terraform-providers/terraform-provider-aws $@
$(TESTBED)/cfn: $(addprefix deploy/testbed/cfn/,build package.json package-lock.json .npmrc validate.mjs) | need-node
	@deploy/testbed/cfn/build $@
$(TESTBED)/oidc: $(addprefix deploy/testbed/oidc/,build package.json package-lock.json .npmrc server.mjs) | need-node
	@deploy/testbed/oidc/build $@
$(TESTBED)/awsjs: $(addprefix deploy/testbed/awsjs/,build package.json package-lock.json .npmrc read.mjs) | need-node
	@deploy/testbed/awsjs/build $@

.PHONY: lint
lint: $(TOOLS)/buf $(TOOLS)/staticcheck ## gofmt, vet, staticcheck, buf, and that generated code is fresh
	@files=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$files" || { echo "gofmt: $$files" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags failpoints ./broker/failpoint ./broker/lease ./providers/vault ./cmd/mayflyd
	$(TOOLS)/staticcheck ./...
	$(GO) mod tidy -diff
	cd broker/api && $(TOOLS)/buf lint
	deploy/tools/breaking $(TOOLS)/buf
	deploy/tools/fresh $(MAKE)

.PHONY: generate
generate: $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-connect-go ## Renew generated code and reference pages
	cd broker/api && PATH="$(TOOLS):$$PATH" buf generate
	$(GO) run ./cmd/mayflyd docs docs/reference
	$(GO) run ./cmd/mayfly docs docs/reference

.PHONY: bench
bench: ## Leases a second over mTLS, memory and start time with 100,000 open leases, and policy decisions
	$(GO) test -run '^$$' -bench . -benchtime 3s -timeout 20m ./cmd/mayflyd ./store/bolt ./broker/policy

.PHONY: bench-vault
bench-vault: build need-postgres $(TESTBED)/vault ## Logins a second, and ends of many, beside Vault alone; ARGS="--clients 16 --rounds 4"
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/trials/ ./deploy/trials/speed
	$(BIN)/trials/speed --bin $(BIN) $(ARGS)

.PHONY: outage
outage: build need-postgres $(TESTBED)/vault ## Take Vault away for 10 minutes while 1,000 leases end; ARGS="--away 10m --leases 1000"
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/trials/ ./deploy/trials/outage
	$(BIN)/trials/outage --bin $(BIN) $(ARGS)

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(BIN)

# The tools are pinned in a module of their own, so that what they need is
# none of the product's.
$(TOOLS)/%: deploy/tools/go.mod deploy/tools/go.sum
	@mkdir -p $(TOOLS)
	@echo "building the development tools (once)"
	cd deploy/tools && GOFLAGS=-mod=readonly $(GO) build -o $(TOOLS)/ tool
	@touch $(TOOLS)/*
