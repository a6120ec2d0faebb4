//! Enqueue over HTTP, one run per request, each of a workflow of its own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use super::Bench;
use crate::floor;
use crate::http::{Next, closed, post};
use crate::process::Serve;
use crate::report::{Goal, What};
use crate::server::Database;
use crate::workflows::{Instances, NOOP, input};

pub const CONNECTIONS: [usize; 2] = [32, 256];

pub async fn run(bench: &mut Bench) -> Result<()> {
    for repetition in 0..bench.plan.repetitions {
        bench.says("enqueue", repetition);
        let floor = floor::insert(&bench.server, bench.plan.seconds).await?;
        bench.report.add(What::new("enqueue", "bare INSERT, 32 clients", "/s"), floor);
        for connections in CONNECTIONS {
            let database = bench.server.database("own").await?;
            let rate = once(&database, connections, bench.plan.length()).await?;
            let what = What::new("enqueue", format!("over HTTP, {connections} connections"), "runs/s");
            bench.report.add(what.against("bare INSERT, 32 clients").goal(Goal::TimesAtLeast(1.0)), rate);
            bench.server.remove(database).await?;
        }
    }
    Ok(())
}

/// Runs per second that are accepted.
pub async fn once(database: &Database, connections: usize, length: Duration) -> Result<f64> {
    let serve = Serve::start(database).await?;
    let rate = closed(&serve.address, connections, length, requests(NOOP)).await?.rate(202)?;
    serve.stop().await?;
    Ok(rate)
}

/// Requests for a run of an instance of its own.
pub fn requests(workflow: &str) -> Next {
    let instances = Instances::of(workflow);
    let body = format!("{{\"input\":{}}}", input());
    Arc::new(move |request| {
        let mut instance = Vec::with_capacity(64);
        instances.write(&mut instance);
        post(request, &[b"/api/v1/workflows/", &instance, b"/runs"], body.as_bytes());
    })
}
