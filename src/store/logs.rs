//! What attempts print.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::domain::{Lease, LogChunk, Stream};

/// Stores pieces of one attempt's log, numbered from `first_seq`. What is there already is not doubled; when the lease is
/// gone nothing is stored.
pub async fn append(
    connection: &mut PgConnection,
    lease: Lease,
    first_seq: i64,
    chunks: &[LogChunk],
) -> sqlx::Result<()> {
    let streams: Vec<String> = chunks.iter().map(|chunk| chunk.stream.as_str().to_owned()).collect();
    let seqs: Vec<i64> = (first_seq..).take(chunks.len()).collect();
    let texts: Vec<String> = chunks.iter().map(|chunk| chunk.text.clone()).collect();
    sqlx::query!(
        r#"
        insert into run_logs (fence, stream, seq, text)
        select r.fence, c.stream, c.seq, c.text
        from unnest($4::text[], $5::bigint[], $6::text[]) as c (stream, seq, text)
        join test_runs r on r.id = $1 and r.status = 'running' and r.fence = $2 and r.lease_secret = $3
        on conflict do nothing
        "#,
        lease.run_id,
        lease.fence,
        lease.secret,
        &streams,
        &seqs,
        &texts,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// A stored piece of log.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct LogEntry {
    /// The attempt that printed it.
    pub attempt: i32,
    /// The claim of that attempt.
    pub fence: i64,
    /// Order of arrival within the attempt.
    pub seq: i64,
    /// Where it came from.
    pub stream: Stream,
    /// When it was stored.
    pub at: DateTime<Utc>,
    /// The text; pieces are cut at line ends where that is possible.
    pub text: String,
}

/// At most `limit` pieces of a run's log in order, that come after the piece (fence, seq).
pub async fn read(
    connection: &mut PgConnection,
    run_id: Uuid,
    attempt: Option<i32>,
    after: (i64, i64),
    limit: i64,
) -> sqlx::Result<Vec<LogEntry>> {
    sqlx::query_as!(
        LogEntry,
        r#"
        select a.attempt as "attempt!", l.fence, l.seq, l.stream as "stream: Stream", l.at, l.text
        from (
            select attempt, fence from run_attempts where run_id = $1
            union all
            select attempt, fence from test_runs where id = $1 and status = 'running'
        ) a
        join run_logs l on l.fence = a.fence
        where ($2::integer is null or a.attempt = $2) and (l.fence, l.seq) > ($3, $4)
        order by l.fence, l.seq
        limit $5
        "#,
        run_id,
        attempt,
        after.0,
        after.1,
        limit,
    )
    .fetch_all(connection)
    .await
}

/// The whole log of a run as one text.
pub async fn text(connection: &mut PgConnection, run_id: Uuid) -> sqlx::Result<String> {
    sqlx::query_scalar!(
        r#"
        select coalesce(string_agg(l.text, '' order by l.fence, l.seq), '') as "text!"
        from (
            select fence from run_attempts where run_id = $1
            union all
            select fence from test_runs where id = $1 and status = 'running'
        ) a
        join run_logs l on l.fence = a.fence
        "#,
        run_id,
    )
    .fetch_one(connection)
    .await
}
