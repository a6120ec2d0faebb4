//! What commands are told of runs and workflows: ids, labels, and which runs a list is of.

use chrono::{DateTime, TimeDelta, Utc};
use clap::Args;
use serde_json::{Value, json};

use super::client::Failure;
use crate::domain::WorkflowId;

/// Which runs.
#[derive(Args, Debug, Default)]
pub(super) struct Filter {
    /// Those of this workflow, by its full id.
    #[arg(short, long, value_name = "ID")]
    workflow: Option<String>,
    /// Those of this definition and its instances.
    #[arg(long, value_name = "ID")]
    definition: Option<String>,
    /// Those in this status, once or more, or separated by commas.
    #[arg(short, long, value_name = "STATUS", value_delimiter = ',', value_parser = STATUSES)]
    status: Vec<String>,
    /// Those of this queue.
    #[arg(short, long)]
    queue: Option<String>,
    /// Those with this label, once or more.
    #[arg(short, long = "label", value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Those enqueued since this time, such as 2026-01-31T08:00:00Z, or since so long ago, such as 2h.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<DateTime<Utc>>,
    /// Those enqueued before it.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<DateTime<Utc>>,
}

const STATUSES: [&str; 10] =
    ["scheduled", "waiting", "queued", "running", "succeeded", "failed", "cancelled", "timed_out", "stale", "skipped"];

impl Filter {
    /// As the parameters of a list.
    pub(super) fn query(&self) -> Vec<(&'static str, String)> {
        let time = |at: DateTime<Utc>| at.to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
        let one = [
            ("workflow_id", self.workflow.clone()),
            ("definition", self.definition.clone()),
            ("status", Some(self.status.join(",")).filter(|list| !list.is_empty())),
            ("queue", self.queue.clone()),
            ("since", self.since.map(time)),
            ("until", self.until.map(time)),
        ];
        let one = one.into_iter().filter_map(|(name, value)| Some((name, value?)));
        one.chain(self.labels.iter().map(|(name, value)| ("label", format!("{name}={value}")))).collect()
    }

    /// As the body of a request about all of them; `None` where nothing narrows it.
    pub(super) fn body(&self) -> Option<Value> {
        let mut body = serde_json::Map::new();
        for (name, value) in self.query() {
            match name {
                "status" => body.insert(name.into(), json!(self.status)),
                "label" => continue,
                _ => body.insert(name.into(), value.into()),
            };
        }
        if !self.labels.is_empty() {
            let labels = self.labels.iter().map(|(name, value)| (name.clone(), json!(value)));
            body.insert("labels".into(), labels.collect());
        }
        (!body.is_empty()).then_some(Value::Object(body))
    }
}

/// `name=value`.
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn moment(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(at) = text.parse() {
        return Ok(at);
    }
    let ago = humantime::parse_duration(text).ok().and_then(|ago| TimeDelta::from_std(ago).ok());
    ago.and_then(|ago| Utc::now().checked_sub_signed(ago))
        .ok_or("must be a time such as 2026-01-31T08:00:00Z, or how long ago, such as 2h".into())
}

/// A workflow id, as part of a path.
pub(super) fn workflow(id: &str) -> Result<WorkflowId, Failure> {
    id.parse().map_err(|mistake| Failure::Usage(format!("workflow `{}`: {mistake}", id.escape_debug())))
}

/// A run's id, as part of a path.
pub(super) fn run_id(text: &str) -> Result<String, String> {
    let wrong = |_| "is not a run's id such as 0198c5a0-5a1e-7c5e-9d3c-3f6d2a1b4c5d".to_owned();
    text.parse::<uuid::Uuid>().map(|id| id.to_string()).map_err(wrong)
}
