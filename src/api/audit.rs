//! What people and keys changed besides runs.

use axum::extract::State;

use super::auth::Caller;
use super::extract::Params;
use super::page::{Page, Wanted};
use super::problem::Problem;
use crate::store::Db;
use crate::store::audit::{self, AuditEntry, Filter};

/// Audit log
///
/// Who defined, deleted, paused and resumed what, and who made and revoked keys; newest first. Entries are kept for ever. What became of runs
/// is in their events.
#[utoipa::path(
    get, path = "/api/v1/audit", operation_id = "list_audit", tag = "keys",
    params(("actor" = Option<String>, Query, description = "By whom"),
           ("object" = Option<String>, Query, description = "To what: a workflow id, a queue, the id of a key"),
           ("limit" = Option<i64>, Query, minimum = 1, maximum = 200, description = "50 without it"),
           ("cursor" = Option<String>, Query, min_length = 1, description = "`next_cursor` of the page before, with the same filters")),
    responses((status = 200, body = Page<AuditEntry>, headers(("Link" = String, description = "`rel=\"next\"`: the next page, where there is one"))),
              (status = 400, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn list(
    State(db): State<Db>,
    caller: Caller,
    mut params: Params,
) -> Result<Page<AuditEntry>, Problem> {
    caller.check_unbound()?;
    let filter = Filter { actor: params.one("actor")?, object: params.one("object")? };
    let wanted = Wanted::<i64>::take(&mut params, &("audit", &filter))?;
    params.finish(&["actor", "object", "limit", "cursor"])?;
    let entries =
        db.with(async |connection| audit::list(connection, &filter, wanted.after, wanted.rows()).await).await?;
    Ok(wanted.page(entries, |entry| entry.id))
}
