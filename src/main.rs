//! The binary: parse the command line, run one command, map its result to an exit code.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    singletrack::cli::run(singletrack::cli::Cli::parse())
}
