//! A Postgres of our own, for `singletrack dev` and the tests: found, made, started, and gone when we are.
//!
//! Everything here blocks; callers in async code go through `spawn_blocking`.
//!
//! - `find`: which of the installed Postgres to use
//! - `account`: who runs it, since Postgres refuses root
//! - `place`: where data, log, lock and socket go when the obvious folder will not do
//! - `cluster`: a whole data folder or none, and nobody else's server on it
//! - `process`: the server as a child that cannot outlive us
//! - `postgres`: what callers see

mod account;
mod cluster;
mod find;
mod place;
mod postgres;
mod process;

pub(crate) use account::die_with_us;
pub use postgres::{Options, Postgres};
