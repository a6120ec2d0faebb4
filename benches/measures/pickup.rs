//! From the commit of an enqueue to the start of the handler, at a moderate rate. Needs `track_commit_timestamp`.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use sqlx::postgres::PgListener;
use tokio::time::sleep;

use super::Bench;
use super::enqueue::requests;
use crate::http::{Latencies, latencies, micros, milliseconds, open, pace};
use crate::process::{Role, Serve, folder};
use crate::report::{Goal, What};
use crate::server::{Database, Server};
use crate::workflows::NOOP;

const RATE: f64 = 200.0;
const CONNECTIONS: usize = 16;
/// Runs that begin before it counts.
const WARM: u64 = 20;
const BARE: &str = "bare SQL: INSERT that notifies, listener, claim of a row";

pub async fn run(bench: &mut Bench) -> Result<()> {
    for repetition in 0..bench.plan.repetitions {
        bench.says("pickup", repetition);
        let bare = bare(&bench.server, bench.plan.length()).await?;
        add(bench, BARE, &bare, false);
        let database = bench.server.database("own").await?;
        let apart = apart(&database, bench.plan.length()).await?;
        add(bench, "over HTTP, handler in another process", &apart, true);
        bench.server.remove(database).await?;

        let database = bench.server.database("own").await?;
        let together = together(&database, bench.plan.seconds).await?;
        add(bench, "through the library, handler in the same process", &together, false);
        bench.server.remove(database).await?;
    }
    Ok(())
}

fn add(bench: &mut Bench, how: &str, latencies: &Latencies, judged: bool) {
    let goals = [(50.0, Goal::Under(0.8)), (99.0, Goal::Under(5.0)), (99.9, Goal::None)];
    for (percentile, goal) in goals {
        let what = What::new("pickup", format!("{how}, p{percentile}"), "ms");
        let what = if how == BARE { what } else { what.against(format!("{BARE}, p{percentile}")) };
        let goal = if judged { goal } else { Goal::None };
        bench.report.add(what.goal(goal), milliseconds(latencies, percentile));
    }
}

/// The least that this machine needs: who listens is told of an inserted row, and has claimed it.
async fn bare(server: &Server, length: Duration) -> Result<Latencies> {
    let database = server.bare("floor").await?;
    let table =
        "create table job(id bigint generated always as identity primary key, state smallint not null default 0,
                                  inserted xid not null default pg_current_xact_id()::xid);
                 create index on job(id) where state = 0";
    database.execute(table).await?;
    let count = (RATE * length.as_secs_f64()) as u64;
    let mut listener = PgListener::connect_with(&database.sql).await?;
    listener.listen("job").await?;
    let insert = async {
        let (mut connection, mut due) = (database.sql.acquire().await?, pace(RATE, count));
        while due.recv().await.is_some() {
            let row = "with inserted as (insert into job default values) select pg_notify('job', '')";
            sqlx::query(row).execute(&mut *connection).await?;
        }
        anyhow::Ok(())
    };
    let claim = async {
        let (mut connection, mut claimed) = (database.sql.acquire().await?, HashMap::new());
        while (claimed.len() as u64) < count {
            listener.recv().await?;
            let rows = "with due as (select id from job where state = 0 order by id limit 100 for update skip locked)
                        update job set state = 1 from due where job.id = due.id returning job.id::text";
            let ids: Vec<String> = sqlx::query_scalar(rows).fetch_all(&mut *connection).await?;
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
            claimed.extend(ids.into_iter().map(|id| (id, now)));
        }
        anyhow::Ok(claimed)
    };
    let ((), claimed) = tokio::try_join!(insert, claim)?;
    // The database can't be removed as long as somebody listens.
    drop(listener);
    let committed =
        "select id::text, (extract(epoch from pg_xact_commit_timestamp(inserted)) * 1000000)::bigint from job";
    let mut all = latencies()?;
    for (id, committed) in database.numbers(committed).await? {
        let at = claimed.get(&id).with_context(|| format!("row {id} was never claimed"))?;
        all.saturating_record(micros(*at).saturating_sub(u64::try_from(committed)?));
    }
    server.remove(database).await?;
    Ok(all)
}

async fn apart(database: &Database, length: Duration) -> Result<Latencies> {
    let count = (RATE * length.as_secs_f64()) as u64;
    let file = folder()?.join("began");
    let serve = Serve::start(database).await?;
    let worker = Role::start(database, &["worker", &(WARM + count).to_string(), &file.to_string_lossy()])?;
    let warm = Duration::from_secs_f64(WARM as f64 / RATE);
    open(&serve.address, CONNECTIONS, RATE, warm, requests(NOOP)).await?.rate(202)?;
    settled(database).await?;
    let begin = database.now().await?;
    open(&serve.address, CONNECTIONS, RATE, length, requests(NOOP)).await?.rate(202)?;
    worker.answer().await?;
    serve.stop().await?;
    compare(database, &begin, &file).await
}

async fn together(database: &Database, seconds: u64) -> Result<Latencies> {
    let (produced, began) = (folder()?.join("produced"), folder()?.join("began"));
    let begin = database.now().await?;
    let arguments =
        ["both", &RATE.to_string(), &seconds.to_string(), &produced.to_string_lossy(), &began.to_string_lossy()];
    Role::start(database, &arguments)?.answer().await?;
    compare(database, &begin, &began).await
}

/// Waits until nothing is in progress.
async fn settled(database: &Database) -> Result<()> {
    for _ in 0..1000 {
        if database.number("select count(*) from test_runs where status in ('queued', 'running')").await? == 0 {
            return Ok(());
        }
        sleep(Duration::from_millis(20)).await;
    }
    bail!("the worker does not begin")
}

/// What the server notes as the time of a commit is taken before it is flushed to disk, so that the flush is a part of what is found.
/// It is asked of the transaction which wrote the run's first event: the run's own row has been written since.
async fn compare(database: &Database, begin: &str, file: &Path) -> Result<Latencies> {
    let text = std::fs::read_to_string(file).context("what the worker wrote down")?;
    let began: HashMap<&str, f64> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(run_id, time)| Some((run_id, within_its_day(time)?)))
        .collect();
    let committed = database
        .numbers(&format!(
            "select e.run_id::text, (extract(epoch from pg_xact_commit_timestamp(e.xmin)) * 1000000)::bigint \
             from run_events e where e.from_status is null and e.at >= '{begin}'"
        ))
        .await?;
    let mut all = latencies()?;
    for (run_id, micros) in &committed {
        let began = began.get(run_id.as_str()).with_context(|| format!("run {run_id} was never begun"))?;
        let committed = (micros % DAY) as f64 / 1e6;
        let seconds = (began - committed).rem_euclid(DAY as f64 / 1e6);
        // Nobody can begin before it; one that did would be a day late here.
        all.saturating_record((seconds * 1e6) as u64);
    }
    if all.is_empty() {
        bail!("no run has begun");
    }
    Ok(all)
}

/// A day, in microseconds: within one a float has all of their digits.
const DAY: i64 = 86_400_000_000;

/// Unix seconds with a fraction, within their day.
fn within_its_day(time: &str) -> Option<f64> {
    let (seconds, fraction) = time.split_once('.')?;
    let seconds: i64 = seconds.parse().ok()?;
    let nanos: f64 = fraction.parse().ok()?;
    Some((seconds % (DAY / 1_000_000)) as f64 + nanos / 1e9)
}
