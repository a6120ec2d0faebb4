//! Workflow ids and definitions, and what makes them valid.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::executor::Executor;
use super::object::{maybe_object, object};
use super::policy::OnConflict;
use super::retry::{Backoff, RetryOn, check_max_attempts};
use super::schedule::Schedule;

/// A workflow id, or an instance of one (`deploy@prod`); each has its own slot. Can only be made by parsing.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct WorkflowId(String);

/// What an id looks like, for people.
pub const ID_FORM: &str = "letters, digits, `.`, `_` and `-`, beginning with a letter or digit, at most 128 characters; \
                           an instance adds `@` and a name of the same form of at most 64 characters";

impl WorkflowId {
    /// The id itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The workflow whose definition it uses, unless it has one itself: what stands before the `@`.
    pub fn definition(&self) -> &str {
        self.0.split_once('@').map_or(self.as_str(), |(definition, _)| definition)
    }
}

impl std::str::FromStr for WorkflowId {
    type Err = String;

    fn from_str(id: &str) -> Result<Self, String> {
        let (definition, instance) = match id.split_once('@') {
            Some((definition, instance)) => (definition, Some(instance)),
            None => (id, None),
        };
        if is_name(definition, 128) && instance.is_none_or(|instance| is_name(instance, 64)) {
            Ok(Self(id.to_owned()))
        } else {
            Err(format!("`{}` is not a workflow id: {ID_FORM}", id.escape_debug()))
        }
    }
}

impl fmt::Display for WorkflowId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Whether `name` has the form of a workflow id, a queue or an instance.
fn is_name(name: &str, longest: usize) -> bool {
    name.len() <= longest
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Checks a queue's name.
pub fn check_queue(queue: &str) -> Result<(), String> {
    if is_name(queue, 128) {
        return Ok(());
    }
    let form = "letters, digits, `.`, `_` and `-`, beginning with a letter or digit, at most 128 characters";
    Err(format!("`{}` is not a queue: {form}", queue.escape_debug()))
}

/// Checks an idempotency key.
pub fn check_key(key: &str) -> Result<(), String> {
    if (1..=255).contains(&key.chars().count()) && !key.contains(char::is_control) && key.trim() == key {
        return Ok(());
    }
    Err("must be 1 to 255 characters, without blanks at its ends".to_owned())
}

/// The priorities there are, higher first.
pub const PRIORITIES: RangeInclusive<i16> = -100..=100;

/// Checks a priority.
pub fn check_priority(priority: i16) -> Result<(), String> {
    if PRIORITIES.contains(&priority) {
        return Ok(());
    }
    Err(format!("{priority} is out of range: {} to {}, higher first", PRIORITIES.start(), PRIORITIES.end()))
}

/// Checks labels: at most 64, names of 1 to 63 bytes, values of at most 255 bytes, none with a NUL.
pub fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    if labels.len() > 64 {
        return Err(format!("{} labels are too many: at most 64", labels.len()));
    }
    for (name, value) in labels {
        if name.is_empty() || name.len() > 63 || value.len() > 255 || name.contains('\0') || value.contains('\0') {
            return Err(format!(
                "label `{}`: a name has 1 to 63 bytes, a value at most 255, and neither has a NUL",
                name.escape_debug()
            ));
        }
    }
    Ok(())
}

/// What a workflow says: the body of `PUT /workflows/{id}`, and what a revision keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "executor": {"type": "command", "argv": ["npm", "test"], "cwd": "/srv/shop"},
    "timeout_seconds": 900, "max_attempts": 2, "labels": {"team": "shop"}
}))]
pub struct Definition {
    /// What runs it.
    pub executor: Executor,
    /// Longest one attempt may take, in seconds. Without it the worker's `SINGLETRACK_RUN_TIMEOUT` holds (10 minutes).
    #[serde(default)]
    #[schema(minimum = 1, maximum = 31536000, example = 900)]
    pub timeout_seconds: Option<i32>,
    /// Silence of the worker after which a run is stale, in seconds. Without it `SINGLETRACK_HEARTBEAT_TIMEOUT` holds
    /// (1 minute). At least what the service's heartbeat interval, kill grace and margin need.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 86400)]
    pub heartbeat_timeout_seconds: Option<i32>,
    /// Longest a queued run may stay unstarted, in seconds; then it is `skipped`, reason `expired`. Without it
    /// `SINGLETRACK_START_WITHIN` holds (1 hour).
    #[serde(default)]
    #[schema(minimum = 1, maximum = 31536000)]
    pub start_within_seconds: Option<i32>,
    /// How many attempts a run may have: 1 to 1000.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1000, default = 1)]
    pub max_attempts: i32,
    /// After which ends of an attempt there is another one: some of `failed`, `timed_out`, `stale` (its worker was lost or
    /// had to stop).
    #[serde(default = "RetryOn::all")]
    #[schema(default = json!(["failed", "timed_out", "stale"]))]
    pub retry_on: BTreeSet<RetryOn>,
    /// How long a run waits before its next attempt. It keeps its slot meanwhile.
    #[serde(default, deserialize_with = "object")]
    pub backoff: Backoff,
    /// What a run does when the slot is taken, unless its enqueue says otherwise.
    #[serde(default)]
    #[schema(default = "reject")]
    pub on_conflict: OnConflict,
    /// How many runs may wait for one slot, under `wait`: 1 to 10000. Each instance has a slot of its own.
    #[serde(default = "hundred")]
    #[schema(minimum = 1, maximum = 10000, default = 100)]
    pub max_waiting: i32,
    /// Default priority of its runs: -100 to 100, higher first.
    #[serde(default)]
    #[schema(minimum = -100, maximum = 100, default = 0)]
    pub priority: i16,
    /// The queue its runs are put in; a worker can be told which queues to serve.
    #[serde(default = "default_queue")]
    #[schema(default = "default")]
    pub queue: String,
    /// Labels its runs start with.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// When it runs by itself; without it, never.
    #[serde(default, deserialize_with = "maybe_object")]
    pub schedule: Option<Schedule>,
}

fn one() -> i32 {
    1
}

fn hundred() -> i32 {
    100
}

fn default_queue() -> String {
    "default".to_owned()
}

impl Definition {
    /// Every wrong field, as a JSON pointer and what is wrong with it.
    pub fn mistakes(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let mut check = |pointer: &str, result: Result<(), String>| {
            if let Err(mistake) = result {
                found.push((pointer.to_owned(), mistake));
            }
        };
        const YEAR: i32 = 365 * 24 * 3600;
        check("/timeout_seconds", check_seconds(self.timeout_seconds, YEAR));
        check("/heartbeat_timeout_seconds", check_seconds(self.heartbeat_timeout_seconds, 24 * 3600));
        check("/start_within_seconds", check_seconds(self.start_within_seconds, YEAR));
        check("/max_waiting", check_max_waiting(self.max_waiting));
        check("/priority", check_priority(self.priority));
        check("/queue", check_queue(&self.queue));
        check("/labels", check_labels(&self.labels));
        check("/max_attempts", check_max_attempts(self.max_attempts));
        for (member, mistake) in self.backoff.mistakes() {
            check(&format!("/backoff/{member}"), Err(mistake));
        }
        for (member, mistake) in self.schedule.iter().flat_map(Schedule::mistakes) {
            check(&format!("/schedule/{member}"), Err(mistake));
        }
        for (member, mistake) in self.executor.mistakes() {
            check(&format!("/executor/{member}"), Err(mistake));
        }
        found
    }
}

fn check_max_waiting(runs: i32) -> Result<(), String> {
    if (1..=10_000).contains(&runs) { Ok(()) } else { Err(format!("{runs} is out of range: 1 to 10000")) }
}

pub(super) fn check_seconds(seconds: Option<i32>, longest: i32) -> Result<(), String> {
    match seconds {
        Some(seconds) if !(1..=longest).contains(&seconds) => {
            Err(format!("{seconds} is out of range: 1 to {longest} seconds"))
        }
        _ => Ok(()),
    }
}
