//! Parts for a harness that measures several systems alike. Each works on the DATABASE_URL of the environment through the public API
//! of the library, and prints one line of JSON; everything else goes to standard error.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use singletrack::app::prepare_schema;
use singletrack::config::Migrate;
use singletrack::store::enqueue::Enqueued;
use singletrack::store::{Db, LIMIT};
use tokio::task::JoinSet;

use crate::http::pace;
use crate::server::servers;
use crate::worker::{Worker, unix};
use crate::workflows::{BUSY, Instances, NOOP, define_all, enqueue, enqueue_many, fill, request};

/// What is printed when something else is asked for.
pub const USAGE: &str = "\
parts, each against DATABASE_URL, printing one line of JSON:
  setup                        brings the schema up to date and defines the workflows
  single SECONDS               32 producers, one run at a time, each of a workflow of its own
  bulk SECONDS                 4 producers, 1,000 runs at a time
  fill N                       puts N runs into the queue
  worker N [FILE]              a handler that does nothing, until N have begun and nothing is pending; when each began: run_id unix_seconds
  produce RATE SECONDS FILE    RATE runs per second, each at its time; when each was answered: run_id unix_seconds
  unique SECONDS               32 producers ask for one busy workflow and are refused
  both RATE SECONDS FILE FILE  produce and worker in one process";

/// Producers that enqueue one by one.
const PRODUCERS: usize = 32;
/// Producers that enqueue many at once, and how many.
const BULK: (usize, usize) = (4, 1000);

/// Does one part.
pub async fn run(arguments: &[&str]) -> Result<Value> {
    let url = std::env::var("DATABASE_URL").context("DATABASE_URL must name the Postgres to use")?;
    let db = || anyhow::Ok(Db::new(servers(&url)?, PRODUCERS as u32, LIMIT));
    match arguments {
        ["setup"] => setup(&url).await,
        ["single", seconds] => single(db()?, seconds.parse()?).await,
        ["bulk", seconds] => bulk(db()?, seconds.parse()?).await,
        ["fill", count] => {
            let (count, since) = (count.parse()?, Instant::now());
            fill(&db()?, NOOP, count).await?;
            Ok(rate(count as u64, since))
        }
        ["worker", count] => Worker::start(&url)?.finish(count.parse()?, &url, None).await,
        ["worker", count, file] => Worker::start(&url)?.finish(count.parse()?, &url, Some(file)).await,
        ["produce", rate, seconds, file] => produce(db()?, rate.parse()?, seconds.parse()?, file).await,
        ["unique", seconds] => unique(db()?, seconds.parse()?).await,
        ["both", rate, seconds, produced, began] => {
            let (rate, seconds): (f64, f64) = (rate.parse()?, seconds.parse()?);
            let worker = Worker::start(&url)?;
            // It listens, and has its connections, before it counts.
            tokio::time::sleep(Duration::from_secs(1)).await;
            let answer = produce(db()?, rate, seconds, produced).await?;
            let count = answer["runs"].as_u64().unwrap_or_default();
            worker.finish(count, &url, Some(began)).await
        }
        _ => bail!("{USAGE}"),
    }
}

async fn setup(url: &str) -> Result<Value> {
    let servers = servers(url)?;
    prepare_schema(&servers, Migrate::Auto).await?;
    define_all(&Db::new(servers, 1, LIMIT)).await?;
    Ok(json!({"ready": true}))
}

fn rate(count: u64, since: Instant) -> Value {
    let seconds = since.elapsed().as_secs_f64();
    json!({"runs": count, "seconds": seconds, "runs_per_second": count as f64 / seconds})
}

async fn single(db: Db, seconds: f64) -> Result<Value> {
    let (instances, length, begin) = (Instances::of(NOOP), Duration::from_secs_f64(seconds), Instant::now());
    let mut tasks = JoinSet::new();
    for _ in 0..PRODUCERS {
        let (db, instances) = (db.clone(), instances.clone());
        tasks.spawn(async move {
            let mut count = 0;
            while begin.elapsed() < length {
                match enqueue(&db, request(&instances.next())?).await? {
                    Enqueued::Accepted(_) => count += 1,
                    other => bail!("a run was not accepted: {other:?}"),
                }
            }
            anyhow::Ok(count)
        });
    }
    Ok(rate(sum(tasks).await?, begin))
}

async fn bulk(db: Db, seconds: f64) -> Result<Value> {
    let (instances, length, begin) = (Instances::of(NOOP), Duration::from_secs_f64(seconds), Instant::now());
    let (producers, size) = BULK;
    let mut tasks = JoinSet::new();
    for _ in 0..producers {
        let (db, instances) = (db.clone(), instances.clone());
        tasks.spawn(async move {
            let mut count = 0;
            while begin.elapsed() < length {
                let requests = (0..size).map(|_| request(&instances.next())).collect::<Result<_>>()?;
                enqueue_many(&db, requests).await?;
                count += size as u64;
            }
            anyhow::Ok(count)
        });
    }
    Ok(rate(sum(tasks).await?, begin))
}

async fn unique(db: Db, seconds: f64) -> Result<Value> {
    // The holder: accepted, or there already.
    enqueue(&db, request(BUSY)?).await?;
    let (length, begin) = (Duration::from_secs_f64(seconds), Instant::now());
    let mut tasks = JoinSet::new();
    for _ in 0..PRODUCERS {
        let db = db.clone();
        tasks.spawn(async move {
            let mut count = 0;
            while begin.elapsed() < length {
                match enqueue(&db, request(BUSY)?).await? {
                    Enqueued::SlotTaken(_) => count += 1,
                    other => bail!("a run was not refused: {other:?}"),
                }
            }
            anyhow::Ok(count)
        });
    }
    let count = sum(tasks).await?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(json!({"refused": count, "seconds": seconds, "refused_per_second": count as f64 / seconds}))
}

async fn sum(mut tasks: JoinSet<Result<u64>>) -> Result<u64> {
    let mut total = 0;
    while let Some(done) = tasks.join_next().await {
        total += done??;
    }
    Ok(total)
}

/// Open loop: a run is asked for at its time, whatever became of those before it.
async fn produce(db: Db, rate: f64, seconds: f64, file: &str) -> Result<Value> {
    let mut out = BufWriter::new(File::create(file).with_context(|| format!("can't write {file}"))?);
    let instances = Instances::of(NOOP);
    // The first use of a connection is not what is measured.
    db.with(async |connection| sqlx::query("select 1").execute(connection).await).await?;
    let mut due = pace(rate, (rate * seconds) as u64);
    let (begin, slowest) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let mut tasks = JoinSet::new();
    while let Some(due) = due.recv().await {
        let (db, request, slowest) = (db.clone(), request(&instances.next())?, slowest.clone());
        tasks.spawn(async move {
            match enqueue(&db, request).await? {
                Enqueued::Accepted(run) => {
                    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    slowest.fetch_max(crate::http::micros(due.elapsed()), Ordering::Relaxed);
                    anyhow::Ok((run.id, now))
                }
                other => bail!("a run was not accepted: {other:?}"),
            }
        });
    }
    let mut count: u64 = 0;
    while let Some(done) = tasks.join_next().await {
        let (run_id, time) = done??;
        writeln!(out, "{run_id} {}", unix(time))?;
        count += 1;
    }
    out.flush()?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(json!({"runs": count, "seconds": seconds, "slowest_ms": slowest.load(Ordering::Relaxed) as f64 / 1000.0}))
}
