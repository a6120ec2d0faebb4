//! What runs a workflow, and what makes a description of it valid.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use url::Url;

use super::object::Object;
use super::workflow::check_seconds;

/// What runs a workflow, chosen by `type`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", try_from = "Object<Members>")]
pub enum Executor {
    /// A process of the worker's host.
    Command(Command),
    /// A request to a server.
    Http(Http),
    /// Nothing here: workers in any language claim the runs over `/api/v1/claims`.
    Pull,
    /// An async handler that a Rust program has registered for the workflow with the library.
    Handler,
}

/// A process of the worker's host. It gets the run's input as JSON on standard input; of the environment PATH, HOME,
/// LANG, TMPDIR, its own `env`, what `env_pass` names and `SINGLETRACK_RUN_ID`, `_WORKFLOW_ID`, `_ATTEMPT`, `_FENCE`. Exit code 0
/// succeeds; a JSON object as the last line of standard output becomes the run's `output`. Nothing that it has started
/// outlives the attempt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, utoipa::ToSchema)]
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
    /// Names of variables of the service that it gets as well. `DATABASE_URL` and names beginning with `SINGLETRACK_` are
    /// never passed on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(example = json!(["HTTPS_PROXY"]))]
    pub env_pass: Vec<String>,
    /// The account it runs under, by name; its HOME is then that account's. Only a service that runs as root can do that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// How much it may use.
    #[serde(skip_serializing_if = "Limits::is_empty")]
    pub limits: Limits,
}

/// Largest log of an attempt that can be asked for.
pub const MAX_LOG_BYTES: u64 = 1 << 40;

/// Longest output of a run that can be asked for: it is kept in memory until the command ends.
pub const MAX_OUTPUT_BYTES: u64 = 64 << 20;

/// How much a command may use. Those of the kernel (`memory_bytes`, `open_files`, `processes`) are resource limits of
/// setrlimit(2); what is not given is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Memory each of its processes may write to, in bytes (RLIMIT_DATA). Beyond it an allocation fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1048576)]
    pub memory_bytes: Option<u64>,
    /// Files each of its processes may have open (RLIMIT_NOFILE).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16)]
    pub open_files: Option<u64>,
    /// Processes and threads of its account (RLIMIT_NPROC), which holds for no process of root.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub processes: Option<u64>,
    /// Bytes of log kept per attempt, then a remark that it was cut. Without it SINGLETRACK_LOG_BYTES.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1099511627776_i64)]
    pub log_bytes: Option<u64>,
    /// Longest last line of standard output that becomes the run's output, in bytes. Without it SINGLETRACK_OUTPUT_BYTES.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 67108864)]
    pub output_bytes: Option<u64>,
}

impl Limits {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A request to a server, sent once per attempt. Its body is
/// `{"run": {...}, "callback": {"url", "token", "timeout_seconds"}}`, the run as `GET /api/v1/runs/{id}` shows it; its headers are
/// `Idempotency-Key` (run id, colon, attempt), `Singletrack-Run-Id`, `Singletrack-Workflow-Id`, `Singletrack-Attempt`,
/// `Singletrack-Fence`, `traceparent` where the run has one, and the workflow's own.
///
/// What the answer means:
///
/// - 2xx succeeds. A JSON object becomes the run's `output`; the text of any answer becomes the log.
/// - 202 means "I finish it myself": the run is then held for `callback_timeout_seconds`, by no worker, until it is finished
///   at the callback's `url` with its `token`, which is good for this attempt alone. Keep it secret, also from the answer.
///   Whether somebody cancelled the run meanwhile is answered by `POST /api/v1/leases/heartbeat`; nothing calls the server.
/// - Anything else fails, and `Retry-After` (seconds or a date, at most a day) puts the next attempt off. Redirects are not
///   followed, unless the workers' SINGLETRACK_HTTP_REDIRECTS lets them.
///
/// The time limit holds from the connection to the end of the answer. At the limit, on cancel, and when the worker stops or
/// loses the lease, the connection is closed, and the server may go on all the same: it should end its work when the
/// connection closes, refuse a lower `Singletrack-Fence` than it has seen for the workflow, and do nothing twice
/// for one `Idempotency-Key`.
///
/// Only public addresses are reached, and what the workers' SINGLETRACK_HTTP_ALLOW adds to them. Certificates are always
/// checked.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct Http {
    /// Where to; http or https, without user and password.
    #[schema(example = "https://jobs.example.com/nightly")]
    pub url: String,
    /// The method.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(default = "POST")]
    pub method: Option<Method>,
    /// Headers added to the request.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// How long after a 202 the run may be finished, in seconds; then it is `timed_out`. Without it `timeout_seconds`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 31536000)]
    pub callback_timeout_seconds: Option<i32>,
}

/// A method that carries a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "each is its name")]
pub enum Method {
    Post,
    Put,
    Patch,
}

/// The members of all types: read as one, so that a mistake in any of them is found where it is. A tagged enum would be
/// read into a buffer first, and the place would be lost.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Members {
    r#type: Type,
    argv: Option<Vec<String>>,
    cwd: Option<String>,
    env: Option<BTreeMap<String, String>>,
    env_pass: Option<Vec<String>>,
    user: Option<String>,
    limits: Option<Object<Limits>>,
    url: Option<String>,
    method: Option<Method>,
    headers: Option<BTreeMap<String, String>>,
    callback_timeout_seconds: Option<i32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Type {
    Command,
    Http,
    Pull,
    Handler,
}

impl Members {
    /// The first member that is given and belongs to another type.
    fn foreign(&self) -> Option<&'static str> {
        let members = [
            ("argv", self.argv.is_some(), Type::Command),
            ("cwd", self.cwd.is_some(), Type::Command),
            ("env", self.env.is_some(), Type::Command),
            ("env_pass", self.env_pass.is_some(), Type::Command),
            ("user", self.user.is_some(), Type::Command),
            ("limits", self.limits.is_some(), Type::Command),
            ("url", self.url.is_some(), Type::Http),
            ("method", self.method.is_some(), Type::Http),
            ("headers", self.headers.is_some(), Type::Http),
            ("callback_timeout_seconds", self.callback_timeout_seconds.is_some(), Type::Http),
        ];
        members.into_iter().find(|(_, given, of)| *given && *of != self.r#type).map(|(name, ..)| name)
    }
}

impl TryFrom<Object<Members>> for Executor {
    type Error = String;

    fn try_from(Object(members): Object<Members>) -> Result<Self, String> {
        if let Some(name) = members.foreign() {
            // In serde's words: the API finds the place by them.
            return Err(format!("unknown field `{name}`, it is of another type of executor"));
        }
        Ok(match members.r#type {
            Type::Command => Self::Command(Command {
                argv: members.argv.ok_or("missing field `argv`")?,
                cwd: members.cwd,
                env: members.env.unwrap_or_default(),
                env_pass: members.env_pass.unwrap_or_default(),
                user: members.user,
                limits: members.limits.map(|Object(limits)| limits).unwrap_or_default(),
            }),
            Type::Http => Self::Http(Http {
                url: members.url.ok_or("missing field `url`")?,
                method: members.method,
                headers: members.headers.unwrap_or_default(),
                callback_timeout_seconds: members.callback_timeout_seconds,
            }),
            Type::Pull => Self::Pull,
            Type::Handler => Self::Handler,
        })
    }
}

impl Executor {
    /// The `type`, as it is stored with each run.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Command(_) => "command",
            Self::Http(_) => "http",
            Self::Pull => "pull",
            Self::Handler => "handler",
        }
    }

    /// Every wrong member, and what is wrong with it.
    pub(super) fn mistakes(&self) -> Vec<(&'static str, String)> {
        let checks = match self {
            Self::Command(command) => vec![
                ("argv", check_argv(&command.argv)),
                ("cwd", check_cwd(command.cwd.as_deref())),
                ("env", check_env(&command.env)),
                ("env_pass", check_env_pass(&command.env_pass)),
                ("user", check_user(command.user.as_deref())),
                ("limits/memory_bytes", at_least(1 << 20, command.limits.memory_bytes)),
                ("limits/open_files", at_least(16, command.limits.open_files)),
                ("limits/processes", at_least(1, command.limits.processes)),
                ("limits/log_bytes", at_most(MAX_LOG_BYTES, command.limits.log_bytes)),
                ("limits/output_bytes", at_most(MAX_OUTPUT_BYTES, command.limits.output_bytes)),
            ],
            Self::Http(http) => vec![
                ("url", check_url(&http.url)),
                ("headers", check_headers(&http.headers)),
                ("callback_timeout_seconds", check_seconds(http.callback_timeout_seconds, 365 * 24 * 3600)),
            ],
            Self::Pull | Self::Handler => Vec::new(),
        };
        checks.into_iter().filter_map(|(name, check)| Some((name, check.err()?))).collect()
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
        check_variable(name)?;
        if value.contains('\0') {
            return Err(format!("`{}`: its value has a NUL", name.escape_debug()));
        }
    }
    Ok(())
}

fn check_env_pass(names: &[String]) -> Result<(), String> {
    for name in names {
        check_variable(name)?;
        if name == "DATABASE_URL" {
            return Err("`DATABASE_URL` is the service's own: a command gets a way to a database by `env`".into());
        }
    }
    Ok(())
}

fn check_variable(name: &str) -> Result<(), String> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err(format!("`{}`: a name is not empty and has neither `=` nor NUL", name.escape_debug()));
    }
    if name.starts_with("SINGLETRACK_") {
        return Err(format!("`{name}`: names beginning with SINGLETRACK_ are the service's own"));
    }
    Ok(())
}

fn check_user(user: Option<&str>) -> Result<(), String> {
    match user {
        Some(user) if user.is_empty() || user.contains([':', '/', '\0']) => {
            Err(format!("`{}` is not the name of an account", user.escape_debug()))
        }
        _ => Ok(()),
    }
}

fn at_least(least: u64, given: Option<u64>) -> Result<(), String> {
    match given {
        Some(given) if given < least => Err(format!("{given} is too small: at least {least}")),
        _ => Ok(()),
    }
}

fn at_most(most: u64, given: Option<u64>) -> Result<(), String> {
    match given {
        Some(given) if given > most => Err(format!("{given} is too large: at most {most}")),
        _ => Ok(()),
    }
}

fn check_url(url: &str) -> Result<(), String> {
    if url.contains(|c: char| c.is_control() || c.is_whitespace()) {
        return Err("has a space or control character: %-encode it".into());
    }
    // The client's own parser: nothing that the two of them read differently.
    match Url::parse(url) {
        Ok(url) if !matches!(url.scheme(), "http" | "https") => Err("must begin with http:// or https://".into()),
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            Err("must not hold a user or password: use `headers`".into())
        }
        Ok(_) => Ok(()),
        Err(error) => Err(format!("is not a URL such as https://jobs.example.com/nightly: {error}")),
    }
}

/// Headers that the service sets itself, or that are about the connection.
const OWN_HEADERS: [&str; 13] = [
    "host",
    "content-length",
    "content-type",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "proxy-authorization",
    "upgrade",
    "te",
    "trailer",
    "idempotency-key",
    "traceparent",
    "expect",
];

fn check_headers(headers: &BTreeMap<String, String>) -> Result<(), String> {
    // The characters of a field name: RFC 9110, section 5.6.2.
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let mut given = BTreeSet::new();
    for (name, value) in headers {
        if name.is_empty() || !name.chars().all(is_token) {
            return Err(format!("`{}` is not the name of a header", name.escape_debug()));
        }
        let lower = name.to_ascii_lowercase();
        if OWN_HEADERS.contains(&lower.as_str()) || lower.starts_with("singletrack-") {
            return Err(format!("`{name}` is set by the service itself"));
        }
        if !given.insert(lower) {
            return Err(format!("`{name}` is there twice: upper and lower case are the same in a header's name"));
        }
        if value.contains(|c: char| c.is_control() && c != '\t') {
            return Err(format!("`{name}`: its value has a control character"));
        }
    }
    Ok(())
}
