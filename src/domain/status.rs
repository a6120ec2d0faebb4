//! The statuses of a run, and the one table of how they change.
//!
//! ```text
//!  scheduled --due--+--> waiting --supersede--> skipped
//!                   |       +--promote-+
//!                   |                  v
//!                   +---------------> queued --claim--> running --settle--> succeeded | failed | timed_out | stale | cancelled
//!                   +--> skipped       |  ^               |
//!                                      |  +--release------+
//!                                      |  +--settle-------+   another attempt is due after the backoff; the run keeps its slot
//!                                      +--expire--> skipped, or as its last attempt ended
//! ```
//!
//! Who wins when a run is to be cancelled:
//!
//! | the run is | cancel comes first | and then | the run becomes |
//! |---|---|---|---|
//! | scheduled, waiting, queued, in backoff | yes | | `cancelled` at once |
//! | running | yes | its worker reports success | `succeeded` |
//! | running | yes | its worker reports anything else | `cancelled`, never retried; `reason` says what happened |
//! | running | yes | its worker is lost, or gives it back | `cancelled`, never retried |
//! | running | yes | a second cancel | no change |
//! | running | no | its worker reports `cancelled` unasked | `cancelled`, reason `by_worker`, never retried |
//! | running | no | it ends otherwise, and another attempt is due | `queued`, reason `backoff`; a cancel then ends it at once |
//! | running | no | a pull worker reports, after its time limit, that it failed or stopped | as if it had been stopped at the limit |
//! | final | no | | no change: the request is refused |
//!
//! The SQL in `store/` has its own literal guards; [`transition`] says what they should come to, and a test plants a run
//! in each status, fires each event at a real Postgres, and compares.

use serde::{Deserialize, Serialize};

use super::Verdict;

/// Where a run is in its life. `queued` and `running` hold the slot of the workflow; nothing else does.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, sqlx::Type, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum Status {
    /// Meant for later; holds no slot. Its due time moves it on.
    Scheduled,
    /// Behind another run of its workflow. The freeing of the slot moves it on.
    Waiting,
    /// Holds the slot and is to be started. A worker's claim moves it on.
    Queued,
    /// A worker executes it under a lease. Its settling moves it on.
    Running,
    /// Final: it did what it should.
    Succeeded,
    /// Final: it ended by itself, but not well.
    Failed,
    /// Final: somebody asked for its end.
    Cancelled,
    /// Final: it ran longer than its time limit.
    TimedOut,
    /// Final: its worker was lost, or had to stop.
    Stale,
    /// Final: it was never started.
    Skipped,
}

impl Status {
    /// Every status, in the order of a run's life.
    pub const ALL: [Self; 10] = [
        Self::Scheduled,
        Self::Waiting,
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
        Self::TimedOut,
        Self::Stale,
        Self::Skipped,
    ];

    /// Whether nothing can change a run in this status any more.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Scheduled | Self::Waiting | Self::Queued | Self::Running)
    }

    /// Whether a run in this status is the one that its workflow's slot is taken by.
    pub fn holds_slot(self) -> bool {
        matches!(self, Self::Queued | Self::Running)
    }

    /// The name used in the API and in SQL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Waiting => "waiting",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
            Self::Stale => "stale",
            Self::Skipped => "skipped",
        }
    }
}

impl std::str::FromStr for Status {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|status| status.as_str() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::as_str).join(", ");
            format!("`{name}` is not a status; the statuses are {names}")
        })
    }
}

/// What can happen to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker takes it to execute it.
    Claim,
    /// The worker that claimed it gives it back, unstarted or half done; it costs no attempt.
    Release,
    /// The attempt under the current lease is over.
    Settle(Verdict),
    /// Its due time has come, and it meets the slot.
    Due(Landing),
    /// The slot it waits for is given to it.
    Promote,
    /// A newer run takes its place before all others.
    Supersede,
    /// It stayed queued for longer than it may.
    Expire,
    /// Somebody asks for its end (`cancel_run`).
    Cancel,
    /// Somebody frees its slot whatever its process does (`force_release_run`).
    ForceRelease,
}

/// Where a scheduled run comes to be when it is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    /// It has the slot.
    Slot,
    /// It waits.
    Line,
    /// Neither its policy nor a pause lets it have the slot or wait.
    Nowhere,
}

/// What an [`Event`] comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The run moves to this status.
    To(Status),
    /// The status stays; the request is noted for whoever runs it.
    Noted,
    /// Nothing changes, and whoever fired the event is told so.
    Refused,
}

/// What an event meets besides the status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Somebody asked for the end of this running run before.
    pub cancel_requested: bool,
    /// Another attempt is allowed, by number and by how this one ended.
    pub may_retry: bool,
    /// How the last attempt of this queued run ended, where it had one.
    pub last: Option<Verdict>,
}

/// The table of transitions.
pub fn transition(from: Status, standing: Standing, event: Event) -> Transition {
    use Event::*;
    use Status::*;
    use Transition::*;
    match (from, event) {
        (Scheduled, Due(Landing::Slot)) => To(Queued),
        (Scheduled, Due(Landing::Line)) => To(Waiting),
        (Scheduled, Due(Landing::Nowhere)) => To(Skipped),
        (Waiting, Promote) => To(Queued),
        (Waiting, Supersede) => To(Skipped),
        (Queued, Claim) => To(Running),
        // What was never started has nothing to stop.
        (Running, Release) if standing.cancel_requested => To(Cancelled),
        (Running, Release) => To(Queued),
        // A success that is committed first stands; any other end of a run that was to be cancelled is its cancellation.
        (Running, Settle(Verdict::Succeeded)) => To(Succeeded),
        (Running, Settle(_)) if standing.cancel_requested => To(Cancelled),
        (Running, Settle(Verdict::Cancelled)) => To(Cancelled),
        (Running, Settle(_)) if standing.may_retry => To(Queued),
        (Running, Settle(verdict)) => To(verdict.status()),
        (Queued, Expire) => To(standing.last.map_or(Skipped, Verdict::status)),
        (Scheduled | Waiting | Queued, Cancel) => To(Cancelled),
        (Running, Cancel) => Noted,
        (Queued | Running, ForceRelease) => To(Stale),
        _ => Refused,
    }
}
