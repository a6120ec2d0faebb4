//! `make bench`: what Singletrack does in a second, beside what bare SQL does on the same Postgres in the same minutes.
//!
//! [`measures`] has one file per measure; each repetition has a new database on a durable Postgres of our own ([`server`]) and comes
//! right after its floor ([`floor`]). Load comes from this process ([`http`]), what is measured are others ([`process`]): the
//! service as it is built, and this program as a worker ([`worker`]). [`parts`] are for a harness that measures other systems too.

#![allow(unreachable_pub, missing_docs)]

mod floor;
mod http;
mod machine;
mod measures;
mod parts;
mod process;
mod report;
mod server;
mod worker;
mod workflows;

use std::process::ExitCode;

use anyhow::Result;
use tokio::runtime::Builder;

fn main() -> ExitCode {
    // Cargo adds `--bench`, to `cargo test --benches` nothing.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match &arguments[..] {
        [] => {
            eprintln!("{}\n\n{}", measures::USAGE, parts::USAGE);
            return ExitCode::SUCCESS;
        }
        ["all", names @ ..] => all(names),
        part => one(part),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One thread is enough for the load, and leaves the other core to what is measured.
fn all(names: &[&str]) -> Result<()> {
    Builder::new_current_thread().enable_all().build()?.block_on(measures::run(names))
}

fn one(part: &[&str]) -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let answer = Builder::new_multi_thread().enable_all().build()?.block_on(parts::run(part))?;
    println!("{answer}");
    Ok(())
}
