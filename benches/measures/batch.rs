//! Enqueue over HTTP, 1,000 runs per request.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use super::Bench;
use crate::floor;
use crate::http::{closed, post};
use crate::process::Serve;
use crate::report::{Goal, What};
use crate::server::Database;
use crate::workflows::{Instances, NOOP, input};

const RUNS: usize = 1000;
const CONNECTIONS: usize = 4;

pub async fn run(bench: &mut Bench) -> Result<()> {
    for repetition in 0..bench.plan.repetitions {
        bench.says("batch", repetition);
        let floor = floor::bulk(&bench.server, bench.plan.half()).await?;
        bench.report.add(What::new("batch", "bare bulk INSERT", "rows/s"), floor);
        let database = bench.server.database("own").await?;
        let rate = once(&database, Duration::from_secs(bench.plan.half())).await?;
        let what = What::new("batch", "POST /runs/batch of 1,000", "runs/s");
        bench.report.add(what.against("bare bulk INSERT").goal(Goal::AtLeast(60_000.0)), rate);
        bench.server.remove(database).await?;
    }
    Ok(())
}

/// Runs per second that are there afterwards.
pub async fn once(database: &Database, length: Duration) -> Result<f64> {
    let serve = Serve::start(database).await?;
    let begin = database.now().await?;
    let instances = Instances::of(NOOP);
    let rest = format!("\",\"input\":{}}}", input());
    let next = move |request: &mut Vec<u8>| {
        let mut body = Vec::with_capacity(RUNS * (rest.len() + 64));
        body.extend_from_slice(b"{\"runs\":[");
        for number in 0..RUNS {
            body.extend_from_slice(if number == 0 { b"{\"workflow_id\":\"" } else { b",{\"workflow_id\":\"" });
            instances.write(&mut body);
            body.extend_from_slice(rest.as_bytes());
        }
        body.extend_from_slice(b"]}");
        post(request, &[b"/api/v1/runs/batch"], &body);
    };
    let load = closed(&serve.address, CONNECTIONS, length, Arc::new(next)).await?;
    serve.stop().await?;
    // The answer of each entry is in the body, which nobody reads: what counts is the rows.
    let runs = database.number(&format!("select count(*) from test_runs where created_at >= '{begin}'")).await?;
    Ok(runs as f64 / load.seconds)
}
