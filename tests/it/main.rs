//! One test binary: `support/` first, then one file per resource, loop or promise. Test names are sentences.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and its name is its documentation"
)]

mod support;

#[path = "../model/mod.rs"]
mod model;

mod abuse;
mod access;
mod access_matrix;
mod apply;
mod bulk;
mod by_hand;
mod by_sql;
mod cancel;
mod cancelling;
mod claims;
mod cli;
mod commands;
mod crowds;
mod dashboard;
mod definitions;
mod demo;
mod dev;
mod docs;
mod doctor;
mod embedded;
mod enqueue;
mod events;
mod examples;
mod executor;
mod executor_definitions;
mod expiry;
mod fault_parts;
mod fences;
mod following;
mod fuzz;
mod gathering;
mod guard;
mod guards;
mod handlers;
mod handover;
mod heartbeats;
mod hints;
mod holders;
mod http;
mod idle;
mod keys;
mod later;
mod leases;
mod legacy;
mod metrics;
mod migrating;
mod openapi;
mod outage;
mod pauses;
mod pins;
mod plans;
mod policies;
mod pooler;
mod printing;
mod problems;
mod properties;
mod pull;
mod pull_leases;
mod races;
mod reading;
mod reaper;
mod refusals;
mod replacing;
mod replicas;
mod reruns;
mod retention;
mod retry;
mod roles;
mod runs;
mod safety;
mod schedules;
mod schema;
mod settings;
mod shutdown;
mod slots;
mod sqlx_data;
mod standby;
mod storm;
mod strays;
mod tidy;
mod tls;
mod traces;
mod transitions;
mod views;
mod waiting;
mod workers;
mod workflows;
