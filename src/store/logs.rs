//! What attempts print.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::domain::{Lease, LogChunk, Stream};

/// Pieces of an attempt's log.
#[derive(Clone, Debug)]
pub struct Printed {
    /// The attempt's.
    pub lease: Lease,
    /// The number of the first of them.
    pub first_seq: i64,
    /// What was printed, in its order.
    pub chunks: Arc<[LogChunk]>,
}

/// Stores pieces of the logs of attempts, those of each numbered from the number given with them. What is there already is not doubled;
/// of attempts whose lease is gone nothing is stored.
pub async fn append(connection: &mut PgConnection, printed: &[Printed]) -> sqlx::Result<()> {
    let numbered = printed.iter().flat_map(|Printed { lease, first_seq, chunks }| {
        (*first_seq..).zip(&**chunks).map(|(seq, LogChunk { stream, text })| (*lease, *stream, seq, text.clone()))
    });
    let Columns { run_ids, fences, secrets, streams, seqs, texts } = numbered.collect();
    sqlx::query!(
        r#"
        insert into run_logs (fence, stream, seq, text)
        select r.fence, c.stream, c.seq, c.text
        from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::text[], $5::bigint[], $6::text[])
            as c (run_id, fence, secret, stream, seq, text)
        cross join lateral (
            select fence
            from test_runs
            where id = c.run_id and status = 'running' and fence = c.fence and lease_secret = c.secret
            limit 1
        ) r
        order by r.fence, c.stream, c.seq -- two batches that lock in different orders deadlock
        on conflict do nothing
        "#,
        &run_ids,
        &fences,
        &secrets as &[Option<Uuid>],
        &streams,
        &seqs,
        &texts,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// The columns of pieces of log, for a statement over many.
#[derive(Default)]
struct Columns {
    run_ids: Vec<Uuid>,
    fences: Vec<i64>,
    secrets: Vec<Option<Uuid>>,
    streams: Vec<String>,
    seqs: Vec<i64>,
    texts: Vec<String>,
}

impl FromIterator<(Lease, Stream, i64, String)> for Columns {
    fn from_iter<I: IntoIterator<Item = (Lease, Stream, i64, String)>>(pieces: I) -> Self {
        let mut columns = Self::default();
        for (lease, stream, seq, text) in pieces {
            columns.run_ids.push(lease.run_id);
            columns.fences.push(lease.fence);
            columns.secrets.push(lease.secret);
            columns.streams.push(stream.as_str().to_owned());
            columns.seqs.push(seq);
            columns.texts.push(text);
        }
        columns
    }
}

/// The largest number of a piece: what every reader of JSON can hold. The remark that a log was cut has it, after all others.
pub const LAST_SEQ: i64 = (1 << 53) - 1;

/// Pieces that are kept of an attempt whose worker numbers them.
pub const PIECES: i64 = 10_000;

/// How much of one attempt's log is kept.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// Bytes of text.
    pub bytes: i64,
    /// Pieces: they are counted again for each new one.
    pub pieces: i64,
}

/// A piece of an attempt's log under the number that its worker gave it.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The attempt's.
    pub lease: Lease,
    /// 1 to [`LAST_SEQ`] - 1.
    pub seq: i64,
    /// What was printed.
    pub chunk: LogChunk,
}

/// Stores pieces of the logs of attempts; whether the lease of each holds. A number that is there already in its stream is not
/// doubled. The first piece beyond the bound becomes a remark that says so, and those after it are dropped; of pieces that come at the
/// same moment some may pass the bound.
pub async fn append_pieces(connection: &mut PgConnection, pieces: &[Piece], bound: Bound) -> sqlx::Result<Vec<bool>> {
    let remark = format!("log truncated after {} bytes or {} pieces\n", bound.bytes, bound.pieces);
    let numbered = pieces.iter().map(|Piece { lease, seq, chunk }| (*lease, chunk.stream, *seq, chunk.text.clone()));
    let Columns { run_ids, fences, secrets, streams, seqs, texts } = numbered.collect();
    let held = sqlx::query_scalar!(
        r#"
        with held as materialized (
            select g.*
            from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::text[], $5::bigint[], $6::text[])
                with ordinality as g (run_id, fence, secret, stream, seq, text, position)
            cross join lateral (
                select
                from test_runs
                where id = g.run_id and status = 'running' and fence = g.fence and lease_secret = g.secret
                limit 1
            ) r
        ),
        wanted as materialized (
            select h.*
            from held h
            where not exists (select from run_logs l where l.fence = h.fence and l.stream = h.stream and l.seq = h.seq)
              and not exists (select from run_logs l where l.fence = h.fence and l.stream = 'system' and l.seq = $10)
        ),
        kept as (
            select w.*,
                   l.bytes + sum(octet_length(w.text)) over so_far <= $7 and l.pieces + count(*) over so_far <= $8 as fits
            from wanted w
            -- the length of a text is known without reading it
            cross join lateral (
                select coalesce(sum(octet_length(text)), 0) as bytes, count(*) as pieces from run_logs where fence = w.fence
            ) l
            window so_far as (partition by w.fence order by w.position)
        ),
        stored as (
            insert into run_logs (fence, stream, seq, text)
            select k.fence, p.stream, p.seq, p.text
            from kept k
            cross join lateral (values (true, k.stream, k.seq, k.text), (false, 'system', $10, $9)) p (fits, stream, seq, text)
            where p.fits = k.fits
            order by k.fence, p.stream, p.seq -- two batches that lock in different orders deadlock
            on conflict do nothing
        )
        select position as "position!" from held
        "#,
        &run_ids,
        &fences,
        &secrets as &[Option<Uuid>],
        &streams,
        &seqs,
        &texts,
        bound.bytes,
        bound.pieces,
        remark,
        LAST_SEQ,
    )
    .fetch_all(connection)
    .await?;
    let mut answers = vec![false; pieces.len()];
    for position in held {
        answers[usize::try_from(position).unwrap_or_default().saturating_sub(1)] = true;
    }
    Ok(answers)
}

/// A stored piece of log.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct LogEntry {
    /// The attempt that printed it.
    pub attempt: i32,
    /// The claim of that attempt.
    pub fence: i64,
    /// Its place in the attempt's log. A pull worker may count each stream by itself.
    pub seq: i64,
    /// Where it came from.
    pub stream: Stream,
    /// When it was stored.
    pub at: DateTime<Utc>,
    /// The text; pieces are cut at line ends where that is possible.
    pub text: String,
}

/// At most `limit` pieces of a run's log in order, that come after the piece (fence, seq, stream): a pull worker may count
/// each stream by itself.
pub async fn read(
    connection: &mut PgConnection,
    run_id: Uuid,
    attempt: Option<i32>,
    after: Option<(i64, i64, Stream)>,
    limit: i64,
) -> sqlx::Result<Vec<LogEntry>> {
    let (fence, seq, stream) = after.map_or((0, 0, ""), |(fence, seq, stream)| (fence, seq, stream.as_str()));
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
        where ($2::integer is null or a.attempt = $2) and (l.fence, l.seq, l.stream) > ($3, $4, $6)
        order by l.fence, l.seq, l.stream
        limit $5
        "#,
        run_id,
        attempt,
        fence,
        seq,
        limit,
        stream,
    )
    .fetch_all(connection)
    .await
}

/// How far a log was read: an attempt's fence, and the last number of each stream, because a pull worker may count them by themselves and
/// send one later than the other. Written as `fence-stdout-stderr-system`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Read {
    fence: i64,
    stdout: i64,
    stderr: i64,
    system: i64,
}

impl Read {
    /// Goes on to an entry.
    pub fn pass(&mut self, entry: &LogEntry) {
        if entry.fence != self.fence {
            *self = Self { fence: entry.fence, ..Self::default() };
        }
        match entry.stream {
            Stream::Stdout => self.stdout = entry.seq,
            Stream::Stderr => self.stderr = entry.seq,
            Stream::System => self.system = entry.seq,
        }
    }
}

impl fmt::Display for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fence, stdout, stderr, system } = self;
        write!(f, "{fence}-{stdout}-{stderr}-{system}")
    }
}

impl FromStr for Read {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.parse::<u64>().ok().and_then(|number| i64::try_from(number).ok());
        match text.split('-').map(number).collect::<Vec<_>>()[..] {
            [Some(fence), Some(stdout), Some(stderr), Some(system)] => Ok(Self { fence, stdout, stderr, system }),
            _ => Err("is not the id of an event of this stream"),
        }
    }
}

/// At most `limit` pieces of a run's log that were not read yet, in order, and whether there can't come more: the run is over, or the
/// attempt. Within a stream they must be stored in their order, which is that in which a worker prints them.
pub async fn follow(
    connection: &mut PgConnection,
    run_id: Uuid,
    attempt: Option<i32>,
    read: Read,
    limit: i64,
) -> sqlx::Result<(Vec<LogEntry>, bool)> {
    // Before the log: what is stored after this look is read at the next one.
    let over = sqlx::query_scalar!(
        r#"
        select not exists (select from test_runs where id = $1 and finished_at is null)
               or exists (select from run_attempts where run_id = $1 and attempt = $2 and status <> 'released') as "over!"
        "#,
        run_id,
        attempt,
    )
    .fetch_one(&mut *connection)
    .await?;
    let entries = sqlx::query_as!(
        LogEntry,
        r#"
        select a.attempt as "attempt!", l.fence, l.seq, l.stream as "stream: Stream", l.at, l.text
        from (
            select attempt, fence from run_attempts where run_id = $1
            union all
            select attempt, fence from test_runs where id = $1 and status = 'running'
        ) a
        join run_logs l on l.fence = a.fence
        where ($2::integer is null or a.attempt = $2)
          and l.fence >= $3
          and (l.fence > $3 or l.seq > case l.stream when 'stdout' then $4::bigint when 'stderr' then $5::bigint else $6::bigint end)
        order by l.fence, l.seq, l.stream
        limit $7
        "#,
        run_id,
        attempt,
        read.fence,
        read.stdout,
        read.stderr,
        read.system,
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok((entries, over))
}

/// The whole log of a run as one text.
pub async fn text(connection: &mut PgConnection, run_id: Uuid) -> sqlx::Result<String> {
    sqlx::query_scalar!(
        r#"
        select coalesce(string_agg(l.text, '' order by l.fence, l.seq, l.stream), '') as "text!"
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
