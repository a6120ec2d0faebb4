//! The `command` executor: one process of this host per attempt, in a process group of its own.
//!
//! `program.rs` says beforehand why a command cannot start, `spawn.rs` starts it, `group.rs` watches and signals its
//! process group, `ladder.rs` decides when the group must go (TERM, grace, KILL), `capture.rs` turns what it prints
//! into a bounded log (`text.rs` cuts it) and `output.rs` finds the result in its last line.
//!
//! Invariant: when [`run`] returns, nothing of the command's process group is alive, whatever the verdict. A process
//! that left the group (`setsid`, a shell's `set -m`) is out of reach of this module: it neither delays the run nor is
//! it killed with it.

mod capture;
mod group;
mod ladder;
mod output;
mod program;
mod spawn;
#[cfg(test)]
mod tests;
mod text;

use std::time::Duration;

use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use crate::domain::outcome::{Outcome, Verdict};
use crate::domain::run::{LogChunk, StopCause};
use crate::domain::workflow::Command;

use capture::Phase;
use group::Exit;
use ladder::{End, Stop};
use program::StartError;

/// How long the tail of the log may wait for its reader once the command is over and nobody asked it to stop.
const LOG_PATIENCE: Duration = Duration::from_secs(10);
/// The same once the run was told to stop, or is past its time limit: whoever waits wants the slot back.
const LOG_PATIENCE_STOPPED: Duration = Duration::from_millis(500);

/// One attempt to run a command.
pub struct Invocation<'a> {
    /// What to run.
    pub command: &'a Command,
    /// The run, told to the command as `SINGLETRACK_RUN_ID`.
    pub run_id: Uuid,
    /// The full workflow id, told to the command as `SINGLETRACK_WORKFLOW_ID`.
    pub workflow_id: &'a str,
    /// Counted from 1, told to the command as `SINGLETRACK_ATTEMPT`.
    pub attempt: i32,
    /// The fence of this attempt's lease, told to the command as `SINGLETRACK_FENCE`.
    pub fence: i64,
    /// Written to standard input as one line of JSON (`null` where there is none), then end of file.
    pub input: Option<&'a RawValue>,
    /// From the call of [`run`] to the first signal; does not count the time this host is suspended.
    pub time_limit: Duration,
    /// Between TERM and KILL.
    pub kill_grace: Duration,
    /// How much of what the command prints is kept.
    pub limits: Limits,
    /// Asked directly before the process is started: a worker that was frozen until now may have lost the run meanwhile,
    /// before anybody could say so on `stop`.
    pub may_start: &'a (dyn Fn() -> bool + Sync),
}

/// How much of what a command prints is kept. Printing more never fails the command.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of log in total, standard output and error together; the rest is read and dropped.
    pub log_bytes: u64,
    /// Bytes of the last line of standard output that may become the run's output.
    pub output_bytes: usize,
}

/// Runs one attempt to its end and says what became of it. Whatever goes wrong is an [`Outcome`] too.
///
/// The log is sent in the order of arrival, in chunks of at most 16 KiB that end at line ends where possible, invalid
/// UTF-8 and NUL replaced by U+FFFD; `System` is this executor speaking. While `log` is full the command waits on its
/// pipe, when it is closed the log is discarded. The attempt ends early when `stop` holds a cause or the time limit
/// passes, even while `log` is stuck. Must be called on a thread that lives as long as the command (a Tokio worker, not
/// `spawn_blocking`).
///
/// Dropping the future kills the command's process group at once, without waiting for it to be gone.
pub async fn run(
    invocation: Invocation<'_>,
    log: mpsc::Sender<LogChunk>,
    stop: watch::Receiver<Option<StopCause>>,
) -> Outcome {
    let time_limit = invocation.time_limit;
    let mut stop = Stop::new(stop, time_limit);
    let started = tokio::select! {
        biased;
        cause = stop.requested() => return stopped(cause, None, None, time_limit),
        started = spawn::start(&invocation) => started,
    };
    let started = match started {
        Ok(started) => started,
        Err(StartError::TooLate) => return stopped(StopCause::Unrenewed, None, None, time_limit),
        Err(error) => return failed(None, None, error.to_string()),
    };

    let (phase, phases) = watch::channel(Phase::Running);
    let feeding = spawn::feed(started.stdin, invocation.input, phases.clone());
    let capturing = capture::capture(started.stdout, started.stderr, log, invocation.limits, phases);
    let supervising = async move {
        let end = ladder::see_out(started.group, &mut stop, invocation.kill_grace).await;
        // Everybody may have stopped listening already, which is fine.
        let _ = phase.send(Phase::Draining);
        tokio::select! {
            () = phase.closed() => {}
            () = patience(&end, &mut stop) => { let _ = phase.send(Phase::Abandoned); }
        }
        end
    };
    // One future for all three: a flood in one cannot keep the others from being polled (Tokio's budget makes it
    // yield), and dropping it drops the process with it.
    let (end, output, ()) = tokio::join!(supervising, capturing, feeding);
    conclude(end, output, time_limit)
}

/// Ends when the tail of the log has had its time. Without it a stuck log reader would hold the slot for ever.
async fn patience(end: &End, stop: &mut Stop) {
    if end.cause.is_none() {
        tokio::select! {
            _ = stop.requested() => {}
            () = tokio::time::sleep(LOG_PATIENCE) => return,
        }
    }
    tokio::time::sleep(LOG_PATIENCE_STOPPED).await;
}

fn conclude(end: End, output: Option<Value>, time_limit: Duration) -> Outcome {
    let exit_code = match end.exit {
        Exit::Code(code) => Some(code),
        Exit::Signal(_) | Exit::Unknown => None,
    };
    match (end.cause, end.exit) {
        // A program that heeds TERM usually exits 0 with its work half done: after a stop that is no success.
        (Some(cause), _) => stopped(cause, exit_code, output, time_limit),
        (None, Exit::Code(0)) => Outcome { verdict: Verdict::Succeeded, reason: None, exit_code, output, error: None },
        (None, exit) => failed(exit_code, output, exit.to_string()),
    }
}

fn failed(exit_code: Option<i32>, output: Option<Value>, error: String) -> Outcome {
    Outcome { verdict: Verdict::Failed, reason: None, exit_code, output, error: Some(error) }
}

fn stopped(cause: StopCause, exit_code: Option<i32>, output: Option<Value>, time_limit: Duration) -> Outcome {
    let (verdict, reason, error) = match cause {
        StopCause::Timeout => {
            let limit = time_limit.as_secs_f64();
            (Verdict::TimedOut, "timeout", format!("ran longer than its time limit of {limit} s"))
        }
        StopCause::Cancel => (Verdict::Cancelled, "requested", "cancelled on request".to_owned()),
        StopCause::Shutdown => (Verdict::Stale, "shutdown", "stopped because its worker shut down".to_owned()),
        StopCause::Unrenewed => {
            (Verdict::Stale, "worker_lost", "stopped because its worker could not renew the lease".to_owned())
        }
        StopCause::LeaseLost => (Verdict::Stale, "worker_lost", "killed because its worker lost the lease".to_owned()),
    };
    Outcome { verdict, reason: Some(reason.to_owned()), exit_code, output, error: Some(error) }
}
