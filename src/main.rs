//! The binary: parse the command line, run one command, map its result to an exit code.

use std::process::ExitCode;

use clap::Parser as _;
use nix::sys::signal::SigSet;
use singletrack::cli::{self, Cli};
use singletrack::executor::command::guard;

/// Of a request's time in this process a seventh goes to the allocator of the C library.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    if let Some(done) = guard::run_if_asked(std::env::args_os()) {
        return done;
    }
    // Whoever started this may have blocked signals, and then nobody would hear of TERM. Before there are other threads.
    let _ = SigSet::empty().thread_set_mask();
    match Cli::try_parse() {
        Ok(cli) => cli::run(cli),
        Err(answer) => {
            // Help and version are no mistakes, and go to standard output. Where nobody reads it, nothing is left to say.
            let _ = answer.print();
            if answer.use_stderr() { ExitCode::from(cli::USAGE) } else { ExitCode::SUCCESS }
        }
    }
}
