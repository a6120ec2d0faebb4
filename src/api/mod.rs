//! The only place that knows HTTP. Handlers call `store`; they and the engine meet in rows and wake-ups only.

mod audit;
mod auth;
mod bulk;
mod claims;
mod control;
mod enqueue;
mod etag;
mod events;
mod extract;
mod feed;
mod follow;
mod guard;
mod health;
mod keys;
mod leases;
mod legacy;
mod metrics;
mod notes;
mod openapi;
mod page;
mod pauses;
mod presence;
mod problem;
mod refusals;
mod runs;
mod schedules;
mod slots;
mod system;
mod usage;
mod workflows;

use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRef};
use axum::http::{HeaderName, HeaderValue, Request, header};
use axum::middleware;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_http::ServiceBuilderExt as _;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, RequestId};
use tower_http::set_header::SetResponseHeaderLayer;
use tower_http::trace::TraceLayer;
use utoipa::openapi::security::SecurityRequirement;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};
use utoipa_axum::routes;
use uuid::Uuid;

use crate::domain::{Run, Scope};
use crate::store::Db;
use crate::store::enqueuer::Enqueuer;
use crate::store::reports::Reports;
use crate::store::settler::Settler;

pub use auth::Keys;
pub use feed::{Feed, tell_events};
pub use notes::{LAST_NOTES, Notes, keep_notes};
pub use openapi::document;

/// Longest body of a request, in bytes.
pub const BODY_LIMIT: usize = 1 << 20;
/// Longest body of a batch of runs.
const BATCH_LIMIT: usize = 32 << 20;
/// Requests of a kind that may wait at once, for a run's end or for a run to claim; those beyond are answered without waiting.
const WAITERS: usize = 1000;
/// Batches of runs that are worked on at once: each may take a hundred MiB.
const BATCHES: usize = 4;

/// What handlers need: each layer of each request has a copy.
#[derive(Clone)]
pub struct Api(Arc<Shared>);

impl Deref for Api {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl From<Shared> for Api {
    fn from(shared: Shared) -> Self {
        Self(Arc::new(shared))
    }
}

/// What all handlers share.
pub struct Shared {
    /// The pool.
    pub db: Db,
    /// The pool for what is sent all the time.
    pub flights: Db,
    /// Enqueues runs, many at once.
    pub enqueuer: Enqueuer,
    /// Settles attempts, many at once.
    pub settler: Settler,
    /// Passes on what workers say while they work, many at once.
    pub reports: Reports,
    /// Told when something was enqueued for the workers of this replica.
    pub wake: Arc<Notify>,
    /// Told when something was enqueued that is claimed over HTTP.
    pub wake_pull: Arc<Notify>,
    /// Told when a workflow with a schedule was defined.
    pub wake_scheduler: Arc<Notify>,
    /// Cancelled when the replica begins to stop.
    pub draining: CancellationToken,
    /// What requests leave in memory until [`keep_notes`] writes it down.
    pub notes: Arc<Notes>,
    /// Who is let in.
    pub keys: Keys,
    /// Where listeners hear of events, which [`tell_events`] tells.
    pub feed: Arc<Feed>,
    /// What never changes while it runs.
    pub facts: Arc<Facts>,
}

/// What never changes while the service runs.
#[derive(Debug)]
pub struct Facts {
    /// The address listened on.
    pub listen: SocketAddr,
    /// How others reach it, where that was configured.
    pub public_url: Option<String>,
    /// The settings in force as `VARIABLE=value` lines, secrets hidden.
    pub settings: String,
    /// The smallest heartbeat timeout a workflow may ask for: the kill grace and the margin, and a second to renew in.
    pub shortest_heartbeat_timeout: Duration,
    /// What holds for workers that claim over HTTP.
    pub terms: Terms,
    /// How long an accepted answer is kept under its idempotency key.
    pub idempotency_ttl: Duration,
    /// Places for requests that wait for a run's end.
    pub waiters: Semaphore,
    /// Places for requests that wait for a run to claim.
    pub claimants: Semaphore,
    /// Places for batches of runs.
    pub batches: Semaphore,
}

/// What holds for workers that claim over HTTP, where the workflow says nothing else.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms {
    /// Longest time between two heartbeats that is asked for.
    pub heartbeat_interval: Duration,
    /// Silence after which a run is stale, in whole seconds.
    pub heartbeat_timeout: Duration,
    /// Longest an attempt may take, in whole seconds.
    pub run_timeout: Duration,
    /// Bytes of log kept per attempt.
    pub log_bytes: u64,
    /// Longest output, in bytes.
    pub output_bytes: usize,
}

impl Facts {
    /// The facts of a service that listens on `listen`.
    pub fn new(
        listen: SocketAddr,
        public_url: Option<String>,
        shortest_heartbeat_timeout: Duration,
        terms: Terms,
        idempotency_ttl: Duration,
    ) -> Self {
        let [waiters, claimants, batches] = [WAITERS, WAITERS, BATCHES].map(Semaphore::new);
        let settings = String::new();
        Self {
            listen,
            public_url,
            settings,
            shortest_heartbeat_timeout,
            terms,
            idempotency_ttl,
            waiters,
            claimants,
            batches,
        }
    }
}

impl Api {
    /// Tells those who could start `run` that it was enqueued. They would see it by themselves, later.
    fn announce(&self, run: &Run) {
        match run.executor_type.as_str() {
            "pull" => self.wake_pull.notify_waiters(),
            _ => self.wake.notify_one(),
        }
    }

    /// Tells everybody who starts runs that a slot may have been handed on, to a run of whatever kind.
    fn look_again(&self) {
        self.wake_pull.notify_waiters();
        self.wake.notify_one();
    }
}

impl FromRef<Api> for Db {
    fn from_ref(api: &Api) -> Self {
        api.db.clone()
    }
}

/// Every route, grouped by who calls it, with the scope that it needs; `admin` may all of it. `output_bytes` is how long an output may
/// be.
fn routes(output_bytes: usize) -> OpenApiRouter<Api> {
    use Scope::{Admin, Enqueue, Read, Work};
    OpenApiRouter::new()
        // whoever defines workflows
        .routes(to(Read, routes!(workflows::list)))
        .routes(to(Read, routes!(workflows::get)))
        .routes(to(Admin, routes!(workflows::put, workflows::delete)))
        .routes(to(Read, routes!(workflows::revisions)))
        .routes(to(Read, routes!(schedules::next)))
        // whoever starts runs
        .routes(to(Enqueue, routes!(enqueue::enqueue)))
        .merge(
            OpenApiRouter::new().routes(to(Enqueue, routes!(enqueue::batch))).layer(DefaultBodyLimit::max(BATCH_LIMIT)),
        )
        .routes(to(Enqueue, routes!(control::cancel)))
        .routes(to(Enqueue, routes!(control::rerun)))
        .routes(to(Enqueue, routes!(bulk::cancel)))
        .routes(to(Enqueue, routes!(bulk::rerun)))
        // whoever stops and starts what others defined
        .routes(to(Admin, routes!(pauses::pause_workflow)))
        .routes(to(Admin, routes!(pauses::resume_workflow)))
        .routes(to(Read, routes!(pauses::queues)))
        .routes(to(Admin, routes!(pauses::pause_queue)))
        .routes(to(Admin, routes!(pauses::resume_queue)))
        // whoever looks at them
        .routes(to(Read, routes!(runs::list)))
        .routes(to(Read, routes!(runs::counts)))
        .routes(to(Read, routes!(runs::get)))
        .routes(to(Read, routes!(runs::attempts)))
        .routes(to(Read, routes!(runs::events)))
        .routes(to(Read, routes!(runs::refusals)))
        .routes(to(Read, routes!(runs::logs)))
        .routes(to(Read, routes!(events::follow)))
        .routes(to(Read, routes!(slots::list)))
        .routes(to(Read, routes!(slots::workers)))
        // workers in any language
        .routes(to(Work, routes!(claims::claim)))
        .routes(to(Work, routes!(leases::heartbeat)))
        .merge(
            OpenApiRouter::new()
                // the lease's token is enough: http targets have no key
                .routes(to(None, routes!(leases::finish)))
                .layer(DefaultBodyLimit::max(BODY_LIMIT + output_bytes)),
        )
        .routes(to(Work, routes!(leases::release)))
        .routes(to(Work, routes!(leases::logs)))
        // clients of the workflow server that this one replaces
        .routes(to(Enqueue, routes!(legacy::start)))
        .routes(to(Read, routes!(legacy::get)))
        // whoever lets others in
        .routes(to(Admin, routes!(keys::list, keys::create)))
        .routes(to(Admin, routes!(keys::revoke)))
        .routes(to(Admin, routes!(audit::list)))
        .routes(to(Admin, routes!(system::get)))
        // machines
        .merge(probes())
        .routes(to(None, routes!(openapi::serve)))
}

/// The routes that a replica without an API has too.
fn probes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(to(None, routes!(health::livez)))
        .routes(to(None, routes!(health::readyz)))
        .routes(to(Scope::Read, routes!(metrics::serve)))
}

/// Writes into the document which scope these routes need. [`auth`] asks for what is written there.
fn to(
    scope: impl Into<Option<Scope>>,
    (schemas, mut paths, methods): UtoipaMethodRouter<Api>,
) -> UtoipaMethodRouter<Api> {
    let scope = scope.into().map(|scope| SecurityRequirement::new("api_key", [scope.as_str()]));
    let security: Vec<_> = std::iter::once(SecurityRequirement::default()).chain(scope).collect();
    for operation in paths.paths.values_mut().flat_map(openapi::operations) {
        operation.security = Some(security.clone());
    }
    (schemas, paths, methods)
}

/// The whole API, and `pages` that anybody may see.
pub fn router(api: Api, pages: Router) -> Router {
    finish(routes(api.facts.terms.output_bytes), api, pages)
}

/// Only the probes.
pub fn probes_router(api: Api) -> Router {
    finish(probes(), api, Router::new())
}

fn finish(routes: OpenApiRouter<Api>, api: Api, pages: Router) -> Router {
    let (router, document) = routes.split_for_parts();
    let gate = auth::Gate::new(api.clone(), &document);
    let router = router.fallback(problem::no_such_route).method_not_allowed_fallback(problem::no_such_method).layer(
        ServiceBuilder::new()
            .layer(DefaultBodyLimit::max(BODY_LIMIT))
            .layer(middleware::from_fn_with_state(gate, auth::admit)),
    );
    surround(router.with_state(api).merge(pages.method_not_allowed_fallback(problem::no_such_method)))
}

/// What holds of every answer, whoever gives it. As one layer: what is laid around a router by itself costs each request some copies.
fn surround<S: Clone + Send + Sync + 'static>(router: Router<S>) -> Router<S> {
    let request_id = HeaderName::from_static("x-request-id");
    router.layer(
        ServiceBuilder::new()
            .map_request(without_strange_id)
            .set_request_id(request_id.clone(), MakeRequestUuid)
            .layer(TraceLayer::new_for_http().make_span_with(span).on_request(()).on_failure(()))
            .propagate_request_id(request_id)
            .layer(unless_set(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
            .layer(unless_set(header::REFERRER_POLICY, "no-referrer"))
            .layer(unless_set(HeaderName::from_static("cross-origin-resource-policy"), "same-origin"))
            .layer(unless_set(header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"))
            .layer(middleware::from_fn(metrics::measure))
            .layer(CatchPanicLayer::custom(problem::of_panic)),
    )
}

/// A name for the request that could not be told from what is beside it in a log is replaced.
fn without_strange_id<B>(mut request: Request<B>) -> Request<B> {
    let is_strange =
        |id: &HeaderValue| !(1..=128).contains(&id.len()) || !id.as_bytes().iter().all(u8::is_ascii_graphic);
    if request.headers().get("x-request-id").is_some_and(is_strange) {
        request.headers_mut().remove("x-request-id");
    }
    request
}

/// Tells browsers what not to do with an answer; a page says for itself what it needs.
fn unless_set(name: HeaderName, value: &'static str) -> SetResponseHeaderLayer<HeaderValue> {
    SetResponseHeaderLayer::if_not_present(name, HeaderValue::from_static(value))
}

fn span<B>(request: &Request<B>) -> tracing::Span {
    let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
    tracing::info_span!("request", http.method = %request.method(), http.path = request.uri().path(), http.request_id = id)
}

/// Where a run is read.
fn run_path(run_id: Uuid) -> String {
    format!("/api/v1/runs/{run_id}")
}

/// Runs a write to its end even when the client hangs up: axum drops a handler whose client is gone, and a statement that
/// was sent must be followed to its answer.
async fn to_its_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, problem::Problem> {
    use tracing::Instrument as _;
    tokio::spawn(work.in_current_span()).await.map_err(|_| problem::Problem::internal("a write panicked"))
}
