//! What this replica is, for whoever runs it.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use super::Api;
use super::auth::Caller;
use super::problem::Problem;
use crate::store::system::{Database, database};

/// A replica, and what it works with.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct System {
    /// The replica's version.
    version: &'static str,
    /// The settings in force by the names of their variables, as `--print-config` prints them: secrets are hidden.
    settings: BTreeMap<String, String>,
    /// The database.
    database: Database,
    /// The replica's connections to it.
    pools: Vec<Pool>,
}

/// Connections that are shared.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Pool {
    /// `main`, or `flights`: for what many ask at once.
    pub(super) name: &'static str,
    /// Most that it may have.
    max: usize,
    /// Open ones that nobody uses.
    idle: usize,
    /// Open ones in use.
    used: usize,
    /// Requests that wait for one.
    wanted: usize,
}

/// The pools, as they are now.
pub(super) fn pools(api: &Api) -> [Pool; 2] {
    [("main", &api.db), ("flights", &api.flights)].map(|(name, db)| {
        let status = db.status();
        let used = status.size.saturating_sub(status.available);
        Pool { name, max: status.max_size, idle: status.available, used, wanted: status.waiting }
    })
}

impl Pool {
    /// Its connections by state.
    pub(super) fn states(&self) -> [(&'static str, usize); 3] {
        [("idle", self.idle), ("used", self.used), ("wanted", self.wanted)]
    }
}

/// System
///
/// The replica that answers: its version, its settings with secrets hidden, the database, and its connections to it.
#[utoipa::path(
    get, path = "/api/v1/system", operation_id = "get_system", tag = "machines",
    responses((status = 200, body = System), (status = 503, body = Problem)))]
pub(super) async fn get(State(api): State<Api>, caller: Caller) -> Result<Json<System>, Problem> {
    caller.check_unbound()?;
    let database = api.db.with(database).await?;
    let lines = api.facts.settings.lines().filter_map(|line| line.split_once('='));
    let settings = lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    Ok(Json(System { version: env!("CARGO_PKG_VERSION"), settings, database, pools: pools(&api).into() }))
}
