//! The `http` executor: one request per attempt, carrying the run. What it looks like, and what an answer means, is said to
//! users at [`Http`].
//!
//! `request.rs` makes the request, `client.rs` sends it where it may go, `answer.rs` reads what comes back.

mod answer;
mod client;
mod request;
#[cfg(test)]
mod tests;

use std::future::ready;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::domain::executor::Http;
use crate::domain::outcome::{Outcome, Verdict};
use crate::domain::run::{LogChunk, Run, StopCause};
use crate::executor::log::Log;
use crate::executor::stop::{Stop, stopped};

pub use client::Client;

/// One attempt to have a server do the work.
pub struct Call<'a> {
    /// What sends the request.
    pub client: &'a Client,
    /// Where to, and how.
    pub http: &'a Http,
    /// The run, as claimed: its attempt and fence are those of this request.
    pub run: &'a Run,
    /// Where a server that answers 202 finishes the run.
    pub callback_url: &'a str,
    /// What it then shows: good for this attempt only.
    pub token: &'a str,
    /// From the call of [`run`] to the end of the answer.
    pub time_limit: Duration,
    /// Bytes of the answer that are kept as log.
    pub log_bytes: u64,
    /// Bytes of an answer that may become the run's output.
    pub output_bytes: usize,
    /// Asked directly before the request is sent: a worker that was frozen until now may have lost the run meanwhile, before
    /// anybody could say so on `stop`.
    pub may_start: &'a (dyn Fn() -> bool + Sync),
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The attempt is over.
    Ended(Outcome),
    /// The server answered 202: it finishes the run itself. Said even if somebody asks for the attempt's end at that moment.
    HandedOver,
}

/// Sends the request and says what became of the attempt. Whatever goes wrong is an [`Outcome`] too.
///
/// The text of the answer is the log, as [`command::run`](super::command::run) sends it; while `log` is full the server
/// waits. Of a 202 the log gets one remark: the log that follows is the server's own. The attempt ends early when `stop` holds a cause or the time limit passes: the connection is closed then, and
/// nobody knows how far the server goes on.
///
/// Dropping the future closes the connection at once.
pub async fn run(call: Call<'_>, log: mpsc::Sender<LogChunk>, stop: watch::Receiver<Option<StopCause>>) -> Answer {
    let mut stop = Stop::new(stop, call.time_limit);
    let mut log = Log::new(log, call.log_bytes);
    tokio::select! {
        biased;
        cause = stop.requested() => return Answer::Ended(stopped(cause, call.time_limit)),
        () = ready(()) => {}
    }
    let response = tokio::select! {
        biased;
        // A server that has taken the run has taken it, whoever wants something else by now.
        response = request::send(&call) => response,
        cause = stop.requested() => return Answer::Ended(stopped(cause, call.time_limit)),
    };
    let response = match response {
        Ok(response) => response,
        Err(request::Unsent::TooLate) => return Answer::Ended(stopped(stop.too_late(), call.time_limit)),
        Err(request::Unsent::Other(error)) => return Answer::Ended(failed(error)),
    };
    if response.status().as_u16() == 202 {
        answer::remark(response, &mut log).await;
        return Answer::HandedOver;
    }
    Answer::Ended(tokio::select! {
        biased;
        cause = stop.requested() => stopped(cause, call.time_limit),
        outcome = answer::conclude(response, &mut log, call.output_bytes) => outcome,
    })
}

fn failed(error: String) -> Outcome {
    Outcome { error: Some(error), ..Outcome::of(Verdict::Failed) }
}
