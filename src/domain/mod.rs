//! Pure values and decisions: no await, no SQL, no clock, no randomness.

pub mod outcome;
pub mod run;
pub mod status;
pub mod text;
pub mod workflow;

pub use outcome::{Outcome, Verdict};
pub use run::{Holder, Lease, LogChunk, Run, StopCause, Stream};
pub use status::{Event, Status, Transition};
pub use workflow::{Command, Definition, Executor, WorkflowId};
