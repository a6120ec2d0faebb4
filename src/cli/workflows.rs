//! `singletrack workflows`, `slots` and `workers`: what is defined, who has it, and who works.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::apply::Apply;
use super::client::{Connection, Failure};
use super::filter::workflow;
use super::output::{Cell, ago, duration, facts, is_confirmed, labels, say, say_json, table, tell, words};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make the service's workflows what a file says, and print what that changes. Workflows that the file does not name
    /// are left alone: nothing is deleted. What is paused stays paused.
    Apply(Apply),
    /// List workflows.
    Ls(Ls),
    /// Show a workflow: its definition, and when its schedule ticks next.
    Show(One),
    /// Delete a workflow. Its history stays, and its id may come back.
    Rm(Rm),
    /// Start none of its runs any more, until it is resumed; what runs goes on.
    Pause(Pause),
    /// End its pause.
    Resume(One),
}

/// A list.
#[derive(Args, Debug)]
pub(super) struct Ls {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Args, Debug)]
pub(super) struct One {
    /// The workflow.
    workflow: String,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Args, Debug)]
pub(super) struct Rm {
    /// The workflow.
    workflow: String,
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Args, Debug)]
pub(super) struct Pause {
    /// Why: who is refused meanwhile is told.
    #[arg(short, long)]
    reason: Option<String>,
    #[command(flatten)]
    one: One,
}

impl Command {
    /// Runs it to its exit code.
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Self::Apply(apply) => apply.run().await,
            Self::Ls(ls) => ls.workflows().await,
            Self::Show(one) => one.show().await,
            Self::Rm(rm) => rm.run().await,
            Self::Pause(pause) => pause.one.change("pause", &json!({"reason": pause.reason})).await,
            Self::Resume(one) => one.change("resume", &json!({})).await,
        }
    }
}

impl Ls {
    async fn workflows(self) -> Result<ExitCode, Failure> {
        let names = ["WORKFLOW", "REVISION", "EXECUTOR", "ON CONFLICT", "QUEUE", "SCHEDULE", "PAUSED"];
        self.print("/workflows", "no workflows: singletrack workflows apply -f FILE makes some", names, |workflow| {
            let schedule = &workflow["schedule"];
            let schedule = schedule["cron"].as_str().map(|cron| format!("{cron} {}", words(&schedule["time_zone"])));
            [
                Cell::of(&workflow["id"]),
                Cell::of(&workflow["revision"]),
                Cell::of(&workflow["executor"]["type"]),
                Cell::of(&workflow["on_conflict"]),
                Cell::of(&workflow["queue"]),
                Cell::text(schedule.unwrap_or("-".into())),
                paused(&workflow["pause"]),
            ]
        })
        .await
    }

    /// Slots: who has them.
    pub(super) async fn slots(self) -> Result<ExitCode, Failure> {
        let names =
            ["WORKFLOW", "HELD BY", "STATUS", "SINCE", "SIGN OF LIFE", "WAITING", "SUCCEEDED", "USUALLY", "PAUSED"];
        self.print("/slots", "no workflows yet", names, |slot| {
            let holder = &slot["holder"];
            let since = if holder["started_at"].is_null() { &holder["created_at"] } else { &holder["started_at"] };
            let life = holder["heartbeat_age_seconds"].as_f64();
            let rate = slot["success_rate"].as_f64();
            [
                Cell::of(&slot["workflow_id"]),
                Cell::of(&holder["run_id"]),
                if holder.is_null() { Cell::text("free") } else { Cell::status(&holder["status"]) },
                Cell::text(ago(since)),
                Cell::text(life.map_or("-".into(), |age| format!("{} ago", duration(age)))),
                Cell::of(&slot["waiting"]),
                Cell::text(rate.map_or("-".into(), |rate| format!("{:.0} %", rate * 100.0))),
                Cell::text(slot["p50_seconds"].as_f64().map_or("-".into(), duration)),
                paused(&slot["pause"]),
            ]
        })
        .await
    }

    /// Replicas and pull workers.
    pub(super) async fn workers(self) -> Result<ExitCode, Failure> {
        let names = ["WORKER", "RUNNING", "SEEN", "EXECUTORS", "QUEUES", "WORKFLOWS", "VERSION"];
        self.print("/workers", "no workers were seen within a day", names, |worker| {
            let all = |value: &Value| if value.is_null() { Cell::text("all") } else { Cell::of(value) };
            [
                Cell::of(&worker["name"]),
                Cell::of(&worker["running"]),
                Cell::text(ago(&worker["seen_at"])),
                Cell::of(&worker["executor_types"]),
                all(&worker["queues"]),
                all(&worker["workflows"]),
                Cell::of(&worker["version"]),
            ]
        })
        .await
    }

    async fn print<const N: usize>(
        self,
        path: &str,
        nothing: &str,
        names: [&str; N],
        row: impl Fn(&Value) -> [Cell; N],
    ) -> Result<ExitCode, Failure> {
        let client = self.connection.client()?;
        let (items, _) = client.list(path, &[], usize::MAX).await?;
        if self.json {
            say_json(&json!({"items": items}));
        } else if items.is_empty() {
            tell(nothing);
        } else {
            say(table(names, items.iter().map(row).collect()));
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn paused(pause: &Value) -> Cell {
    let Some(by) = pause["paused_by"].as_str() else { return Cell::text("-") };
    let reason = pause["reason"].as_str().map(|reason| format!(": {reason}")).unwrap_or_default();
    Cell::text(format!("{} by {by}{reason}", ago(&pause["paused_at"])))
}

impl One {
    async fn show(self) -> Result<ExitCode, Failure> {
        let (client, id) = (self.connection.client()?, workflow(&self.workflow)?);
        let found = client.get(&format!("/workflows/{id}")).await?;
        let found = found.ok_or_else(|| Failure::Failed(format!("there is no workflow {id}")))?;
        if self.json {
            say_json(&found);
            return Ok(ExitCode::SUCCESS);
        }
        let next = match found["schedule"].is_object() {
            true => client.get(&format!("/schedules/{id}/next?count=3")).await?.unwrap_or_default(),
            false => Value::Null,
        };
        let again = found["max_attempts"] != 1;
        say(facts([
            ("Workflow", Cell::of(&found["id"])),
            ("Revision", Cell::text(format!("{}, {}", found["revision"], ago(&found["created_at"])))),
            ("Paused", paused(&found["pause"])),
            ("Executor", Cell::of(&found["executor"])),
            ("On conflict", Cell::of(&found["on_conflict"])),
            ("Max waiting", Cell::of(&found["max_waiting"])),
            ("Queue", Cell::text(format!("{}, priority {}", words(&found["queue"]), found["priority"]))),
            ("Timeout", Cell::text(found["timeout_seconds"].as_f64().map_or("-".into(), duration))),
            ("Attempts", Cell::of(&found["max_attempts"])),
            ("Again after", Cell::of(if again { &found["retry_on"] } else { &Value::Null })),
            ("Backoff", Cell::of(if again { &found["backoff"] } else { &Value::Null })),
            ("Labels", Cell::text(labels(&found["labels"]))),
            ("Schedule", Cell::of(&found["schedule"])),
            ("Next", Cell::of(&next["next"])),
        ]));
        Ok(ExitCode::SUCCESS)
    }

    async fn change(self, what: &str, body: &Value) -> Result<ExitCode, Failure> {
        let (client, id) = (self.connection.client()?, workflow(&self.workflow)?);
        let done = client.post(&format!("/workflows/{id}/{what}"), body).await?;
        if self.json {
            say_json(&done);
        } else {
            tell(format_args!("{id}: {what}d"));
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Rm {
    async fn run(self) -> Result<ExitCode, Failure> {
        let (client, id) = (self.connection.client()?, workflow(&self.workflow)?);
        if !self.yes {
            match is_confirmed(&format!("delete workflow {id}?")) {
                Some(true) => {}
                Some(false) => return Ok(ExitCode::FAILURE),
                None => {
                    return Err(Failure::Usage(format!("delete workflow {id}? Say --yes: nobody can be asked here")));
                }
            }
        }
        client.delete(&format!("/workflows/{id}")).await?;
        if self.json {
            say_json(&json!({"id": id, "deleted": true}));
        } else {
            tell(format_args!("{id}: deleted; its history stays"));
        }
        Ok(ExitCode::SUCCESS)
    }
}
