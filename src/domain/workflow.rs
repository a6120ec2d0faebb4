//! Workflow ids and definitions, and what makes them valid.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

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
    Err(format!("`{}` is not a queue: letters, digits, `.`, `_` and `-`, at most 128 characters", queue.escape_debug()))
}

/// Checks a priority.
pub fn check_priority(priority: i16) -> Result<(), String> {
    if (-100..=100).contains(&priority) {
        return Ok(());
    }
    Err(format!("{priority} is out of range: -100 to 100, higher first"))
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
    /// Default priority of its runs: -100 to 100, higher first.
    #[serde(default)]
    #[schema(minimum = -100, maximum = 100)]
    pub priority: i16,
    /// The queue its runs are put in; a worker can be told which queues to serve.
    #[serde(default = "default_queue")]
    pub queue: String,
    /// Labels its runs start with.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

fn default_queue() -> String {
    "default".to_owned()
}

/// What runs a workflow, chosen by `type`.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Executor {
    /// A process of the worker's host.
    Command(Command),
}

impl Executor {
    /// The `type`, as it is stored with each run.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Command(_) => "command",
        }
    }
}

/// A process of the worker's host. It gets the run's input as JSON on standard input; of the environment PATH, HOME,
/// LANG, TMPDIR, its own `env` and `SINGLETRACK_RUN_ID`, `_WORKFLOW_ID`, `_ATTEMPT`, `_FENCE`. Exit code 0 succeeds; a JSON
/// object as the last line of standard output becomes the run's `output`.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct Command {
    /// Program and arguments. No shell is involved: use `["sh", "-c", "..."]` for one.
    #[schema(min_items = 1, example = json!(["npm", "test"]))]
    pub argv: Vec<String>,
    /// The folder it runs in, as an absolute path. Without it the folder the service was started in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Variables added to its environment.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Command,
}

/// Read member by member: derived, a tagged enum is read into a buffer first, and where in it a mistake is gets lost.
impl<'de> Deserialize<'de> for Executor {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_map(ExecutorVisitor)
    }
}

struct ExecutorVisitor;

impl<'de> Visitor<'de> for ExecutorVisitor {
    type Value = Executor;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object with a `type`")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut members: M) -> Result<Executor, M::Error> {
        let (mut kind, mut argv, mut cwd, mut env, mut unknown) = (None, None, None, None, None);
        while let Some(name) = members.next_key::<String>()? {
            match name.as_str() {
                "type" => kind = Some(members.next_value()?),
                "argv" => argv = Some(members.next_value()?),
                "cwd" => cwd = members.next_value()?,
                "env" => env = Some(members.next_value()?),
                _ => {
                    members.next_value::<IgnoredAny>()?;
                    unknown.get_or_insert(name);
                }
            }
        }
        // The type first: where it is not known, its members can't be either.
        let kind = kind.ok_or_else(|| M::Error::missing_field("type"))?;
        if let Some(name) = unknown {
            return Err(M::Error::unknown_field(&name, &["type", "argv", "cwd", "env"]));
        }
        match kind {
            Kind::Command => Ok(Executor::Command(Command {
                argv: argv.ok_or_else(|| M::Error::missing_field("argv"))?,
                cwd,
                env: env.unwrap_or_default(),
            })),
        }
    }
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
        check("/priority", check_priority(self.priority));
        check("/queue", check_queue(&self.queue));
        check("/labels", check_labels(&self.labels));
        let Executor::Command(command) = &self.executor;
        check("/executor/argv", check_argv(&command.argv));
        check("/executor/cwd", check_cwd(command.cwd.as_deref()));
        check("/executor/env", check_env(&command.env));
        found
    }
}

fn check_seconds(seconds: Option<i32>, longest: i32) -> Result<(), String> {
    match seconds {
        Some(seconds) if !(1..=longest).contains(&seconds) => {
            Err(format!("{seconds} is out of range: 1 to {longest} seconds"))
        }
        _ => Ok(()),
    }
}

fn check_argv(argv: &[String]) -> Result<(), String> {
    match argv.first() {
        None => Err("is empty: give the program and its arguments".into()),
        Some(program) if program.is_empty() => Err("its first entry, the program, is empty".into()),
        Some(_) if argv.iter().any(|argument| argument.contains('\0')) => {
            Err("has a NUL, which no argument can hold".into())
        }
        Some(_) => Ok(()),
    }
}

fn check_cwd(cwd: Option<&str>) -> Result<(), String> {
    match cwd {
        Some(cwd) if !cwd.starts_with('/') => Err(format!("`{}` is not an absolute path", cwd.escape_debug())),
        Some(cwd) if cwd.contains('\0') => Err("has a NUL, which no path can hold".into()),
        _ => Ok(()),
    }
}

fn check_env(env: &BTreeMap<String, String>) -> Result<(), String> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(format!(
                "`{}`: a name is not empty and has no `=`; neither it nor its value has a NUL",
                name.escape_debug()
            ));
        }
        if name.starts_with("SINGLETRACK_") {
            return Err(format!("`{name}`: names beginning with SINGLETRACK_ are the service's own"));
        }
    }
    Ok(())
}
