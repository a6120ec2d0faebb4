//! The `command` executor: one process of this host per attempt, under a guard that leaves nothing of it behind.
//!
//! `spawn.rs` starts a guard ([`guard`], a process of its own) and hands it the command, `follow.rs` tells it when the run
//! must end and watches it, `orphans.rs` cleans up after a guard that died. `capture.rs` turns what the command prints into a
//! bounded log and `output.rs` finds the result in its last line.
//!
//! Invariant: when [`run`] returns, nothing that the command has started is alive, whatever the verdict, also what left its
//! process group or session. Only a guard that is [`Off`](guard::Mode::Off) breaks it.

mod capture;
mod exit;
mod follow;
pub mod guard;
mod orphans;
mod output;
mod processes;
mod spawn;

use std::time::Duration;

use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::boottime::Boottime;
use crate::domain::executor::Command;
use crate::domain::outcome::{Outcome, Verdict};
use crate::domain::run::{LogChunk, StopCause};
use crate::executor::stop::{Stop, stopped};

use capture::Phase;
use exit::Exit;
use follow::End;
pub use spawn::Guarding;
use spawn::{Guard, Pipes, StartError};

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
    /// Where the attempt stands in a trace, told to the command as `TRACEPARENT`.
    pub traceparent: Option<&'a str>,
    /// Written to standard input as one line of JSON (`null` where there is none), then end of file.
    pub input: Option<&'a RawValue>,
    /// From the call of [`run`] to the first signal; does not count the time this host is suspended.
    pub time_limit: Duration,
    /// Between TERM and KILL.
    pub kill_grace: Duration,
    /// How much of what the command prints is kept, unless the command itself says otherwise.
    pub limits: Limits,
    /// Who watches over it.
    pub guarding: &'a Guarding,
    /// Until when the lease is good, moved by each renewal: nothing is started after it, and the guard ends by itself what
    /// runs longer.
    pub end_by: watch::Receiver<Boottime>,
    /// Asked directly before the guard is told to start: the worker may have lost the run meanwhile, before anybody could say
    /// so on `stop`.
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
/// `spawn_blocking`). It makes this process a subreaper: when a guard is lost, what this process's first thread has started
/// meanwhile, in a group of its own, is taken for something the guard has left behind, and killed.
///
/// Dropping the future has everything of the run killed at once, without waiting for it to be gone.
pub async fn run(
    invocation: Invocation<'_>,
    log: mpsc::Sender<LogChunk>,
    stop: watch::Receiver<Option<StopCause>>,
) -> Outcome {
    let time_limit = invocation.time_limit;
    let mut stop = Stop::new(stop, time_limit);
    let (guard, pipes) = match start(&invocation, &mut stop).await {
        Ok(started) => started,
        Err(outcome) => return outcome,
    };
    let of_the_command = invocation.command.limits;
    let limits = Limits {
        log_bytes: of_the_command.log_bytes.unwrap_or(invocation.limits.log_bytes),
        output_bytes: of_the_command
            .output_bytes
            .map_or(invocation.limits.output_bytes, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX)),
    };

    let (phase, phases) = watch::channel(Phase::Running);
    let feeding = spawn::feed(pipes.stdin, invocation.input, phases.clone());
    let capturing = capture::capture(pipes.stdout, pipes.stderr, log, limits, phases);
    let supervising = async move {
        let end = follow::see_out(guard, &mut stop, invocation.end_by, invocation.kill_grace).await;
        // Everybody may have stopped listening already, which is fine.
        let _ = phase.send(Phase::Draining);
        tokio::select! {
            () = phase.closed() => {}
            () = patience(&end, &mut stop) => { let _ = phase.send(Phase::Abandoned); }
        }
        end
    };
    // One future for all three: a flood in one cannot keep the others from being polled (Tokio's budget makes it
    // yield), and dropping it drops the guard with it.
    let (end, output, ()) = tokio::join!(supervising, capturing, feeding);
    conclude(end, output, time_limit)
}

/// Starts the command under a guard, or says how the attempt ended without it.
async fn start(invocation: &Invocation<'_>, stop: &mut Stop) -> Result<(Guard, Pipes), Outcome> {
    let time_limit = invocation.time_limit;
    tokio::select! {
        biased;
        cause = stop.requested() => return Err(stopped(cause, time_limit)),
        () = std::future::ready(()) => {}
    }
    let (mut guard, pipes) =
        Guard::spawn(invocation.guarding).map_err(|error| failed(None, None, error.to_string()))?;
    let started = tokio::select! {
        biased;
        // It may be about to start the command, or have started it.
        cause = stop.requested() => {
            guard.destroy().await;
            return Err(stopped(cause, time_limit));
        }
        started = guard.start(invocation) => started,
    };
    let Err(error) = started else { return Ok((guard, pipes)) };
    let said = error.to_string();
    match error {
        StartError::GuardLost => {
            guard.destroy().await;
            Err(guard_lost(None, said))
        }
        StartError::TooLate => {
            guard.leave().await;
            Err(stopped(stop.too_late(), time_limit))
        }
        StartError::NoGuard { .. } | StartError::Refused(_) => {
            guard.leave().await;
            Err(failed(None, None, said))
        }
    }
}

/// Ends when the tail of the log has had its time. Without it a stuck log reader would hold the slot for ever.
async fn patience(end: &End, stop: &mut Stop) {
    if matches!(end, End::Ended(_)) {
        tokio::select! {
            _ = stop.requested() => {}
            () = tokio::time::sleep(LOG_PATIENCE) => return,
        }
    }
    tokio::time::sleep(LOG_PATIENCE_STOPPED).await;
}

fn conclude(end: End, output: Option<Value>, time_limit: Duration) -> Outcome {
    match end {
        // A program that heeds TERM usually exits 0 with its work half done: after a stop that is no success.
        End::Stopped(cause, exit) => {
            Outcome { exit_code: exit.and_then(Exit::code), output, ..stopped(cause, time_limit) }
        }
        End::Ended(Exit::Code(0)) => Outcome { exit_code: Some(0), output, ..Outcome::of(Verdict::Succeeded) },
        End::Ended(exit) => failed(exit.code(), output, exit.to_string()),
        End::GuardLost => guard_lost(output, "killed because the guard of the command was gone".to_owned()),
    }
}

fn guard_lost(output: Option<Value>, error: String) -> Outcome {
    Outcome { output, ..Outcome::because(Verdict::Stale, "guard_lost", error) }
}

fn failed(exit_code: Option<i32>, output: Option<Value>, error: String) -> Outcome {
    Outcome { exit_code, output, error: Some(error), ..Outcome::of(Verdict::Failed) }
}
