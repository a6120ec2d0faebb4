//! Executors: each turns the specification of one attempt into an [`Outcome`](crate::domain::outcome::Outcome).
//!
//! An executor knows nothing of the database, of leases or of retries: it is told what to run, where to send the log
//! and how it will be told to stop, and it answers with what became of the attempt.
//!
//! What they share: `stop.rs` is what ends an attempt from outside, `log.rs` its bounded log, `text.rs` cuts that log
//! from bytes, `output.rs` finds the object that an attempt hands back.

pub mod boottime;
pub mod command;
pub mod handler;
pub mod http;
pub mod open_files;

mod log;
mod output;
mod stop;
mod text;
