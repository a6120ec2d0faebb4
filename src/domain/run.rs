//! A run, its lease, and what is said about the run that holds a slot.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::Status;

/// One run of a workflow: the public columns of its row in `test_runs`, under the same names.
///
/// `input` and `output` are passed on as the text that Postgres has: it holds numbers and depths that would not survive
/// being read and written again.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Run {
    /// UUIDv7 given at enqueue. Runs are ordered by `created_at`, then `id`.
    pub id: Uuid,
    /// The full workflow id, which has the slot: `deploy` or `deploy@prod`.
    #[schema(example = "deploy@prod")]
    pub workflow_id: String,
    /// The workflow whose definition it uses.
    #[schema(example = "deploy")]
    pub definition: String,
    /// The revision of that definition, kept for the run's whole life.
    pub revision: i32,
    /// Where the run is in its life.
    pub status: Status,
    /// Why, where the status alone does not say it: `backoff`, `expired`, `conflict`, `paused`, `superseded`,
    /// `too_many_waiting`, `shutdown`, `timeout`, `unkillable`, `worker_lost`, `requested`, `forced`, ...
    pub reason: Option<String>,
    /// What runs it.
    #[schema(example = "command")]
    pub executor_type: String,
    /// The queue it is in.
    #[schema(example = "default")]
    pub queue: String,
    /// -100 to 100, higher first.
    pub priority: i16,
    /// Free labels for filtering.
    pub labels: BTreeMap<String, String>,
    /// What the caller handed over: any JSON.
    #[schema(value_type = Value)]
    pub input: Option<Box<RawValue>>,
    /// What its enqueue asked for when the slot is taken.
    #[schema(example = "reject")]
    pub on_conflict: String,
    /// How many attempts have begun; 0 before the first.
    pub attempt: i32,
    /// How many attempts it may have.
    pub max_attempts: i32,
    /// Number of the last claim; grows with every claim. 0 before the first.
    pub fence: i64,
    /// Who runs it, or ran its last attempt; null while it is to be started.
    pub worker: Option<String>,
    /// When it was enqueued, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// When a scheduled run becomes due.
    pub run_at: Option<DateTime<Utc>>,
    /// From when on a queued run may be claimed.
    pub available_at: Option<DateTime<Utc>>,
    /// Start of the current or last attempt.
    pub started_at: Option<DateTime<Utc>>,
    /// When it became final.
    pub finished_at: Option<DateTime<Utc>>,
    /// Longest one attempt may take. Filled at the first claim where the workflow says nothing.
    pub timeout_seconds: Option<i32>,
    /// Silence of the worker after which the run is stale. Filled at the first claim where the workflow says nothing.
    pub heartbeat_timeout_seconds: Option<i32>,
    /// The run that held the slot when this one was skipped for it, reason `conflict`.
    pub blocked_by: Option<Uuid>,
    /// The tick of the workflow's schedule that it was made for; null where somebody asked for it.
    pub tick_at: Option<DateTime<Utc>>,
    /// When somebody asked for the end of this running run.
    pub cancel_requested_at: Option<DateTime<Utc>>,
    /// Exit code of the last attempt's command; null when a signal ended it or nothing was started.
    pub exit_code: Option<i32>,
    /// The JSON object that the command's standard output ended with.
    #[schema(value_type = Option<Object>)]
    pub output: Option<Box<RawValue>>,
    /// One line on why the last attempt did not succeed.
    pub error: Option<String>,
    /// The run this one repeats.
    pub rerun_of: Option<Uuid>,
    /// Who enqueued it.
    pub requested_by: String,
    /// W3C trace context of the enqueue.
    pub traceparent: Option<String>,
}

/// The run a slot is taken by, as a refused caller needs to know it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Holder {
    /// The run's id; the problem itself has it as `run_id`.
    #[serde(skip_serializing)]
    pub run_id: Uuid,
    /// `queued` or `running`; final where the caller waited for its end, or it ended just now.
    pub status: Status,
    /// Why it is in that status. Of a queued run: `paused` (its workflow or queue), `backoff`, or `no_worker`: nobody who serves its
    /// queue was seen for a minute.
    pub reason: Option<String>,
    /// When it was enqueued.
    pub created_at: DateTime<Utc>,
    /// From when on it may be started, while it is queued: after its enqueue, or its backoff.
    pub available_at: Option<DateTime<Utc>>,
    /// When its attempt started; null while it is queued.
    pub started_at: Option<DateTime<Utc>>,
    /// Seconds since its worker's last sign of life; null unless it is running.
    pub heartbeat_age_seconds: Option<f64>,
    /// What its worker last said about how far it is; null where it said nothing.
    pub progress: Option<serde_json::Value>,
    /// Its start and the median duration of the workflow's last 20 successes; null where there is none, or it is not running.
    pub expected_end_at: Option<DateTime<Utc>>,
    /// Who enqueued it.
    pub requested_by: String,
}

impl From<Run> for Holder {
    /// What there is to say of a run that held the slot and does not any more.
    fn from(run: Run) -> Self {
        Self {
            run_id: run.id,
            status: run.status,
            reason: run.reason,
            created_at: run.created_at,
            available_at: None,
            started_at: run.started_at,
            heartbeat_age_seconds: None,
            progress: None,
            expected_end_at: None,
            requested_by: run.requested_by,
        }
    }
}

/// A pause, of a workflow or a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Pause {
    /// The workflow id, or the queue. An instance is paused with its definition too.
    pub name: String,
    /// Why, in somebody's words.
    pub reason: Option<String>,
    /// Who paused it.
    pub paused_by: String,
    /// Since when.
    pub paused_at: DateTime<Utc>,
}

/// The right to act for a running run. Every write of a worker names it; once it is lost, no write takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The run.
    pub run_id: Uuid,
    /// The claim's number.
    pub fence: i64,
    /// The random part. `None` for the reaper, which acts by fence alone.
    pub secret: Option<Uuid>,
}

impl Lease {
    /// What a worker outside this service shows for the lease: `st1_` and its three parts. `None` for the reaper's.
    pub fn token(&self) -> Option<String> {
        let parts = [self.run_id.as_bytes().as_slice(), &self.fence.to_be_bytes(), self.secret?.as_bytes()].concat();
        Some(format!("{TOKEN}{}", URL_SAFE_NO_PAD.encode(parts)))
    }

    /// The lease that a token stands for; whether it still holds is another question. `None` where it is no token.
    pub fn of_token(token: &str) -> Option<Self> {
        let parts = URL_SAFE_NO_PAD.decode(token.strip_prefix(TOKEN)?).ok()?;
        let (run_id, rest) = parts.split_first_chunk::<16>()?;
        let (fence, rest) = rest.split_first_chunk::<8>()?;
        let secret: [u8; 16] = rest.try_into().ok()?;
        Some(Self {
            run_id: Uuid::from_bytes(*run_id),
            fence: i64::from_be_bytes(*fence),
            secret: Some(Uuid::from_bytes(secret)),
        })
    }
}

/// What a token begins with, so that one that leaked is recognised.
const TOKEN: &str = "st1_";

/// Where a piece of log came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, sqlx::Type, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum Stream {
    /// The command's standard output.
    Stdout,
    /// The command's standard error.
    Stderr,
    /// A remark of the worker.
    System,
}

impl Stream {
    /// The name used in the API and in SQL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::System => "system",
        }
    }
}

/// A piece of log on its way to the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogChunk {
    /// Where it came from.
    pub stream: Stream,
    /// Valid UTF-8 without NUL.
    pub text: String,
}

/// Longest progress a worker may tell, in bytes of JSON: each renewal writes it anew.
pub const PROGRESS_BYTES: usize = 16 << 10;

/// Why a worker ends an attempt before its command ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// The attempt reached its time limit.
    Timeout,
    /// Somebody asked for the run's end.
    Cancel,
    /// The worker itself is stopping.
    Shutdown,
    /// The lease could not be renewed and is about to run out: the command must be gone before somebody may take the run.
    Unrenewed,
    /// The lease is gone: somebody else may act for the run now.
    LeaseLost,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> (Lease, String) {
        let lease = Lease { run_id: Uuid::now_v7(), fence: i64::MAX - 1, secret: Some(Uuid::new_v4()) };
        (lease, lease.token().unwrap_or_default())
    }

    #[test]
    fn a_token_is_its_lease() {
        let (lease, token) = given();
        assert!(token.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)), "{token}");
        assert_eq!(Lease::of_token(&token), Some(lease));
        assert_eq!(Lease { secret: None, ..lease }.token(), None, "the reaper's is no token");
    }

    #[test]
    fn what_is_not_the_very_token_is_none() {
        let (_, token) = given();
        let (without_end, end) = token.split_at(token.len() - 1);
        // The last character carries two bits of the secret. With more of them set, a lenient reader would see the same bytes.
        assert!("AQgw".contains(end), "{token}");
        let others = [
            String::new(),
            TOKEN.into(),
            token[TOKEN.len()..].into(),
            without_end.into(),
            format!("{token}A"),
            format!("{token}="),
            format!(" {token}"),
            format!("{without_end}R"),
            token.replace(TOKEN, "st2_"),
        ];
        for other in others {
            assert_eq!(Lease::of_token(&other), None, "{other}");
        }
    }
}
