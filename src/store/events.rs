//! The events of all runs, in an order in which none comes later before one that was read.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;
use uuid::Uuid;

/// A place in that order: the transaction that wrote an event, and the event's number. Written as `xid-seq`.
///
/// Numbers alone will not do: one that was given out early may become visible after larger ones. Those of transactions before the
/// oldest one that is open are all there, and whoever reads stops at that one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    xid: i64,
    seq: i64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.xid, self.seq)
    }
}

impl FromStr for Position {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.parse::<u64>().ok().and_then(|number| i64::try_from(number).ok());
        let parsed = text.split_once('-').and_then(|(xid, seq)| Some(Self { xid: number(xid)?, seq: number(seq)? }));
        parsed.ok_or("is not the id of an event of this stream")
    }
}

/// A change of a run's status, or a request to cancel it while it runs: then `from` and `to` are both `running`.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct Change {
    /// Grows within a run.
    pub seq: i64,
    /// The run.
    pub run_id: Uuid,
    /// Its full workflow id.
    #[schema(example = "deploy@prod")]
    pub workflow_id: String,
    /// Its definition.
    #[schema(example = "deploy")]
    pub definition: String,
    /// Its queue.
    #[schema(example = "default")]
    pub queue: String,
    /// The status before; null for the first event.
    pub from: Option<String>,
    /// The status from then on.
    #[schema(example = "queued")]
    pub to: String,
    /// The run's attempt at that moment.
    pub attempt: i32,
    /// The run's fence at that moment.
    pub fence: i64,
    /// Who did it: a requester, a worker, `reaper`, or a database user for a change by hand.
    pub actor: String,
    /// Why, where the statuses alone do not say it.
    pub reason: Option<String>,
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
}

/// What comes after a position.
#[derive(Clone, Debug, PartialEq)]
pub struct Page {
    /// Events in their order.
    pub changes: Vec<(Position, Change)>,
    /// Everything up to here is in `changes`.
    pub upto: Position,
    /// There may be more that can be read by now.
    pub full: bool,
    /// Age of the oldest event that can't be told yet, because a transaction which began to write before it is open.
    pub held_back: Option<Duration>,
    /// Events after the position were deleted.
    pub forgotten: bool,
    /// The position is none of this database, which is another one, or has lost its last transactions.
    pub foreign: bool,
}

/// Where an event stands that is yet to come.
pub async fn now(connection: &mut PgConnection) -> sqlx::Result<Position> {
    let xid = sqlx::query_scalar!(r#"select events_horizon()::text::bigint as "xid!""#);
    Ok(Position { xid: xid.fetch_one(connection).await?, seq: 0 })
}

/// At most `limit` events that come after `after`.
pub async fn after(connection: &mut PgConnection, after: Position, limit: i64) -> sqlx::Result<Page> {
    let rows = sqlx::query_file!("src/store/sql/events.sql", after.xid.to_string(), after.seq, limit)
        .fetch_all(connection)
        .await?;
    let horizon = rows.first().map(|row| (row.horizon, row.next, row.held_back_seconds, row.forgotten));
    let (xid, next, held_back, forgotten) = horizon.unwrap_or((after.xid, after.xid, None, false));
    let last = rows.last().and_then(|row| Some(Position { xid: row.xid?, seq: row.seq? }));
    let full = last.is_some() && i64::try_from(rows.len()).is_ok_and(|read| read >= limit);
    let changes: Vec<_> = rows
        .into_iter()
        .filter_map(|row| {
            let seq = row.seq?;
            let change = Change {
                seq,
                run_id: row.run_id?,
                workflow_id: row.workflow_id?,
                definition: row.definition?,
                queue: row.queue?,
                from: row.from_status,
                to: row.to_status?,
                attempt: row.attempt?,
                fence: row.fence?,
                actor: row.actor?,
                reason: row.reason,
                at: row.at?,
            };
            Some((Position { xid: row.xid?, seq }, change))
        })
        .collect();
    Ok(Page {
        changes,
        upto: last.filter(|_| full).unwrap_or(Position { xid, seq: 0 }).max(after),
        full,
        held_back: held_back.map(|seconds| Duration::from_secs_f64(seconds.max(0.0))),
        forgotten,
        // The horizon may be before a position it was at: what ends in another database just now counts as ours for a moment.
        foreign: after.xid > next,
    })
}

/// At most `limit` events of one run that come after number `after`: there each becomes visible before the next is written, because
/// whoever writes one has the run locked.
pub async fn of_run(connection: &mut PgConnection, run_id: Uuid, after: i64, limit: i64) -> sqlx::Result<Vec<Change>> {
    sqlx::query_as!(
        Change,
        r#"
        select e.seq, e.run_id, r.workflow_id, r.definition, r.queue, e.from_status as "from", e.to_status as "to",
               e.attempt, e.fence, e.actor, e.reason, e.at
        from run_events e
        join test_runs r on r.id = e.run_id
        where e.run_id = $1 and e.seq > $2
        order by e.seq
        limit $3
        "#,
        run_id,
        after,
        limit,
    )
    .fetch_all(connection)
    .await
}

/// Whether a run is final; also when it is gone.
pub async fn is_over(connection: &mut PgConnection, run_id: Uuid) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"select not exists (select from test_runs where id = $1 and finished_at is null) as "over!""#,
        run_id,
    )
    .fetch_one(connection)
    .await
}
