//! When an attempt is followed by another one, and how long after.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Checks a number of attempts.
pub fn check_max_attempts(attempts: i32) -> Result<(), String> {
    if (1..=1000).contains(&attempts) { Ok(()) } else { Err(format!("{attempts} is out of range: 1 to 1000")) }
}

/// An end of an attempt that can be followed by another attempt. `succeeded` and `cancelled` never are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RetryOn {
    /// It ended by itself, but not well, or could not be started.
    Failed,
    /// It was stopped at its time limit.
    TimedOut,
    /// Its worker was lost, or had to stop.
    Stale,
}

impl RetryOn {
    /// Every one of them, which is the default.
    pub fn all() -> BTreeSet<Self> {
        BTreeSet::from([Self::Failed, Self::TimedOut, Self::Stale])
    }

    /// The name used in the API and in SQL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Stale => "stale",
        }
    }
}

/// How long a run waits before its next attempt: `initial_seconds` after the first, `factor` times as long after each
/// further one, up to `max_seconds`; each wait is longer or shorter by up to the share `jitter`, at random, and never longer
/// than `max_seconds`. What a server asks for in `Retry-After` is waited for in any case, up to a day.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Backoff {
    /// Wait after the first attempt, in seconds: 0 to 86400.
    #[schema(minimum = 0, maximum = 86400, default = 5.0)]
    pub initial_seconds: f64,
    /// How many times as long each further wait is: 1 to 100.
    #[schema(minimum = 1, maximum = 100, default = 2.0)]
    pub factor: f64,
    /// Longest wait, in seconds: up to 604800.
    #[schema(minimum = 0, maximum = 604800, default = 3600.0)]
    pub max_seconds: f64,
    /// Share of a wait by which it varies: 0 to 1.
    #[schema(minimum = 0, maximum = 1, default = 0.2)]
    pub jitter: f64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { initial_seconds: 5.0, factor: 2.0, max_seconds: 3600.0, jitter: 0.2 }
    }
}

impl Backoff {
    /// Every wrong member, and what is wrong with it.
    pub(super) fn mistakes(&self) -> Vec<(&'static str, String)> {
        let bounds = [
            ("initial_seconds", self.initial_seconds, 0.0, 86_400.0),
            ("factor", self.factor, 1.0, 100.0),
            ("max_seconds", self.max_seconds, 0.0, 604_800.0),
            ("jitter", self.jitter, 0.0, 1.0),
        ];
        let wrong = bounds.into_iter().filter(|(_, value, low, high)| !(low..=high).contains(&value));
        wrong.map(|(name, value, low, high)| (name, format!("{value} is out of range: {low} to {high}"))).collect()
    }
}
