//! Who changed what besides runs. It is written where the change is made, in the same statement.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;

/// One change.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct AuditEntry {
    /// Grows with every change; one that was not made leaves a gap.
    pub id: i64,
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
    /// Who: a key's name; without keys what the requester called itself, or its address; on the command line the database user.
    #[schema(example = "ci")]
    pub actor: String,
    /// What was done.
    #[schema(example = "workflow-paused")]
    pub action: String,
    /// To what: a workflow id, a queue, the id of a key.
    #[schema(example = "deploy")]
    pub object: String,
    /// What else there is to say, such as the revision; no secrets.
    #[schema(value_type = Value)]
    pub detail: Option<serde_json::Value>,
}

/// Which changes are wanted; `None` for all.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Filter {
    /// By whom.
    pub actor: Option<String>,
    /// To what.
    pub object: Option<String>,
}

/// At most `limit` changes that came before the one with the id `before`, the last one first.
pub async fn list(
    connection: &mut PgConnection,
    filter: &Filter,
    before: Option<i64>,
    limit: i64,
) -> sqlx::Result<Vec<AuditEntry>> {
    sqlx::query_as!(
        AuditEntry,
        "select id, at, actor, action, object, detail
         from audit_log
         where id < coalesce($3, 9223372036854775807)
           and ($1::text is null or actor = $1)
           and ($2::text is null or object = $2)
         order by id desc
         limit $4",
        filter.actor,
        filter.object,
        before,
        limit,
    )
    .fetch_all(connection)
    .await
}
