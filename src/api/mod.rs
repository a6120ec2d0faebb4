//! The only place that knows HTTP. Handlers call `store`; they and the engine meet in rows and wake-ups only.

mod extract;
mod guard;
mod health;
mod legacy;
mod openapi;
mod page;
mod problem;
mod runs;
mod workflows;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRef};
use axum::http::{HeaderName, Request};
use axum::middleware;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_http::ServiceBuilderExt as _;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, RequestId};
use tower_http::trace::TraceLayer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::store::Db;

pub use openapi::document;

/// Longest body of a request, in bytes.
pub const BODY_LIMIT: usize = 1 << 20;
/// Requests that may wait for a run's end at once; beyond that they are answered without waiting.
const WAITERS: usize = 1000;

/// What handlers need.
#[derive(Clone)]
pub struct Api {
    /// The pool.
    pub db: Db,
    /// Told when something was enqueued.
    pub wake: Arc<Notify>,
    /// Cancelled when the replica begins to stop.
    pub draining: CancellationToken,
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
    /// The smallest heartbeat timeout a workflow may ask for: the kill grace and the margin, and a second to renew in.
    pub shortest_heartbeat_timeout: Duration,
    /// Places for requests that wait.
    pub waiters: Semaphore,
}

impl Facts {
    /// The facts of a service that listens on `listen`.
    pub fn new(listen: SocketAddr, public_url: Option<String>, shortest_heartbeat_timeout: Duration) -> Self {
        Self { listen, public_url, shortest_heartbeat_timeout, waiters: Semaphore::new(WAITERS) }
    }
}

impl FromRef<Api> for Db {
    fn from_ref(api: &Api) -> Self {
        api.db.clone()
    }
}

/// Every route, grouped by who calls it.
fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        // whoever defines workflows
        .routes(routes!(workflows::list))
        .routes(routes!(workflows::get, workflows::put, workflows::delete))
        .routes(routes!(workflows::revisions))
        // whoever starts runs
        .routes(routes!(runs::enqueue))
        // whoever looks at them
        .routes(routes!(runs::list))
        .routes(routes!(runs::counts))
        .routes(routes!(runs::get))
        .routes(routes!(runs::attempts))
        .routes(routes!(runs::events))
        .routes(routes!(runs::logs))
        // clients of the workflow server that this one replaces
        .routes(routes!(legacy::start))
        .routes(routes!(legacy::get))
        // machines
        .merge(probes())
        .routes(routes!(openapi::serve))
}

/// The routes that a replica without an API has too.
fn probes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(health::livez)).routes(routes!(health::readyz))
}

/// The whole API.
pub fn router(api: Api) -> Router {
    finish(routes(), api)
}

/// Only the probes.
pub fn probes_router(api: Api) -> Router {
    finish(probes(), api)
}

fn finish(routes: OpenApiRouter<Api>, api: Api) -> Router {
    let (router, _) = routes.split_for_parts();
    let request_id = HeaderName::from_static("x-request-id");
    router
        .fallback(problem::no_such_route)
        .method_not_allowed_fallback(problem::no_such_method)
        .layer(middleware::from_fn_with_state(api.clone(), guard::refuse_strangers))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(CatchPanicLayer::custom(problem::of_panic))
        .layer(
            ServiceBuilder::new()
                .set_request_id(request_id.clone(), MakeRequestUuid)
                .layer(TraceLayer::new_for_http().make_span_with(span).on_request(()).on_failure(()))
                .propagate_request_id(request_id),
        )
        .with_state(api)
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
