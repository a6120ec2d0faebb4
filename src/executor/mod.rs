//! Executors: each turns the specification of one attempt into an [`Outcome`](crate::domain::outcome::Outcome).
//!
//! An executor knows nothing of the database, of leases or of retries: it is told what to run, where to send the log
//! and how it will be told to stop, and it answers with what became of the attempt.

pub mod command;
