# Everything that a developer types. `make help` lists it.

SHELL     := /bin/bash
GO        ?= go
BIN       := $(CURDIR)/bin
TOOLS     := $(BIN)/tools
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS   := -s -w -X main.version=$(VERSION)
TEST_ARGS ?=

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build mayfly and mayflyd into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/mayfly ./cmd/mayflyd

.PHONY: demo
demo: build ## The main job, from no access to access and back, on embedded defaults
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/examples/ ./deploy/examples/crm ./deploy/examples/demo
	$(BIN)/examples/demo --bin $(BIN)

.PHONY: test
test: need-cc ## Run every test, with the race detector
	$(GO) test -race -parallel 8 -timeout 15m $(TEST_ARGS) ./...

.PHONY: need-cc
need-cc:
	@command -v $$($(GO) env CC) >/dev/null || { \
	  echo "make test needs a C compiler for the race detector: apt-get install -y gcc libc6-dev" >&2; exit 1; }

.PHONY: lint
lint: $(TOOLS)/buf $(TOOLS)/staticcheck ## gofmt, vet, staticcheck, buf, and that generated code is fresh
	@files=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$files" || { echo "gofmt: $$files" >&2; exit 1; }
	$(GO) vet ./...
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
bench: ## Leases a second over mTLS, memory and start time with 100,000 open leases
	$(GO) test -run '^$$' -bench . -benchtime 3s -timeout 20m ./cmd/mayflyd ./store/bolt

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
