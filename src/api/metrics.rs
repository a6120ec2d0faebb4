//! What a replica tells Prometheus.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use tokio::sync::Mutex;

use super::Api;
use super::auth::Caller;
use super::problem::{self, Problem};
use super::system::pools;
use crate::metrics::{MEDIA_TYPE, METRICS, render};
use crate::store::depth::depth;

/// For so long what the database said is given again: several who scrape cost it no more than one.
const FRESH: Duration = Duration::from_secs(5);

const KNOWN: [Method; 5] = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE];

/// When the database was last asked.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked(Arc<Mutex<Option<Instant>>>);

/// Metrics
///
/// In Prometheus' text format. Counters and histograms are of this replica since it started; `singletrack_runs`,
/// `singletrack_oldest_queued_age_seconds` and `singletrack_events_lag_seconds` are of the whole database, as it was at most 5 seconds ago, and
/// left out while it does not answer.
#[utoipa::path(get, path = "/metrics", operation_id = "metrics", tag = "machines",
    responses((status = 200, body = String, content_type = "text/plain")))]
pub(super) async fn serve(State(api): State<Api>, caller: Caller) -> Result<Response, Problem> {
    // Sums of all workflows are not for who may see some of them.
    caller.check_unbound()?;
    ask(&api).await;
    let text = render().map_err(|error| Problem::internal(format!("can't render the metrics: {error}")))?;
    Ok(([(header::CONTENT_TYPE, MEDIA_TYPE)], text).into_response())
}

/// Asks the database and the pools.
async fn ask(api: &Api) {
    for pool in pools(api) {
        for (state, count) in pool.states() {
            METRICS.connections.with_label_values(&[pool.name, state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
    let mut asked = api.notes.asked.0.lock().await;
    if asked.is_some_and(|at| at.elapsed() < FRESH) {
        return;
    }
    match api.db.with(depth).await {
        Ok(found) => {
            let counts = [
                ("scheduled", found.scheduled),
                ("waiting", found.waiting),
                ("queued", found.queued),
                ("running", found.running),
            ];
            counts.iter().for_each(|(status, count)| METRICS.runs.with_label_values(&[*status]).set(*count));
            METRICS.ages.oldest_queued.with_label_values::<&str>(&[]).set(found.oldest_queued_seconds);
            METRICS.ages.events_lag.with_label_values::<&str>(&[]).set(found.events_lag_seconds);
            METRICS.database_up.set(1);
            *asked = Some(Instant::now());
        }
        Err(error) => {
            tracing::warn!(%error, "can't ask the database for metrics");
            METRICS.runs.reset();
            METRICS.ages.oldest_queued.reset();
            METRICS.ages.events_lag.reset();
            METRICS.database_up.set(0);
        }
    }
}

/// Measures each request until its answer begins. Nobody is in front of it who answers with a problem.
pub(super) async fn measure(request: Request, next: Next) -> Response {
    let since = Instant::now();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let id = request.extensions().get().cloned();
    let response = problem::answering(id, next.run(request)).await;
    // A path that no route has is anybody's invention, and so are methods.
    if let Some(route) = route {
        let method = if KNOWN.contains(&method) { method.as_str() } else { "other" };
        let status = response.status();
        let labels = [method, route.as_str(), status.as_str()];
        METRICS.requests.with_label_values(&labels).observe(since.elapsed().as_secs_f64());
    }
    response
}
