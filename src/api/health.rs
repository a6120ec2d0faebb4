//! Probes.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use super::Api;
use crate::store::migrate;

const TAG: &str = "machines";

/// Whether the process is alive
///
/// Depends on nothing else.
#[utoipa::path(get, path = "/livez", tag = TAG, responses((status = 200, body = String)))]
pub(super) async fn livez() -> &'static str {
    "ok\n"
}

/// Whether the replica can do its work, check by check.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Readiness {
    /// All checks passed.
    ready: bool,
    /// `ok`, or why the database can't be used.
    database: String,
    /// `ok`, or what is wrong with the schema's version.
    schema: String,
    /// The replica is stopping.
    draining: bool,
}

/// Whether to send requests here
///
/// The database answers, its schema is at least as new as this version, and the replica is not stopping.
#[utoipa::path(get, path = "/readyz", tag = TAG,
    responses((status = 200, body = Readiness), (status = 503, body = Readiness, description = "Not now: the body says why")))]
pub(super) async fn readyz(State(api): State<Api>) -> (StatusCode, Json<Readiness>) {
    let applied = api.db.with(async |connection| migrate::applied(connection).await).await;
    let (database, schema) = match applied {
        Ok(Some(version)) if version >= migrate::newest() => ("ok".into(), "ok".into()),
        Ok(version) => {
            let version = version.unwrap_or_default();
            ("ok".into(), format!("at migration {version} of {}: run `singletrack migrate`", migrate::newest()))
        }
        Err(error) => {
            tracing::warn!(%error, "not ready");
            ("can't be used right now".to_owned(), "unknown".into())
        }
    };
    let draining = api.draining.is_cancelled();
    let ready = database == "ok" && schema == "ok" && !draining;
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Readiness { ready, database, schema, draining }))
}
