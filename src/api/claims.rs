//! Claiming runs over HTTP: a long poll, and a repetition that takes nothing twice.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use rand::random_range;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::auth::Caller;
use super::extract::Json;
use super::leases::TAG;
use super::problem::{Mistake, Place, Problem};
use super::{Api, Terms, to_its_end};
use crate::domain::workflow::check_queue;
use crate::domain::{Run, WorkflowId};
use crate::store;
use crate::store::claim::{Claim, Claimed, FRESH, RECENT, claim as claim_runs, taken_before};
use crate::store::workers::Subscription;
use crate::traces;

/// How often a claim that waits looks for runs, at most; for those that its own replica enqueues it is woken.
const POLL: Duration = Duration::from_secs(1);
/// How often a claim whose outcome is unknown is repeated.
const REPEATS: usize = 3;

/// What a claim may say.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "worker": "builder-7:4711", "claim_id": "5b1f0c9e-7d0a-4c3e-9a57-0d3c7f1f6b21", "workflows": ["deploy"], "max": 4, "wait_seconds": 30
}))]
pub(super) struct NewClaim {
    /// Who claims, as the history will say: 1 to 128 characters, best of one process alone.
    #[schema(min_length = 1, max_length = 128, example = "builder-7:4711")]
    worker: String,
    /// A new one for each claim, such as a random UUID: 1 to 128 characters. When the answer is lost, the same request again
    /// gets what the first one took, as far as it is not over since, and nothing besides.
    #[schema(min_length = 1, max_length = 128)]
    claim_id: Option<String>,
    /// Only runs in these queues: 1 to 100.
    #[schema(min_items = 1, max_items = 100)]
    queues: Option<Vec<String>>,
    /// Only runs of these workflows, 1 to 100: full ids, or definitions with all their instances.
    #[schema(min_items = 1, max_items = 100, example = json!(["deploy", "test@nightly"]))]
    workflows: Option<Vec<String>>,
    /// How many runs at most: 1 to 100.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 100, default = 1)]
    max: i64,
    /// How long to wait until there is one: 0 to 60 seconds.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 60, default = 0)]
    wait_seconds: u64,
    /// The workflows that the key is bound to.
    #[serde(skip)]
    bound: Option<String>,
    /// The key's name.
    #[serde(skip)]
    actor: Option<String>,
}

fn one() -> i64 {
    1
}

impl NewClaim {
    fn check(&self) -> Result<(), Problem> {
        let mut checks = vec![("/worker".to_owned(), check_name(&self.worker))];
        checks.extend(self.claim_id.iter().map(|id| ("/claim_id".to_owned(), check_name(id))));
        let lists = [("/queues", &self.queues), ("/workflows", &self.workflows)];
        for (pointer, list) in lists.into_iter().filter_map(|(pointer, list)| Some((pointer, list.as_ref()?))) {
            let check = if pointer == "/queues" { check_queue } else { check_workflow };
            checks.push((pointer.to_owned(), check_length(list)));
            checks.extend(list.iter().enumerate().map(|(at, name)| (format!("{pointer}/{at}"), check(name))));
        }
        let range = |good, range| if good { Ok(()) } else { Err(format!("is out of range: {range}")) };
        checks.push(("/max".to_owned(), range((1..=100).contains(&self.max), "1 to 100")));
        checks.push(("/wait_seconds".to_owned(), range(self.wait_seconds <= 60, "0 to 60")));
        let mistake = |(pointer, check): (_, Result<_, _>)| {
            Some(Mistake { place: Place::Pointer(pointer), detail: check.err()? })
        };
        let mistakes: Vec<_> = checks.into_iter().filter_map(mistake).collect();
        if mistakes.is_empty() { Ok(()) } else { Err(Problem::invalid(mistakes)) }
    }

    fn subscription(&self) -> Subscription {
        Subscription {
            executor_types: vec!["pull".to_owned()],
            queues: self.queues.clone(),
            workflows: self.workflows.clone(),
        }
    }
}

fn check_name(name: &str) -> Result<(), String> {
    if (1..=128).contains(&name.chars().count()) { Ok(()) } else { Err("must be 1 to 128 characters".into()) }
}

fn check_length(list: &[String]) -> Result<(), String> {
    if (1..=100).contains(&list.len()) {
        Ok(())
    } else {
        Err("must have 1 to 100 entries; leave it out for all".into())
    }
}

fn check_workflow(id: &str) -> Result<(), String> {
    id.parse::<WorkflowId>().map(|_| ())
}

/// What was claimed.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Claims {
    /// Highest priority first. None, when the time to wait is over, or the replica is stopping.
    runs: Vec<ClaimedRun>,
}

/// A run, and the right to act for it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct ClaimedRun {
    #[serde(flatten)]
    run: Run,
    /// The right to act for it.
    lease: LeaseTerms,
}

/// The right to act for a run, and what keeps it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct LeaseTerms {
    /// Names the lease in all that is said of this attempt. A secret.
    #[schema(example = "st1_AZjFoFoeflydPD9tKhtMXQAAAAAAAAAqPqk2pSx6TBKMs1oXgGfYiA")]
    token: String,
    /// Grows with every claim. Hand it to what the work writes to, and let it refuse smaller ones.
    fence: i64,
    /// Silence after which the lease is lost.
    heartbeat_timeout_seconds: i32,
    /// How often to send a heartbeat.
    heartbeat_interval_seconds: f64,
}

impl ClaimedRun {
    fn of(Claimed { lease, mut run, .. }: Claimed, terms: &Terms) -> Self {
        run.traceparent = traces::hand_on(&run);
        // A claim fills it.
        let timeout = run.heartbeat_timeout_seconds.unwrap_or_default();
        let lease = LeaseTerms {
            token: lease.token().unwrap_or_default(),
            fence: lease.fence,
            heartbeat_timeout_seconds: timeout,
            heartbeat_interval_seconds: terms.heartbeat_interval.as_secs_f64().min(f64::from(timeout) / 4.0),
        };
        Self { run, lease }
    }
}

/// Claim runs
///
/// Takes due runs of workflows with the executor `pull`, highest priority first. What is claimed is `running`, and the worker's.
///
/// The first heartbeat confirms a lease: send it before any work, and begin only when its answer is `ok`. A lease that is not
/// confirmed within its heartbeat timeout goes back to `queued` without costing an attempt, three times per run; then that is
/// an attempt that ended `stale`. So an answer that was lost on the way costs time only; and none, when the request is
/// repeated with its `claim_id`.
///
/// After that send a heartbeat every `heartbeat_interval_seconds`: by its answer a request to cancel and the time limit reach
/// the worker. One that could send none for most of the timeout must stop its work, for somebody else may be about to begin.
#[utoipa::path(
    post, path = "/api/v1/claims", operation_id = "claim_runs", tag = TAG,
    request_body = NewClaim,
    responses((status = 200, body = Claims, description = "What was claimed; nothing, where nothing was due"),
              (status = 400, body = Problem), (status = 413, body = Problem), (status = 415, body = Problem),
              (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn claim(
    State(api): State<Api>,
    caller: Caller,
    Json(mut wanted): Json<NewClaim>,
) -> Result<axum::Json<Claims>, Problem> {
    wanted.check()?;
    let (since, wait) = (Instant::now(), Duration::from_secs(wanted.wait_seconds));
    let place = api.facts.claimants.try_acquire();
    let wait = if place.is_ok() { wait } else { Duration::ZERO };
    wanted.bound = caller.bound();
    wanted.actor = caller.name().map(str::to_owned);
    // Another key that says the same is somebody else, who gets no lease of this one's.
    if let (Some(id), Caller::Key(_)) = (&mut wanted.claim_id, &caller) {
        id.insert_str(0, &format!("{}:", caller.key_id()));
    }
    let wanted = Arc::new(wanted);
    let subscription = wanted.subscription();
    let mut clear: Option<Instant> = None;
    while !api.draining.is_cancelled() {
        // Listening before it looks, or it would miss what is enqueued in between.
        let mut woken = pin!(api.wake_pull.notified());
        woken.as_mut().enable();
        api.notes.presence.seen(&wanted.worker, &subscription);
        let recent = clear.filter(|clear| clear.elapsed() < FRESH).map(|_| RECENT);
        if recent.is_none() {
            clear = Some(Instant::now());
        }
        let claimed = take(&api, &wanted, recent).await?;
        let left = wait.saturating_sub(since.elapsed());
        if !claimed.is_empty() || left.is_zero() {
            // What was taken under the same id before may have been somebody else's.
            let claimed = claimed.into_iter().filter(|claimed| caller.sees(&claimed.run.workflow_id));
            let runs = claimed.map(|claimed| ClaimedRun::of(claimed, &api.facts.terms)).collect();
            return Ok(axum::Json(Claims { runs }));
        }
        tokio::select! {
            () = woken => {}
            () = sleep(left.min(POLL.mul_f64(random_range(0.8..=1.0)))) => {}
            () = api.draining.cancelled() => {}
        }
    }
    // It takes nothing any more. What was taken under this id before is its answer all the same.
    let taken = match &wanted.claim_id {
        Some(id) => api
            .db
            .with(async |connection| taken_before(connection, &wanted.worker, id).await)
            .await?
            .unwrap_or_default(),
        None => Vec::new(),
    };
    let taken = taken.into_iter().filter(|claimed| caller.sees(&claimed.run.workflow_id));
    let runs = taken.map(|claimed| ClaimedRun::of(claimed, &api.facts.terms)).collect();
    Ok(axum::Json(Claims { runs }))
}

/// Claims once.
async fn take(api: &Api, wanted: &Arc<NewClaim>, recent: Option<Duration>) -> Result<Vec<Claimed>, Problem> {
    let work = {
        let (api, wanted) = (api.clone(), wanted.clone());
        async move { take_surely(&api, &wanted, recent).await }
    };
    let claimed = to_its_end(work).await?.map_err(|error| match error.outcome_unknown() {
        true => Problem::claim_unknown(&error, wanted.claim_id.is_some()),
        false => error.into(),
    })?;
    for Claimed { run, .. } in &claimed {
        tracing::debug!(run.id = %run.id, workflow.id = run.workflow_id, run.fence, worker = run.worker, "claimed");
    }
    Ok(claimed)
}

/// When a claim's outcome is unknown, the same claim is repeated on another connection: it finds what the first one took, or
/// waits for it at the unique index. Only that it finds nothing proves nothing, for the first may still commit.
async fn take_surely(api: &Api, wanted: &NewClaim, recent: Option<Duration>) -> Result<Vec<Claimed>, store::Error> {
    let (terms, executor_types) = (&api.facts.terms, ["pull".to_owned()]);
    let request = Claim {
        worker: &wanted.worker,
        actor: wanted.actor.as_deref(),
        queues: wanted.queues.as_deref(),
        executor_types: &executor_types,
        workflows: wanted.workflows.as_deref(),
        bound: wanted.bound.as_deref(),
        claim_id: wanted.claim_id.as_deref(),
        recent,
        limit: wanted.max,
        timeout_seconds: i32::try_from(terms.run_timeout.as_secs()).unwrap_or(i32::MAX),
        heartbeat_timeout_seconds: i32::try_from(terms.heartbeat_timeout.as_secs()).unwrap_or(i32::MAX),
    };
    let claim = async || api.flights.with(async |connection| claim_runs(connection, &request).await).await;
    let lost = match claim().await {
        Err(error) if error.outcome_unknown() && wanted.claim_id.is_some() => error,
        answer => return answer,
    };
    for _ in 0..REPEATS {
        sleep(Duration::from_millis(200)).await;
        if let Ok(claimed) = claim().await
            && !claimed.is_empty()
        {
            return Ok(claimed);
        }
    }
    Err(lost)
}
