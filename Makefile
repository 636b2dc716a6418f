# Two commands matter: `make demo` and `make test`. All state lies under target/.
SHELL := /bin/bash
export CARGO_TARGET_DIR ?= $(CURDIR)/target
# The Postgres that the extension is built for, and that `make install` installs into.
export PG_CONFIG ?= /usr/lib/postgresql/15/bin/pg_config
export PATH := $(CARGO_TARGET_DIR)/tools/bin:$(HOME)/.cargo/bin:$(PATH)
# pgrx's own settings, kept apart from the user's.
export PGRX_HOME := $(CARGO_TARGET_DIR)/pgrx
export PGRX_BUILD_FLAGS := --locked --ignore-rust-version
CARGO_FLAGS := --release --locked --ignore-rust-version
EXTENSION_SOURCES = $(shell find fdw proto -type f) Cargo.lock Cargo.toml

.PHONY: help setup build server server-cuda extension install test soak demo fuzz check bench clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## Install what is missing: Debian packages, cargo-pgrx
	scripts/setup

build: server extension $(if $(CUDA),server-cuda) ## Build the server and the extension; with CUDA=1 for GPUs too

server: setup
	cargo build $(CARGO_FLAGS) -p compute-server

server-cuda: server
	scripts/build-cuda $(CARGO_FLAGS)

extension: setup $(CARGO_TARGET_DIR)/package/.complete

$(CARGO_TARGET_DIR)/package/.complete: $(EXTENSION_SOURCES)
	scripts/package-extension

install: build ## Install the extension into the Postgres of PG_CONFIG
	scripts/install-extension "$(PG_CONFIG)"

test: build ## Run every test, the end-to-end tests on a private cluster included
	scripts/test $(CARGO_FLAGS)

soak: build ## Run many clients for SOAK_SECONDS (300), and abandon SOAK_SCANS (1000000) scans
	scripts/soak $(CARGO_FLAGS)

demo: build ## Show the whole of it in SQL, on a private cluster and server
	scripts/demo

fuzz: setup ## Run every fuzzer for a minute (FUZZ_SECONDS)
	scripts/fuzz

check: setup ## Check format, lints, documentation, protocol, scripts and deployment files
	scripts/check $(CARGO_FLAGS)

bench: build ## Measure, in turn with PyTorch where it can be installed
	scripts/bench

clean: ## Remove everything built
	cargo clean
