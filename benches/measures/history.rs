//! Ten million finished runs beside none: what is measured of an empty database is measured of one with a history.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::json;

use super::bytes::sizes;
use super::{Bench, batch, drain, enqueue, refused};
use crate::http::{Connection, get, latencies, micros, milliseconds};
use crate::process::Serve;
use crate::report::{Goal, What};
use crate::server::Database;
use crate::workflows::NOOP;

/// Runs of each workflow of the history.
const PER_WORKFLOW: u64 = 100;
/// Rows that are filled in by one statement.
const PIECE: u64 = 500_000;
/// How often each list is asked for, and for how long at most.
const LOOKS: u64 = 100;
const LONGEST: Duration = Duration::from_secs(10);
/// Which counts all of the history, as long as that takes.
const EVERYTHING: &str = "counts of everything";
const TABLES: [&str; 3] = ["test_runs", "run_attempts", "run_events"];

pub async fn run(bench: &mut Bench) -> Result<()> {
    eprintln!("history: filling in {} runs", bench.plan.history);
    let old = bench.server.database("history").await?;
    let since = Instant::now();
    fill(&old, bench.plan.history).await?;
    bench.server.checkpoint().await?;
    let sizes = sizes(&old).await?;
    bench.report.detail("history", json!({"filled in seconds": since.elapsed().as_secs_f64(), "sizes": sizes}));
    read(bench, &old).await?;
    for repetition in 0..bench.plan.repetitions {
        bench.says("history", repetition);
        let empty = bench.server.database("own").await?;
        both(bench, &empty, false).await?;
        bench.server.remove(empty).await?;
        both(bench, &old, true).await?;
    }
    bench.server.remove(old).await
}

/// Each measure once, with a history or without.
async fn both(bench: &mut Bench, database: &Database, with_history: bool) -> Result<()> {
    let (length, runs) = (bench.plan.length(), bench.plan.runs);
    let mut found = Vec::new();
    for connections in enqueue::CONNECTIONS {
        found
            .push((format!("enqueue, {connections} connections"), enqueue::once(database, connections, length).await?));
        clear(bench, database).await?;
    }
    found.push(("batch of 1,000".into(), batch::once(database, Duration::from_secs(bench.plan.half())).await?));
    clear(bench, database).await?;
    found.push(("drain by one process".into(), drain::once(database, runs).await?));
    found.push(("drain by pull workers".into(), drain::pull_once(database, runs).await?));
    found.push(("refused POSTs".into(), refused::once(database, length).await?.rate));
    clear(bench, database).await?;
    for (name, rate) in found {
        let (empty, old) = (format!("{name}, empty"), format!("{name}, with the history"));
        let what = match with_history {
            false => What::new("history", empty, "/s"),
            true => What::new("history", old, "/s").against(empty).goal(Goal::TimesAtLeast(0.95)),
        };
        bench.report.add(what, rate);
    }
    Ok(())
}

/// Ends what is queued, so that the next measure has a queue of its own.
async fn clear(bench: &Bench, database: &Database) -> Result<()> {
    let cancel =
        "update test_runs set status = 'cancelled', finished_at = now(), version = version + 1 where status = 'queued'";
    database.execute(cancel).await?;
    database.execute("vacuum analyze test_runs").await?;
    bench.server.checkpoint().await
}

/// How long people wait for what they look at.
async fn read(bench: &mut Bench, database: &Database) -> Result<()> {
    let serve = Serve::start(database).await?;
    let mut connection = Connection::open(&serve.address).await?;
    let one = format!("{NOOP}@old-7");
    let paths = [
        ("the list", "/api/v1/runs?limit=50".to_owned()),
        ("one workflow's history", format!("/api/v1/runs?limit=50&workflow_id={one}")),
        ("one workflow's counts", format!("/api/v1/runs/counts?workflow_id={one}")),
        ("who has the slots", "/api/v1/runs?limit=50&status=queued&status=running".to_owned()),
        ("counts of what is in progress", "/api/v1/runs/counts?status=queued&status=running".to_owned()),
        (EVERYTHING, "/api/v1/runs/counts".to_owned()),
    ];
    for (name, path) in paths {
        let (request, mut times) = (get(&path), latencies()?);
        let begin = Instant::now();
        while times.len() < LOOKS && begin.elapsed() < LONGEST {
            let since = Instant::now();
            let answer = connection.call(&request).await?;
            times.saturating_record(micros(since.elapsed()));
            if answer.status != 200 && name == EVERYTHING {
                eprintln!("    {path} was answered with {}", answer.status);
            } else if answer.status != 200 {
                bail!("{path} was answered with {}: {}", answer.status, String::from_utf8_lossy(answer.body));
            }
        }
        let what = |name: String| What::new("history", name, "ms");
        let goal = if name == EVERYTHING { Goal::None } else { Goal::Under(20.0) };
        bench.report.add(what(format!("{name}, p50")).goal(goal), milliseconds(&times, 50.0));
        bench.report.add(what(format!("{name}, p99")), milliseconds(&times, 99.0));
    }
    serve.stop().await
}

/// Makes a history: triggers off, indexes made when all is there.
async fn fill(database: &Database, runs: u64) -> Result<()> {
    let indexes = droppable(database).await?;
    for (name, _) in &indexes {
        database.execute(&format!("drop index {name}")).await?;
    }
    for table in TABLES {
        database.execute(&format!("alter table {table} set (autovacuum_enabled = off)")).await?;
    }
    let workflows = (runs / PER_WORKFLOW).max(1);
    let mut from = 1;
    while from <= runs {
        let to = (from + PIECE - 1).min(runs);
        database.execute(&piece(from, to, runs, workflows)).await?;
        eprintln!("    {to} of {runs}");
        from = to + 1;
    }
    for (name, definition) in &indexes {
        eprintln!("    {name}");
        database.execute(&format!("set maintenance_work_mem = '512MB'; {definition}")).await?;
    }
    for table in TABLES {
        database.execute(&format!("vacuum (freeze, analyze) {table}")).await?;
        database.execute(&format!("alter table {table} reset (autovacuum_enabled)")).await?;
    }
    Ok(())
}

/// The indexes that no constraint is made of, and how to make each.
async fn droppable(database: &Database) -> Result<Vec<(String, String)>> {
    let query = "select i.indexname::text, i.indexdef from pg_indexes i \
                 where i.schemaname = 'public' and i.tablename = any($1) \
                 and not exists (select from pg_constraint c where c.conindid = format('%I.%I', i.schemaname, i.indexname)::regclass)";
    Ok(sqlx::query_as(query).bind(TABLES).fetch_all(&database.sql).await?)
}

/// Runs of the past, half a second apart, so that ten million are of the last 58 days and none is old enough to be deleted meanwhile; each
/// with its attempt and its three events. Their ids grow with time, as those of UUIDv7 do.
fn piece(from: u64, to: u64, runs: u64, workflows: u64) -> String {
    format!(
        "begin;
         set local session_replication_role = replica;
         create temporary table old on commit drop as
         select (lpad(to_hex((extract(epoch from t) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(n % 4096), 3, '0')
                 || '8' || lpad(to_hex(n), 15, '0'))::uuid as id,
                '{NOOP}@old-' || n % {workflows} as workflow_id, n as fence, t
         from (select n, now() - interval '1 hour' - make_interval(secs => ({runs} - n) / 2.0) as t from generate_series({from}, {to}) n) g;
         insert into test_runs (id, workflow_id, definition, revision, status, executor_type, input, attempt, fence, settled_fence,
                                worker, created_at, available_at, started_at, finished_at, timeout_seconds,
                                heartbeat_timeout_seconds, requested_by, version)
         select id, workflow_id, '{NOOP}', 1, 'succeeded', 'handler',
                '{{\"seq\":1,\"to\":\"someone@example.com\",\"kind\":\"welcome\"}}', 1, fence, fence,
                'host:1:0001', t, t, t + interval '1 ms', t + interval '2 ms', 600, 60, 'bench', 3
         from old order by fence;
         insert into run_attempts (run_id, fence, attempt, status, worker, started_at, finished_at, lease_secret, verdict)
         select id, fence, 1, 'succeeded', 'host:1:0001', t + interval '1 ms', t + interval '2 ms', gen_random_uuid(), 'succeeded'
         from old order by fence;
         insert into run_events (run_id, from_status, to_status, attempt, fence, actor, at)
         select id, e.before, e.after, e.attempt, e.attempt * fence, 'host:1:0001', t + e.later
         from old, (values (1, null, 'queued', 0, interval '0'), (2, 'queued', 'running', 1, interval '1 ms'),
                           (3, 'running', 'succeeded', 1, interval '2 ms')) as e (position, before, after, attempt, later)
         order by fence, e.position;
         select setval('run_fence', {to});
         commit;"
    )
}
