//! A program that embeds the library: its handlers do the runs of their workflows.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use singletrack::config::Settings;
use singletrack::{Context, Handlers, Stop, embed};

use super::command::Work;
use super::journal::{Entry, Journal};

pub async fn main(url: String, name: String, workflows: Vec<String>, journal: Journal) {
    let text = |text: &str| Some(text.to_owned());
    let settings = Settings {
        database_url: Some(url),
        workers: text("16"),
        heartbeat_interval: text("500ms"),
        heartbeat_timeout: text("5s"),
        kill_grace: text("200ms"),
        reap_interval: text("200ms"),
        drain_timeout: text("5s"),
        migrate: text("off"),
        ..Settings::default()
    };
    let config = settings.resolve(None).expect("good settings");
    let journal = Arc::new(journal);
    let mut handlers = Handlers::new();
    for workflow in workflows {
        let (journal, name) = (journal.clone(), name.clone());
        let work = move |context: Context| work(context, journal.clone(), name.clone());
        handlers = handlers.on(&workflow.parse().expect("an id"), work);
    }
    // A program that is started while the database is away tries again.
    while let Err(error) = embed(config.clone(), handlers.clone(), Stop::default()).await {
        tracing::warn!("{error:#}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn work(context: Context, journal: Arc<Journal>, by: String) -> Result<serde_json::Value, String> {
    let (fence, run) = (context.fence(), context.run());
    journal.write([Entry::Start { fence, run: run.id, workflow: run.workflow_id.to_string(), by }]);
    let work: Work = context.input().unwrap_or_default();
    tokio::select! {
        () = tokio::time::sleep(Duration::from_millis(work.ms)) => {}
        cause = context.stopped() => return Err(format!("stopped: {cause:?}")),
    }
    journal.write([Entry::End { fence }]);
    if work.fail { Err("asked to fail".into()) } else { Ok(json!({"fence": fence})) }
}
