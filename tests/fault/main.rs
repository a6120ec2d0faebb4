//! The fault suite: real processes, real kills, and an exact account of what became of every run.
//!
//! Three replicas, pull workers, a program with handlers, commands behind their guards and clients work on one durable Postgres,
//! while [`faults`] happen to all of them, alone and together. Everybody writes down what they did and were told ([`journal`]);
//! afterwards [`account`] compares that with what the database says ([`history`]), run by run. [`controls`] takes a mechanism away,
//! and the same account must notice.
//!
//! [`beside`] has the version before work beside this one, on a database that this one migrates beneath it.
//!
//! As a part of `make test` it is a smoke of two minutes. `make fault` is the whole of it; `SEED=7` is one seed, whose faults and
//! requests are the same again, `SEEDS=20` how many, `MINUTES=5` how long each. One more seed is played with a pgbouncer in session mode
//! between the proxies and the server, where there is one; with `POOLER=1` all are.

#![allow(unreachable_pub, clippy::unwrap_used, missing_docs)]

mod account;
mod beside;
mod client;
mod cluster;
mod command;
mod controls;
#[allow(dead_code, reason = "what it counts is for its own tests")]
mod disk;
mod faults;
mod handlers;
mod history;
mod http;
mod journal;
mod members;
#[allow(dead_code, reason = "some of it is for the tests of poolers")]
#[path = "../it/support/pgbouncer.rs"]
mod pgbouncer;
#[allow(dead_code, reason = "some of it is for its own tests")]
mod proxy;
mod roles;
mod seed;
mod statements;
mod suite;
mod wire;
mod worker;
mod workflows;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [argument, role] if argument == roles::ARGUMENT => {
            serde_json::from_str::<roles::Role>(role).expect("a role").play()
        }
        // As `cargo test NAME` calls each test program: others are meant.
        [name, ..] if !name.starts_with('-') && !"fault smoke beside".contains(name.as_str()) => ExitCode::SUCCESS,
        [argument, ..] if argument == "--list" => ExitCode::SUCCESS,
        [name, ..] if name == "beside" => suite::main(suite::versions_alone),
        _ => suite::main(suite::all),
    }
}
