//! A worker inside your own program: the workflow `nightly-sync` is done by an async function, at most once at a time over
//! all programs and replicas that share the database.
//!
//!     DATABASE_URL=postgres://... cargo run --example embedded
//!
//! starts one run of it and does it; Ctrl-C ends the program. Further runs can be started over HTTP at any `singletrack serve`
//! on the same database. That of `make run` is `postgres://singletrack@localhost/postgres?host=$PWD/.singletrack/socket`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use serde_json::json;
use singletrack::app::prepare_schema;
use singletrack::config::Settings;
use singletrack::domain::{Definition, WorkflowId};
use singletrack::store::enqueue::{Enqueued, Request};
use singletrack::store::{Db, LIMIT, Servers, workflows};
use singletrack::{Client, Context, Handlers, Stop, embed};

#[derive(Deserialize)]
struct Input {
    tables: Vec<String>,
}

/// The work. It stops between two tables when somebody cancels the run, and says so by an error.
async fn sync(context: Context) -> anyhow::Result<serde_json::Value> {
    let input: Input = context.input().context("the input must be {\"tables\": [...]}")?;
    for (done, table) in input.tables.iter().enumerate() {
        if let Some(cause) = context.stop_cause() {
            bail!("stopped before {table}: {cause:?}");
        }
        context.log(format!("copying {table}, fence {}", context.fence())).await;
        context.progress(json!({"done": done, "of": input.tables.len()}))?;
        tokio::select! {
            () = copy(table) => {}
            // Within the kill grace: then this future would be dropped.
            cause = context.stopped() => bail!("stopped in {table}: {cause:?}"),
        }
    }
    Ok(json!({"tables": input.tables.len()}))
}

async fn copy(_table: &str) {
    tokio::time::sleep(Duration::from_millis(200)).await;
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let workflow: WorkflowId = "nightly-sync".parse().map_err(anyhow::Error::msg)?;

    let url = std::env::var("DATABASE_URL").context("DATABASE_URL must name the Postgres to use")?;
    // The settings of the service, by the names of its flags; here all but one have their defaults.
    let settings = Settings { database_url: Some(url), ..Settings::default() };
    let config = settings.resolve(None)?;

    let stop = Stop::default();
    let stopper = stop.clone();
    tokio::spawn(async move {
        // The first Ctrl-C lets runs finish, the second one stops them.
        while tokio::signal::ctrl_c().await.is_ok() {
            stopper.ask();
        }
    });

    // Define it and start a run. Any other program, or the API, can do that as well.
    let servers = Servers::from(config.database_url.as_ref().context("DATABASE_URL")?.options());
    prepare_schema(&servers, config.migrate).await?;
    let db = Db::new(servers.clone(), 1, LIMIT);
    let definition: Definition = serde_json::from_value(json!({
        "executor": {"type": "handler"}, "timeout_seconds": 3600, "max_attempts": 3,
    }))?;
    db.with(async |connection| workflows::put(connection, &workflow, &definition, "example").await).await?;
    let input = Some(json!({"tables": ["orders", "customers"]}));
    let request = Request { input, ..Request::new(workflow.clone(), "example") };
    match Client::new(servers, 1).enqueue(request).await? {
        Enqueued::Accepted(run) => println!("started {}", run.id),
        Enqueued::SlotTaken(holder) => println!("already in progress: {}", holder.run_id),
        other => bail!("not started: {other:?}"),
    }

    embed(config, Handlers::new().on(&workflow, sync), stop).await
}
