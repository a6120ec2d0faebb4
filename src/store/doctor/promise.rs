//! Broken promises: rows that must not be, leases held by nobody, slots nobody serves.

use sqlx::PgConnection;

/// Rows that are wrong in one way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wrong {
    /// In which way.
    pub kind: String,
    /// The first of them, each with its ids and what is wrong with it.
    pub rows: Vec<String>,
    /// How many there are.
    pub total: i64,
}

/// How many rows of a kind are named.
const NAMED: i32 = 10;

/// What `invariant_violations` says; of all history where it is `full`, else of live runs and the last 24 hours.
pub async fn violations(connection: &mut PgConnection, full: bool) -> sqlx::Result<Vec<Wrong>> {
    sqlx::query_file_as!(Wrong, "src/store/sql/doctor/violations.sql", full, i64::from(NAMED))
        .fetch_all(connection)
        .await
}

/// Workflows with several runs in one slot, by the rows of the table themselves: an index that is damaged hides what it let in.
pub async fn doubled_slots(connection: &mut PgConnection) -> sqlx::Result<Vec<Wrong>> {
    // The concatenations are what no index is about.
    sqlx::query_as!(
        Wrong,
        r#"
        with doubled as (
            select r.workflow_id || '' as workflow_id, string_agg(r.id || ' ' || r.status, ', ' order by r.id) as runs
            from test_runs r
            where r.status || '' in ('queued', 'running')
            group by 1
            having count(*) > 1
        )
        select 'doubled-slots' as "kind!",
               (array_agg(d.workflow_id || ': ' || d.runs order by d.workflow_id))[:$1] as "rows!",
               count(*) as "total!"
        from doubled d
        having count(*) > 0
        "#,
        NAMED,
    )
    .fetch_all(connection)
    .await
}

/// Leases that nobody holds, or that nobody takes away: `orphan-lease`, `foreign-lease`, `past-time-limit`, `lost-worker`.
pub async fn leases(connection: &mut PgConnection) -> sqlx::Result<Vec<Wrong>> {
    sqlx::query_file_as!(Wrong, "src/store/sql/doctor/leases.sql", i64::from(NAMED)).fetch_all(connection).await
}

/// Slots that are held and do not move on: `no-worker`, `paused-for-long`.
pub async fn slots(connection: &mut PgConnection) -> sqlx::Result<Vec<Wrong>> {
    sqlx::query_file_as!(Wrong, "src/store/sql/doctor/slots.sql", i64::from(NAMED)).fetch_all(connection).await
}

/// The sequence that fences come from, and the largest fence that is in use.
#[derive(Clone, Copy, Debug)]
pub struct Fences {
    /// The number given last; `None` where none was, or this account may not know.
    pub given: Option<i64>,
    /// Whether this account may know.
    pub readable: bool,
    /// The largest in a run, a lease or an attempt; 0 where there is none.
    pub largest: i64,
}

/// Looks at both. The sequence is read last: a claim that is made meanwhile can only make it larger.
pub async fn fences(connection: &mut PgConnection) -> sqlx::Result<Fences> {
    let largest = sqlx::query_scalar!(
        r#"
        select greatest(
            (select max(r.fence) from test_runs r where r.status in ('queued', 'running')),
            (select max(l.fence) from run_leases l),
            (select max(a.fence) from run_attempts a),
            0) as "largest!"
        "#
    )
    .fetch_one(&mut *connection)
    .await?;
    let sequence = sqlx::query!(
        r#"
        select has_sequence_privilege('run_fence', 'USAGE, SELECT') as "readable!",
               case when has_sequence_privilege('run_fence', 'USAGE, SELECT')
                    then pg_sequence_last_value('run_fence'::regclass) end as given
        "#
    )
    .fetch_one(connection)
    .await?;
    Ok(Fences { given: sequence.given, readable: sequence.readable, largest })
}

/// A worker that was not seen for a minute, or by whose version others differ.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Its name.
    pub name: String,
    /// Seconds since it was seen.
    pub silent_seconds: i64,
    /// The version of the replica that wrote the row down.
    pub version: Option<String>,
    /// It is a replica; else a pull worker, which has no version of its own.
    pub is_replica: bool,
}

/// Who asks for runs, those seen last first.
pub async fn workers(connection: &mut PgConnection) -> sqlx::Result<Vec<Worker>> {
    sqlx::query_as!(
        Worker,
        r#"
        select w.name, floor(extract(epoch from now() - w.seen_at))::bigint as "silent_seconds!", w.version,
               'pull' <> all(w.executor_types) as "is_replica!"
        from workers w
        order by w.seen_at desc, w.name
        limit 1000
        "#
    )
    .fetch_all(connection)
    .await
}
