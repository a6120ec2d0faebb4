//! Somebody's transaction stays open for minutes and holds back what vacuum may remove, while one workflow goes round and round
//! among many.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use serde_json::json;
use tokio::time::sleep;

use super::Bench;
use super::enqueue::requests;
use crate::http::{Connection, Latencies, latencies, micros, milliseconds, open, post};
use crate::process::{Role, Serve};
use crate::report::{Goal, What};
use crate::server::Database;
use crate::workflows::{BUSY, NOOP};

/// Runs per second of all others.
const RATE: f64 = 100.0;
const CONNECTIONS: usize = 16;
/// What is compared: the first and the last so many seconds, and as many beside a loop.
const WINDOW: Duration = Duration::from_secs(10);
/// How soon one that was refused asks again.
const AGAIN: Duration = Duration::from_millis(2);

pub async fn run(bench: &mut Bench) -> Result<()> {
    eprintln!("pinned: {} minutes", bench.plan.minutes);
    let database = bench.server.database("own").await?;
    let serve = Serve::start(&database).await?;
    // It has never done enough, and is killed at the end.
    let worker = Role::start(&database, &["worker", &u64::MAX.to_string()])?;
    let warm = Duration::from_secs(2);
    tokio::try_join!(go_round(&serve.address, warm, warm), others(&serve.address, warm))?;
    // One workflow can keep one core busy by walking past its dead entries. What that alone is to the others: a loop does it too.
    let (apart, loop_ends) = (database.now().await?, Arc::new(AtomicBool::new(false)));
    let ends = loop_ends.clone();
    let looping = std::thread::spawn(move || while !ends.load(Ordering::Relaxed) {});
    let beside_a_loop = tokio::try_join!(go_round(&serve.address, WINDOW, WINDOW), others(&serve.address, WINDOW));
    loop_ends.store(true, Ordering::Relaxed);
    looping.join().map_err(|_| anyhow!("the loop failed"))?;
    let (_, others_beside) = beside_a_loop?;

    let mut pin = database.sql.begin().await?;
    sqlx::query("set transaction isolation level repeatable read").execute(&mut *pin).await?;
    sqlx::query("select count(*) from test_runs").execute(&mut *pin).await?;
    let begin = database.now().await?;
    let length = Duration::from_secs_f64(bench.plan.minutes * 60.0);
    let window = WINDOW.min(length / 3);
    let all_others = async {
        let first = others(&serve.address, window).await?;
        others(&serve.address, length - 2 * window).await?;
        anyhow::Ok([first, others(&serve.address, window).await?])
    };
    let (busy, others) = tokio::try_join!(go_round(&serve.address, length, window), all_others)?;
    pin.rollback().await?;
    worker.kill().await?;
    serve.stop().await?;
    let busy_runs = runs(&database, &begin, window, true).await?;
    let other_runs = runs(&database, &begin, window, false).await?;
    let [runs_beside, _] = runs(&database, &apart, WINDOW, false).await?;
    let rounds = database.number(&format!("select count(*) from test_runs where workflow_id = '{BUSY}'")).await?;
    bench.server.remove(database).await?;

    compare(bench, "the busy workflow's enqueue", 3.0, &busy);
    compare(bench, "the busy workflow's run, enqueue to end", 3.0, &busy_runs);
    compare(bench, "everybody else's enqueue", 1.5, &others);
    compare(bench, "everybody else's run, enqueue to end", 1.5, &other_runs);
    for (name, beside) in [("enqueue", &others_beside), ("run, enqueue to end", &runs_beside)] {
        let before = format!("everybody else's {name}, p50, first seconds");
        let name = format!("everybody else's {name}, p50, no dead entries, but a loop that keeps a core busy");
        bench.report.add(What::new("pinned", name, "ms").against(before), milliseconds(beside, 50.0));
    }
    bench.report.detail("pinned", json!({"rounds of the busy workflow": rounds, "others per second": RATE}));
    Ok(())
}

fn compare(bench: &mut Bench, name: &str, most: f64, [first, last]: &[Latencies; 2]) {
    for (percentile, goal) in [(50.0, Goal::TimesAtMost(most)), (99.0, Goal::None)] {
        let before = format!("{name}, p{percentile}, first seconds");
        bench.report.add(What::new("pinned", &before, "ms"), milliseconds(first, percentile));
        let what = What::new("pinned", format!("{name}, p{percentile}, last seconds"), "ms").against(before).goal(goal);
        bench.report.add(what, milliseconds(last, percentile));
    }
}

/// The busy workflow: as soon as its run is over, the next one is enqueued. What the accepted requests took, first and last.
async fn go_round(address: &str, length: Duration, window: Duration) -> Result<[Latencies; 2]> {
    let (mut connection, mut request) = (Connection::open(address).await?, Vec::new());
    post(&mut request, &[format!("/api/v1/workflows/{BUSY}/runs").as_bytes()], b"{}");
    let (begin, mut found) = (Instant::now(), [latencies()?, latencies()?]);
    while begin.elapsed() < length {
        let sent = Instant::now();
        match connection.call(&request).await?.status {
            202 => {
                let (took, at) = (micros(sent.elapsed()), sent - begin);
                if at < window {
                    found[0].saturating_record(took);
                }
                if at >= length - window {
                    found[1].saturating_record(took);
                }
            }
            409 => {}
            status => bail!("an enqueue of the busy workflow was answered with {status}"),
        }
        sleep(AGAIN).await;
    }
    Ok(found)
}

async fn others(address: &str, length: Duration) -> Result<Latencies> {
    let load = open(address, CONNECTIONS, RATE, length, requests(NOOP)).await?;
    load.rate(202)?;
    Ok(load.latencies)
}

/// From an enqueue to the end of its run, which does nothing, as the rows say: of the first and the last seconds, of the busy workflow or of
/// all others. What a claim takes is in it, and what a run waits for one that is under way.
async fn runs(database: &Database, begin: &str, window: Duration, busy: bool) -> Result<[Latencies; 2]> {
    let (seconds, workflow) = (window.as_secs_f64(), if busy { "=" } else { "<>" });
    let query = format!(
        "with these as (select created_at, finished_at, max(created_at) over () as last from test_runs
                        where created_at >= '{begin}' and finished_at is not null and workflow_id {workflow} '{BUSY}')
         select case when created_at < timestamptz '{begin}' + interval '{seconds} s' then 'first' else 'last' end,
                greatest(0, (extract(epoch from finished_at - created_at) * 1000000)::bigint)
         from these
         where created_at < timestamptz '{begin}' + interval '{seconds} s' or created_at > last - interval '{seconds} s'"
    );
    let mut found = [latencies()?, latencies()?];
    for (when, took) in database.numbers(&query).await? {
        found[usize::from(when == "last")].saturating_record(u64::try_from(took)?);
    }
    Ok(found)
}
