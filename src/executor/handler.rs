//! The `handler` executor: an async function of the program that this library is embedded in.
//!
//! A handler has the same claim, heartbeats, fence and settling as a command. It is not a process of its own, though: what
//! a command is forced to do, a handler has to heed.
//!
//! - It is **told to stop** ([`Context::stopped`]) when somebody cancels the run, at the time limit, when the program stops, or when
//!   the lease can't be renewed. After the kill grace its future is dropped at its next `await`.
//! - A handler that **blocks its thread** (no `await`, long computations, blocking I/O) can't be dropped: it goes on, its slot of the
//!   worker stays taken, and once the lease has run out the next run may start beside it. Where handlers block all threads of
//!   the runtime, leases are not even renewed. Use `tokio::task::spawn_blocking` and check [`Context::stop_cause`] in it, or
//!   make it a command.
//! - What it spawns and does not wait for outlives it.
//! - Hand [`Context::fence`] to what it writes to, and have that refuse smaller numbers.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde::ser::Error as _;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::log::Log;
use super::output::storable;
use super::stop::{Stop, stopped};
use crate::domain::run::PROGRESS_BYTES;
use crate::domain::{LogChunk, Outcome, Run, StopCause, Stream, Verdict, WorkflowId};

/// Pieces of log that may wait; then [`Context::log`] waits.
const LOG_BACKLOG: usize = 64;
/// Longest piece of log, in bytes.
const LOG_PIECE: usize = 16 * 1024;
/// Longest error that is kept, in bytes.
const ERROR_BYTES: usize = 4 * 1024;
/// How long the rest of the log may take once the handler is over.
const LOG_PATIENCE: Duration = Duration::from_secs(10);
/// How often a handler that does not end is complained about.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// What a handler comes to: its output, or its error's text.
type Done = Result<Value, String>;
type Work = Pin<Box<dyn Future<Output = Done> + Send>>;
type Handler = dyn Fn(Context) -> Work + Send + Sync;

/// The handlers of a program, by workflow; `singletrack::embed` runs them.
///
/// ```
/// use singletrack::{Context, Handlers};
///
/// async fn sync(context: Context) -> Result<(), std::io::Error> {
///     context.log(format!("attempt {}", context.run().attempt)).await;
///     Ok(())
/// }
///
/// let handlers = Handlers::new().on(&"nightly-sync".parse()?, sync);
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Default)]
pub struct Handlers {
    by_workflow: BTreeMap<String, Arc<Handler>>,
}

impl Handlers {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Has runs of `workflow` done by `handler`; one that it had before is replaced. A handler for `deploy` does also runs of
    /// instances such as `deploy@prod` that use its definition, unless the instance has a handler of its own. The definition's
    /// executor must be `{"type": "handler"}`: runs of other types are not taken, and a run that no program has a handler for
    /// stays `queued` until it expires.
    ///
    /// `Ok` succeeds, also after it was told to stop: only the handler knows whether its work is done. What it returns becomes the
    /// run's `output`: an object as it is, nothing for `()`, anything else as `{"value": ...}`. `Err` fails, with its text (for
    /// `anyhow`, with its causes; at most 4 KiB) as the run's `error`; so does a panic, reason `panicked`. After a stop both are what the stop
    /// was for: `cancelled`, `timed_out` or `stale`.
    pub fn on<H, W, O, E>(mut self, workflow: &WorkflowId, handler: H) -> Self
    where
        H: Fn(Context) -> W + Send + Sync + 'static,
        W: Future<Output = Result<O, E>> + Send + 'static,
        O: Serialize,
        E: Display,
    {
        let boxed = move |context| {
            let work = handler(context);
            Box::pin(async move {
                match work.await {
                    Ok(output) => {
                        serde_json::to_value(output).map_err(|error| format!("its output is no JSON: {error}"))
                    }
                    Err(error) => Err(format!("{error:#}")),
                }
            }) as Work
        };
        self.by_workflow.insert(workflow.to_string(), Arc::new(boxed));
        self
    }

    /// The workflows that have one.
    pub(crate) fn workflows(&self) -> Vec<String> {
        self.by_workflow.keys().cloned().collect()
    }

    fn of(&self, run: &Run) -> Option<&Arc<Handler>> {
        self.by_workflow.get(&run.workflow_id).or_else(|| self.by_workflow.get(&run.definition))
    }
}

/// What a handler knows of its run, and can say about it. Clones are the same.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

struct Inner {
    run: Run,
    log: mpsc::Sender<String>,
    progress: Box<dyn Fn(Value) + Send + Sync>,
    told: watch::Receiver<Option<StopCause>>,
}

impl Context {
    /// The run, as it was claimed: its id, workflow, attempt, labels, ...
    pub fn run(&self) -> &Run {
        &self.0.run
    }

    /// The run's input.
    ///
    /// # Errors
    /// When it is not what `T` wants; a run without input has `null`.
    pub fn input<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_str(self.0.run.input.as_deref().map_or("null", |input| input.get()))
    }

    /// The number of this claim: larger than those of all before it. Whoever sees a larger one must refuse this one.
    pub fn fence(&self) -> i64 {
        self.0.run.fence
    }

    /// Adds a line to the run's log. Waits while the log can't be stored; what is said after the handler's end is dropped.
    pub async fn log(&self, line: impl Into<String>) {
        let mut line = line.into();
        line.push('\n');
        // An error means that the attempt is over.
        let _ = self.0.log.send(line).await;
    }

    /// Says how far it is, as any JSON of at most 16 KiB. It is stored with the next heartbeat, and the last one said counts.
    ///
    /// # Errors
    /// When it is no JSON, or too long.
    pub fn progress(&self, progress: impl Serialize) -> serde_json::Result<()> {
        let value = serde_json::to_value(progress)?;
        let bytes = value.to_string().len();
        if bytes > PROGRESS_BYTES {
            return Err(serde_json::Error::custom(format!(
                "progress has {bytes} bytes, at most {PROGRESS_BYTES} are kept"
            )));
        }
        (self.0.progress)(storable(value));
        Ok(())
    }

    /// Waits until the handler has to end, and says why. It has the kill grace from then on; a handler whose lease is lost is
    /// dropped at its next `await` instead, for the next run may have started. Never ends in a task that outlives the handler.
    pub async fn stopped(&self) -> StopCause {
        let mut told = self.0.told.clone();
        match told.wait_for(Option::is_some).await.map(|cause| *cause) {
            Ok(Some(cause)) => cause,
            // The attempt is over, and this a task that it left behind.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Why the handler has to end, if it has.
    pub fn stop_cause(&self) -> Option<StopCause> {
        *self.0.told.borrow()
    }
}

/// One attempt to have a handler do the work.
pub(crate) struct Call<'a> {
    /// Where to find it.
    pub(crate) handlers: &'a Handlers,
    /// The run, as claimed.
    pub(crate) run: &'a Run,
    /// From the call of [`run`] until the handler is told to stop.
    pub(crate) time_limit: Duration,
    /// From then until it is dropped.
    pub(crate) kill_grace: Duration,
    /// Bytes of log that are kept.
    pub(crate) log_bytes: u64,
    /// Bytes of JSON that may become the run's output.
    pub(crate) output_bytes: usize,
    /// Takes what the handler says about its progress.
    pub(crate) progress: Box<dyn Fn(Value) + Send + Sync>,
    /// Asked directly before the handler is started.
    pub(crate) may_start: Box<dyn Fn() -> bool + Send>,
}

/// Runs one attempt to its end. Dropping the future drops the handler's at its next `await`.
pub(crate) async fn run(
    call: Call<'_>,
    log: mpsc::Sender<LogChunk>,
    stop: watch::Receiver<Option<StopCause>>,
) -> Outcome {
    let Some(handler) = call.handlers.of(call.run) else {
        return failed("this program has no handler for the workflow".into());
    };
    let (log_to, said) = mpsc::channel(LOG_BACKLOG);
    let (tell, told) = watch::channel(None);
    let context = Context(Arc::new(Inner { run: call.run.clone(), log: log_to, progress: call.progress, told }));
    let mut stop = Stop::new(stop, call.time_limit);
    let (handler, may_start) = (handler.clone(), call.may_start);
    // Asked and called inside the task: where handlers block their threads it may wait for long until it gets one, and what
    // a handler does before its future may panic as well.
    let work = async move { if may_start() { Some(handler(context).await) } else { None } };
    let work = Spawned(tokio::spawn(work.in_current_span()));
    let over = CancellationToken::new();
    let mut log = Log::new(log, call.log_bytes);
    let following = async {
        let end = see_out(work, &mut stop, &tell, call.kill_grace).await;
        over.cancel();
        end
    };
    let keeping = keep(said, &mut log, over.clone());
    let ((joined, cause), ()) = tokio::join!(following, keeping);
    let (outcome, remark) = conclude(joined, cause, &call.time_limit, call.output_bytes);
    if let Some(remark) = remark {
        let _ = timeout(LOG_PATIENCE, log.send(Stream::System, remark)).await;
    }
    outcome
}

/// Keeps what the handler says, until it is over and all of it is kept, or that takes too long.
async fn keep(mut said: mpsc::Receiver<String>, log: &mut Log, over: CancellationToken) {
    let all = async {
        loop {
            let line = tokio::select! {
                biased;
                line = said.recv() => line,
                // What it left running may have a context for ever.
                () = over.cancelled(), if !said.is_closed() => { said.close(); continue }
            };
            let Some(line) = line else { return };
            let line = line.replace('\0', "\u{fffd}");
            let mut rest = line.as_str();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(rest.floor_char_boundary(LOG_PIECE));
                log.send(Stream::Stdout, piece.to_owned()).await;
                rest = after;
            }
        }
    };
    let too_long = async {
        over.cancelled().await;
        sleep(LOG_PATIENCE).await;
    };
    tokio::select! {
        () = all => {}
        () = too_long => {}
    }
}

/// A task that ends when this is dropped; it answers `None` where the handler was not to be started any more.
struct Spawned(JoinHandle<Option<Done>>);

impl Drop for Spawned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Follows a handler to its end, and says why it was told to stop, if it was.
async fn see_out(
    mut work: Spawned,
    stop: &mut Stop,
    tell: &watch::Sender<Option<StopCause>>,
    kill_grace: Duration,
) -> (Result<Option<Done>, JoinError>, Option<StopCause>) {
    let cause = tokio::select! {
        biased;
        joined = &mut work.0 => {
            let never_begun = matches!(joined, Ok(None));
            return (joined, never_begun.then(|| stop.too_late()));
        }
        cause = stop.requested() => cause,
    };
    // It may have let go of its context.
    let _ = tell.send(Some(cause));
    if cause != StopCause::LeaseLost {
        tokio::select! {
            joined = &mut work.0 => return (joined, Some(cause)),
            () = stop.lease_lost() => {}
            () = sleep(kill_grace) => {}
        }
    }
    work.0.abort();
    let since = Instant::now();
    loop {
        match timeout(COMPLAIN_EVERY, &mut work.0).await {
            Ok(joined) => return (joined, Some(cause)),
            Err(_) => tracing::warn!(
                seconds = since.elapsed().as_secs(),
                "a handler that was told to stop blocks its thread, its run cannot end before it"
            ),
        }
    }
}

/// What an end comes to, and a remark for the log.
fn conclude(
    joined: Result<Option<Done>, JoinError>,
    cause: Option<StopCause>,
    time_limit: &Duration,
    output_bytes: usize,
) -> (Outcome, Option<String>) {
    let error = match joined {
        Ok(Some(Ok(value))) => return succeeded(value, output_bytes),
        Ok(Some(Err(error))) => (None, error),
        Ok(None) => return (stopped(cause.unwrap_or(StopCause::Unrenewed), *time_limit), None),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => (Some("panicked"), format!("panicked: {}", text(panic.as_ref()))),
            // Dropped, which only a stop does.
            Err(_) => (None, "dropped after the kill grace".into()),
        },
    };
    let (reason, mut error) = (error.0, error.1.replace('\0', "\u{fffd}"));
    error.truncate(error.floor_char_boundary(ERROR_BYTES));
    let outcome = match cause {
        None => Outcome { reason: reason.map(str::to_owned), ..failed(error) },
        Some(cause) => {
            let outcome = stopped(cause, *time_limit);
            Outcome { error: outcome.error.map(|why| format!("{why}: {error}")), ..outcome }
        }
    };
    (outcome, None)
}

fn succeeded(value: Value, output_bytes: usize) -> (Outcome, Option<String>) {
    let output = match storable(value) {
        Value::Null => None,
        Value::Object(object) => Some(Value::Object(object)),
        other => Some(json!({"value": other})),
    };
    let done = Outcome::of(Verdict::Succeeded);
    match output {
        Some(output) if output.to_string().len() > output_bytes => (
            done,
            Some(format!("what the handler returned has more than {output_bytes} bytes and is not kept as output\n")),
        ),
        output => (Outcome { output, ..done }, None),
    }
}

fn failed(error: String) -> Outcome {
    Outcome { error: Some(error), ..Outcome::of(Verdict::Failed) }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a text")
}
