//! Who was refused a slot, or joined the run that had it. A refusal writes nothing; what was counted is written together.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;
use uuid::Uuid;

/// Refusals that were counted and are not stored yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Counted {
    /// The run that held the slot.
    pub run_id: Uuid,
    /// Who asked; empty for those that were counted without their names.
    pub requester: String,
    /// How often.
    pub refusals: i64,
    /// How many seconds ago the first one was: ages, because times are the database's.
    pub first_seconds_ago: f64,
    /// How many seconds ago the last one was.
    pub last_seconds_ago: f64,
}

/// Adds what was counted, all of it or nothing. Those of one run, and of several at once, must come in the order of their runs.
pub async fn record(connection: &mut PgConnection, counted: &[Counted]) -> sqlx::Result<()> {
    let run_ids: Vec<Uuid> = counted.iter().map(|one| one.run_id).collect();
    let requesters: Vec<String> = counted.iter().map(|one| one.requester.clone()).collect();
    let refusals: Vec<i64> = counted.iter().map(|one| one.refusals).collect();
    let first: Vec<f64> = counted.iter().map(|one| one.first_seconds_ago).collect();
    let last: Vec<f64> = counted.iter().map(|one| one.last_seconds_ago).collect();
    sqlx::query!(
        "select record_refusals(array_agg(c.run_id), array_agg(c.requester), array_agg(c.refusals),
                                array_agg(now() - make_interval(secs => c.first_age)),
                                array_agg(now() - make_interval(secs => c.last_age)))
         from unnest($1::uuid[], $2::text[], $3::bigint[], $4::float8[], $5::float8[])
              as c (run_id, requester, refusals, first_age, last_age)",
        &run_ids,
        &requesters,
        &refusals,
        &first,
        &last,
    )
    .fetch_one(connection)
    .await?;
    Ok(())
}

/// How often one requester was refused because a run held the slot.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct Refusals {
    /// Who asked; null for all beyond the first 19 together.
    #[schema(example = "ci")]
    pub requester: Option<String>,
    /// How often.
    pub refusals: i64,
    /// The first time, to within a second.
    pub first_at: DateTime<Utc>,
    /// The last time, to within a second.
    pub last_at: DateTime<Utc>,
}

/// Who was refused because of a run, the most frequent first, and all the others together last: 20 at most.
pub async fn of(connection: &mut PgConnection, run_id: Uuid) -> sqlx::Result<Vec<Refusals>> {
    sqlx::query_as!(
        Refusals,
        "select nullif(requester, '') as requester, refusals, first_at, last_at
         from run_refusals
         where run_id = $1
         order by requester = '', refusals desc, requester",
        run_id,
    )
    .fetch_all(connection)
    .await
}
