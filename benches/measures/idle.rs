//! A replica that has nothing to do, beside 10,000 workflows with a schedule each.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;
use tokio::time::sleep;

use super::Bench;
use crate::process::Serve;
use crate::report::{Goal, What};
use crate::server::Database;
use crate::workflows::define;

const WORKFLOWS: usize = 10_000;
/// How long statements are counted: what is done once a minute is in it once.
const COUNTED: Duration = Duration::from_secs(60);

pub async fn run(bench: &mut Bench) -> Result<()> {
    eprintln!("idle");
    let database = bench.server.database("own").await?;
    let db = database.db(1)?;
    for number in 0..WORKFLOWS {
        // Half a day away, whenever this is.
        let cron = format!("{} {} * * *", number % 60, (chrono::Timelike::hour(&chrono::Utc::now()) + 12) % 24);
        let definition = json!({"executor": {"type": "command", "argv": ["/bin/true"]}, "schedule": {"cron": cron}});
        define(&db, &format!("nightly-{number}"), &definition).await?;
    }
    db.close().await;
    database.execute("analyze").await?;
    let serve = Serve::with(&database, &[]).await?;
    // Their first ticks are worked out once, and then it is idle.
    while database.number("select count(*) from workflow_schedules where next_at is null").await? > 0 {
        sleep(Duration::from_millis(500)).await;
    }
    sleep(Duration::from_secs(bench.plan.idle_seconds)).await;
    let before = transactions(&database).await?;
    sleep(COUNTED).await;
    let after = transactions(&database).await?;
    // One of the two questions is ours and between them.
    let statements = (after - before - 1) as f64 / COUNTED.as_secs_f64();
    let memory = resident(serve.pid()?)?;
    serve.stop().await?;
    bench.server.remove(database).await?;
    bench.report.add(What::new("idle", "memory", "MiB").goal(Goal::Under(40.0)), memory);
    bench.report.add(What::new("idle", "statements", "/s").goal(Goal::Under(3.0)), statements);
    Ok(())
}

/// Transactions so far: each statement of the service is one.
async fn transactions(database: &Database) -> Result<i64> {
    database.number("select xact_commit + xact_rollback from pg_stat_database where datname = current_database()").await
}

/// Resident memory in MiB.
fn resident(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kibibytes / 1024.0)
}
