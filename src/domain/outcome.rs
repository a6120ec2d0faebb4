//! How an attempt ended.

use std::time::Duration;

use super::Status;

/// How one attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It did what it should.
    Succeeded,
    /// It ended by itself, but not well, or could not be started.
    Failed,
    /// It was stopped at its time limit.
    TimedOut,
    /// It was stopped because somebody asked for it.
    Cancelled,
    /// Its worker was lost, or had to stop.
    Stale,
}

impl Verdict {
    /// Every verdict.
    pub const ALL: [Self; 5] = [Self::Succeeded, Self::Failed, Self::TimedOut, Self::Cancelled, Self::Stale];

    /// The status of a run whose last attempt ended so.
    pub fn status(self) -> Status {
        match self {
            Self::Succeeded => Status::Succeeded,
            Self::Failed => Status::Failed,
            Self::TimedOut => Status::TimedOut,
            Self::Cancelled => Status::Cancelled,
            Self::Stale => Status::Stale,
        }
    }
}

/// Everything an ended attempt leaves behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// How it ended.
    pub verdict: Verdict,
    /// Why, where the verdict alone does not say it: `timeout`, `shutdown`, `worker_lost`, ...
    pub reason: Option<String>,
    /// The exit code of its command; `None` when a signal ended it or nothing was started.
    pub exit_code: Option<i32>,
    /// What it handed back: a JSON object.
    pub output: Option<serde_json::Value>,
    /// One line on why it did not succeed.
    pub error: Option<String>,
    /// How long a next attempt has to wait at least, where whoever was asked said so. More than a week counts as a week.
    pub retry_after: Option<Duration>,
    /// Who says so, where that is not the worker that claimed the run.
    pub said_by: Option<String>,
}

impl Outcome {
    /// An attempt that left nothing but its verdict.
    pub fn of(verdict: Verdict) -> Self {
        Self { verdict, reason: None, exit_code: None, output: None, error: None, retry_after: None, said_by: None }
    }

    /// An attempt that left nothing but its verdict and the reason for it.
    pub fn because(verdict: Verdict, reason: &str, error: impl Into<String>) -> Self {
        Self { reason: Some(reason.to_owned()), error: Some(error.into()), ..Self::of(verdict) }
    }
}
