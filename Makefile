# A recipe sees the Rust of rustup even where no login shell has put it on PATH, and Debian's servers without being root.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin

.DEFAULT_GOAL := help
.PHONY: help run test fuzz schemathesis fault bench screenshots prepare lint

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1	\2/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

run: ## build and start everything, with a Postgres of its own (ARGS="--help": what dev takes)
	@.ci/tools cargo cc
	@.ci/postgres >/dev/null
	@cargo build --release --locked
	@SINGLETRACK_PG_BIN=$$(.ci/postgres) && export SINGLETRACK_PG_BIN && exec target/release/singletrack dev $(ARGS)

test: ## every test, against a Postgres of its own (PG=18: of that version; TESTARGS: for cargo test)
	@.ci/tools cargo cc
	@.ci/tools curl jq python3 faketime pgbouncer promtool chromedriver npm slowhttptest || [ -z "$$CI" ] # what is tested with them is skipped without them
	@[ -z "$$DATABASE_URL" ] || echo "DATABASE_URL is ignored: the tests start a Postgres of their own"
	@SINGLETRACK_PG_BIN=$$(.ci/postgres $(PG)) && export SINGLETRACK_PG_BIN && unset DATABASE_URL && \
		exec cargo test --locked $(TESTARGS)

schemathesis: ## two minutes of requests made from the OpenAPI document, to see that every answer is in it (SEED=7, SECONDS_OF_IT=600)
	@SEED=$(SEED) SECONDS_OF_IT=$(SECONDS_OF_IT) tests/schemathesis/run

fuzz: ## a minute of any input for each reader of what strangers send (SECONDS_OF_IT=600)
	@.ci/tools cargo cc
	@BOLERO_RANDOM_TEST_TIME_MS=$$(( $(or $(SECONDS_OF_IT),60) * 1000 )) cargo test --locked --lib --test it fuzz::

fault: ## the long fault suite: 20 seeds, a minute each, and one by a pooler (SEED=7: that one alone, SEEDS=5, MINUTES=10, PG=18, POOLER=1: all, EARLIER=48ce59d)
	@.ci/tools cargo cc faketime setpriv pgbouncer
	@cargo build --release --locked --features unfenced && cp target/release/singletrack target/release/singletrack-unfenced
	@SINGLETRACK_PG_BIN=$$(.ci/postgres $(PG)) && export SINGLETRACK_PG_BIN && unset DATABASE_URL && \
		FAULT_EARLIER=$$(EARLIER=$(EARLIER) .ci/earlier build) && export FAULT_EARLIER && \
		FAULT_LONG=1 FAULT_UNFENCED=$$PWD/target/release/singletrack-unfenced SEED=$(SEED) SEEDS=$(SEEDS) MINUTES=$(MINUTES) POOLER=$(POOLER) \
		cargo test --release --locked --test fault

bench: ## how fast it is, beside bare SQL (BENCH=drain: one measure, or several by commas; REPS=3, SECONDS=5, HISTORY=1000000, MINUTES=2, PG=18)
	@.ci/tools cargo cc
	@[ -z "$$DATABASE_URL" ] || echo "DATABASE_URL is ignored: the benchmark starts a Postgres of its own"
	@SINGLETRACK_PG_BIN=$$(.ci/postgres $(PG)) && export SINGLETRACK_PG_BIN && unset DATABASE_URL && \
		REPS=$(REPS) SECONDS=$(SECONDS) RUNS=$(RUNS) MINUTES=$(MINUTES) HISTORY=$(HISTORY) IDLE_SECONDS=$(IDLE_SECONDS) \
		cargo bench --locked --bench bench -- all $(BENCH)

screenshots: ## pictures of every screen of the dashboard, into target/screenshots/
	@.ci/tools cargo cc chromedriver
	@SINGLETRACK_PG_BIN=$$(.ci/postgres $(PG)) && export SINGLETRACK_PG_BIN && unset DATABASE_URL && \
		cargo test --locked --test it dashboard::pictures -- --ignored

prepare: ## write sqlx-data.json anew, after a change of a query or a migration
	@.ci/prepare

lint: ## formatting and clippy
	@.ci/tools cargo cc
	@cargo fmt --check
	@cargo clippy --locked --all-targets -- -D warnings
