//! Singletrack runs each workflow **at most once at a time**. POST a run: 202 and its id. Is one already in progress:
//! 409 and *that* run's id. Any number of replicas share one Postgres, and nothing else is needed.
//!
//! This page is the map. The promise is two partial unique indexes on `test_runs`: one `running` row per workflow, and one
//! `queued` or `running` row, so that the refusal is given at enqueue. The slot *is* the row; there is no lock, no map in
//! memory, nothing that can leak. Everything else here keeps what is around that row honest.
//!
//! # One run, from the request to its end
//!
//! 1. `POST /api/v1/workflows/{id}/runs` reaches [`api`], which parses and hands the request to [`store::enqueuer`]: while one statement
//!    is in flight requests gather, and the next takes all of them. It looks for holders, inserts where there is none, and writes the
//!    first events; who asks for a slot that somebody else in it asked for first is told of that one's holder. [`store::batch`] repeats
//!    what got lost and takes apart what is blocked. 202 is answered after the commit, which also notifies the other replicas.
//! 2. The dispatcher of some replica ([`engine::dispatcher`]) claims it ([`store::claim`]): `FOR UPDATE SKIP LOCKED`, up to
//!    the replica's free capacity, with a new fence and a secret. Together they are the [`domain::Lease`].
//! 3. One attempt (`engine/attempt.rs`) has an [`executor`] do the work and stores the log: a command behind its guard, a
//!    request, or a handler of the program this is embedded in. [`engine::heartbeat`] renews the lease in `run_leases`, on a
//!    connection of its own.
//! 4. The attempt's [`domain::Outcome`] is settled under the lease ([`store::settle`], gathered by [`store::settler`]): the run becomes final and the slot is
//!    free, or it is queued for its next attempt and keeps the slot; attempt and event are written by the same statement.
//!    What an end comes to is one table, [`domain::status`].
//! 5. Somebody cancels it ([`store::control`]): the request is a column of the row; a notification, which may get lost, makes
//!    the worker renew at once ([`engine::listener`]), and the answer to the renewal says that the run is to end.
//! 6. If the worker is lost, the reaper of any replica ([`engine::reaper`]) first shuts its claim out of `run_leases`
//!    ([`store::reap`]) and then settles the run as `stale`, down the same path.
//!
//! A slot that is taken need not end in a 409: a request may wait for it, join the run that has it, or replace that one, now or later.
//! What takes more than one look (`enqueue_run_as` in `migrations/`) keeps the holder's row locked until the new run can be seen to
//! wait, and a trigger of whoever frees the slot hands it on in the same transaction; so nobody is stranded, and `enqueue_run` in
//! somebody's SQL answers as the API does. [`engine::sweeper`] starts what is due and is the net.
//!
//! A tick of a schedule makes its run by the same function of the database as an enqueue; the scheduler of any replica
//! ([`engine::scheduler`]) moves the schedule on in the same statement. [`domain::schedule`] knows the calendar.
//!
//! A run of the executor `pull` goes the same way, with a worker somewhere else in steps 2 to 4: it claims over HTTP, sends its
//! heartbeats, and settles under the lease that its token names (`api/claims.rs`, `api/leases.rs`; `examples/` has two such
//! workers). Its first heartbeat confirms the lease; without that the reaper gives the run back.
//! A run that an http target took over (202) is finished over the same routes; `run_leases.held_until` says by when.
//!
//! What is refused writes nothing. `api/refusals.rs` counts it, and `api/notes.rs` has the counts written down, as the last thing
//! a stopping replica does. What a refusal says of the holder comes from the view `slot_holders`; [`engine::presence`],
//! `api/presence.rs` and [`engine::chores`] keep what that one reads: who asks for runs, and how long they usually take.
//!
//! What is periodic looks before it acts, all of it by one statement ([`engine::lookout`]): an idle replica asks the database little. What
//! has been over for `SINGLETRACK_RETENTION` is deleted ([`engine::retention`]), and of snapshots that keep dead rows in the way a
//! replica warns ([`engine::pins`]).
//!
//! Where the database has several servers, `store/servers.rs` finds the primary, for every connection of ours, and again after a
//! failover; a pooler on the way to it that shares connections is refused at start ([`store::pooler`]).
//!
//! Who sends a request, and what they may, is for `api/auth.rs` to say: all good keys are in memory for some seconds, the route table in
//! `api/mod.rs` has each route's scope, and what a key that is bound to workflows does not see is left out by the SQL of lists and claims.
//! [`app::keys`] makes the first one; `audit_log` has what is changed besides runs.
//!
//! # A worker in your own program
//!
//! [`embed`] runs [`Handlers`], which are async functions, as the service runs commands; a [`Context`] is what such a function
//! knows of its run, and [`executor::handler`] says what it has to heed. [`config::Settings`] become the [`config::Config`],
//! [`Stop`] ends it. Workflows are defined and runs are started by any program: over HTTP, or with [`store::workflows::put`] and
//! a [`Client`], which gathers as the API does. `examples/embedded.rs` does all of it.
//!
//! # Where things live
//!
//! | module | what it is | may use |
//! |---|---|---|
//! | [`config`], [`telemetry`] | settings from flags and environment; the service's own log | domain, executor, config |
//! | [`traces`] | attempts as spans, sent over OTLP where that is asked for; anybody may tell of one | domain, tls |
//! | [`metrics`] | what the process counts, for Prometheus; anybody may count | nothing of ours |
//! | `tls` | whose certificates are trusted where we call somebody | nothing of ours |
//! | [`domain`] | pure values and decisions: [`domain::status`] has the one table of transitions | nothing of ours |
//! | [`store`] | all SQL: free functions over a connection, long statements in `store/sql/` | domain |
//! | [`executor`] | turns a spec into an outcome; knows no database and no retries | domain, tls |
//! | [`engine`] | what happens unasked: passes, and the loops that repeat them | domain, store, executor, config |
//! | [`api`] | the only place that knows HTTP: `api/mod.rs` has every route on one screen | domain, store |
//! | [`ui`] | the dashboard's files, which are in the binary and use nothing but the API over HTTP | nothing of ours |
//! | [`dev`] | the private Postgres of `singletrack dev` and of the tests | nothing of ours |
//! | [`app`] | composition root: wires the parts, and stops them in order; [`app::doctor`] judges what `store/doctor` finds | all |
//! | [`cli`] | the commands of the binary; its client half speaks HTTP, never the store | app, config, dev, domain, telemetry, tls |
//!
//! `migrations/` has the schema, the triggers that refuse what must not happen by hand, and the views for people.
//!
//! # Invariants
//!
//! - Per workflow id at most one row is `running`, and at most one holds the slot. Postgres has nowhere to put a second.
//! - Every write out of `running` names id, status and fence. Zero rows means that the lease is lost, and that is a variant
//!   the caller must match ([`store::settle::Settled::Lost`]).
//! - A final row never changes. Fences only grow.
//! - A renewal and the reaper meet on the same `run_leases` row: no worker is told that it holds what the reaper has ended.
//! - Whoever settles waits for nobody's lock: a run that somebody has locked is tried again by itself, and delays no other.
//! - Renewals lock nothing but `run_leases`: whoever locks a run by hand costs nobody a lease.
//! - When the worker of a command settles its attempt, nothing is alive that the command has started. Its guard ends it in time
//!   for the reaper also when that worker is dead or frozen ([`executor::command::guard`]).
//! - A run waits behind a holder that knows it (`has_waiters`), or behind a pause; both are locked while it gets in line.
//! - Times are the database's. A replica's clock decides nothing that another replica sees.
//! - `api` and `engine` never meet: rows and wake-ups are between them, and a lost wake-up costs latency only.
//! - As soon as there is a key, every request needs one; rows of `api_keys` are never deleted.
//! - Only `store` has SQL. Only [`store::Db::with`] hands out connections, with a limit on what is done with them.
//!
//! `invariant_violations`, a view, has as queries those of them that rows can show, and [`app::doctor`] looks at them, at the schema and
//! at the server. It sees no processes: that no two commands
//! overlap is proved from outside, by the tests.
//!
//! # How it is proved
//!
//! `tests/model` says what is promised as a pure function over [`domain::status`]. `tests/it/properties` compares it with the service,
//! `tests/checker` looks at every state it can reach with crashes, pauses and lost answers, and `tests/fault` runs real processes
//! through real faults and accounts for every run. `docs/reliability.md` is about all of it.

pub mod domain;

pub mod store;

pub mod executor;

pub mod engine;

pub mod api;

pub mod app;
pub mod config;
pub mod metrics;
pub mod telemetry;
pub(crate) mod tls;
pub mod traces;

pub mod cli;
pub mod dev;
pub mod ui;

pub use app::{Client, Stop, embed};
pub use executor::handler::{Context, Handlers};
