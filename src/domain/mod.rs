//! Pure values and decisions: no await, no SQL, no clock, no randomness.

pub mod executor;
pub mod json;
pub mod key;
pub(crate) mod object;
pub mod outcome;
pub mod outgoing;
pub mod policy;
pub mod retry;
pub mod run;
pub mod schedule;
pub mod status;
pub mod text;
pub mod trace;
pub mod workflow;

pub use executor::{Command, Executor, Http};
pub use key::{Patterns, Scope, Token};
pub use outcome::{Outcome, Verdict};
pub use outgoing::Outgoing;
pub use policy::OnConflict;
pub use retry::{Backoff, RetryOn};
pub use run::{Holder, Lease, LogChunk, Pause, Run, StopCause, Stream};
pub use schedule::{Missed, Schedule, Timetable};
pub use status::{Event, Landing, Standing, Status, Transition};
pub use trace::TraceContext;
pub use workflow::{Definition, WorkflowId};
