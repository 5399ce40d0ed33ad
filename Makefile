# Every chore of this repository. CI runs `make test`, and nothing else.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The lock file is part of the source: a build never changes it.
CARGO := cargo
FLAGS := --release --locked
TARGET := target/x86_64-unknown-linux-gnu/release
WRENN := $(TARGET)/wrenn
PYTHON := target/python/installed
NODE := target/node/installed

# `make run DATA_DIR=… LISTEN=…`, and `ONCE=1` to end after the first program.
DATA_DIR ?= /var/lib/wrenn
LISTEN ?= 127.0.0.1:3000
ONCE ?=

# Tests that start virtual machines need root; the rest of the build does not.
ifneq ($(shell id -u),0)
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER := sudo --preserve-env
endif

.PHONY: help run build test test-long e2e check fmt fmt-check lint python node fuzz proto guarantees deny clean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

run: ## Set everything up, start the server and run a first program (ONCE=1: then end)
	@DATA_DIR='$(DATA_DIR)' LISTEN='$(LISTEN)' ONCE='$(ONCE)' WRENN='$(WRENN)' MAKE='$(MAKE)' scripts/run.sh

# The programs for the guest first: `wrenn` carries them inside itself. Always with
# --workspace, also for one binary, so that cargo unifies the features of dependencies in
# one way only and what one target has compiled the next need not compile again.
build: ## Build `wrenn` and the programs inside it
	$(CARGO) build $(FLAGS) --workspace --bin envd --bin wrenn-init
	$(CARGO) build $(FLAGS) --workspace --bin wrenn

test: packages-test build python node fmt-check lint ## Install what tests need and run all of them, real VMs included
	$(CARGO) test $(FLAGS) --workspace --no-fail-fast

test-long: export WRENN_TEST_LONG := 1
test-long: test ## The same with the long forms: 1,000 cycles instead of 50, and so on

e2e: build python node ## Only the tests end to end (ONLY=name: those whose name has it)
	$(CARGO) test $(FLAGS) --workspace --test e2e -- $(ONLY)

# Seconds for each target.
FUZZ_SECONDS ?= 15
fuzz: packages-test ## Feed the parsers with nonsense (FUZZ_SECONDS=3600: for longer)
	scripts/fuzz.sh $(FUZZ_SECONDS)

check: fmt-check lint ## Formatting and lints, the quick half of `make test`

fmt: ## Format the code
	$(CARGO) fmt --all

fmt-check:
	$(CARGO) fmt --all --check

lint:
	$(CARGO) clippy $(FLAGS) --workspace --all-targets -- --deny warnings

python: $(PYTHON) ## E2B's published client in a folder of its own

$(PYTHON): tests/python/requirements.txt
	rm -rf target/python
	/usr/bin/python3 -m venv target/python
	target/python/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	target/python/bin/pip check --disable-pip-version-check
	touch $@

node: $(NODE) ## Node.js and E2B's published client for it, in a folder of their own

# Node.js comes as a Python package: Debian 12 has none that is new enough.
$(NODE): tests/node/requirements.txt tests/node/package.json tests/node/package-lock.json
	rm -rf target/node
	/usr/bin/python3 -m venv target/node/python
	target/node/python/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	cp tests/node/package.json tests/node/package-lock.json target/node/
	PATH="$(CURDIR)/target/node/python/bin:$$PATH" npm ci --prefix target/node --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@

proto: packages-proto ## Renew proto/descriptors.bin from proto/**.proto
	protoc -Iproto -I/usr/include --include_imports --include_source_info \
		--descriptor_set_out=proto/descriptors.bin \
		process/process.proto filesystem/filesystem.proto host/host.proto

guarantees: ## Renew the table of docs/guarantees.md from the names of tests
	WRENN_UPDATE_DOCS=1 $(CARGO) test $(FLAGS) --workspace --test policy -- the_table_of_guarantees

# Licences, sources and bans are held by crates/e2e/tests/policy.rs in every `make test`.
# This adds known vulnerabilities, for which cargo-deny fetches a database: not in CI,
# which reaches package registries only.
deny: ## Check dependencies with cargo-deny, advisories included (needs the internet)
	@command -v cargo-deny >/dev/null || { echo 'cargo-deny is not installed: cargo install --locked cargo-deny' >&2; exit 1; }
	cargo-deny --locked check

clean: ## Remove everything that was built, the tests' data included
	$(CARGO) clean

packages-%:
	@scripts/packages.sh $*
