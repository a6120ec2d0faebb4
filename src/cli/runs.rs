//! `singletrack runs`: looking at runs, ending them, running them again.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, Connection, Failure};
use super::filter::{Filter, run_id};
use super::output::{
    Cell, ago, coloured, duration, facts, is_confirmed, labels, say, say_json, seconds, table, tell, words,
};
use super::watch::{in_a_line, print_log, watch};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List runs, newest first.
    Ls(Ls),
    /// Show a run: what it is, its attempts, its events, and who was refused because of it.
    Show(Show),
    /// Cancel runs: those that are named, or all that the filters find.
    Cancel(Many),
    /// Run runs that are over again: those that are named, or all that the filters find. Exit code 3: the slot of one was taken.
    Rerun(Many),
    /// Print what a run printed.
    Logs(Logs),
}

#[derive(Args, Debug)]
pub(super) struct Ls {
    #[command(flatten)]
    filter: Filter,
    /// Most runs to list.
    #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// All of them.
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Args, Debug)]
pub(super) struct Show {
    /// The run.
    #[arg(value_parser = run_id)]
    id: String,
    /// Print one JSON document: the run.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Args, Debug)]
pub(super) struct Many {
    /// The runs.
    #[arg(value_parser = run_id)]
    ids: Vec<String>,
    #[command(flatten)]
    filter: Filter,
    /// With filters: print how many there are, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// With filters: do not ask.
    #[arg(short, long)]
    yes: bool,
    /// Print JSON: a document for each run that is named, or one of what the filters found.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Args, Debug)]
pub(super) struct Logs {
    /// The run.
    #[arg(value_parser = run_id)]
    id: String,
    /// Go on until the run is over; its status is the exit code, as with `run --wait`.
    #[arg(short, long)]
    follow: bool,
    /// Only this attempt.
    #[arg(long, value_name = "N", conflicts_with = "follow")]
    attempt: Option<i32>,
    /// Print JSON: the pieces of the log; with --follow the run as it ended, and the log on standard error.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

impl Command {
    /// Runs it to its exit code.
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Self::Ls(ls) => ls.run().await,
            Self::Show(show) => show.run().await,
            Self::Cancel(many) => many.run("cancel").await,
            Self::Rerun(many) => many.run("rerun").await,
            Self::Logs(logs) => logs.run().await,
        }
    }
}

impl Ls {
    async fn run(self) -> Result<ExitCode, Failure> {
        let client = self.connection.client()?;
        let limit = if self.all { usize::MAX } else { usize::try_from(self.limit).unwrap_or(usize::MAX) };
        let (runs, more) = client.list("/runs", &self.filter.query(), limit).await?;
        if self.json {
            say_json(&json!({"items": runs}));
            return Ok(ExitCode::SUCCESS);
        }
        if runs.is_empty() {
            tell("no runs");
            return Ok(ExitCode::SUCCESS);
        }
        let row = |run: &Value| {
            [
                Cell::of(&run["id"]),
                Cell::of(&run["workflow_id"]),
                Cell::status(&run["status"]),
                Cell::of(&run["reason"]),
                Cell::text(format!("{}/{}", run["attempt"], run["max_attempts"])),
                Cell::text(ago(&run["created_at"])),
                Cell::text(seconds(&run["started_at"], &run["finished_at"]).map_or("-".into(), duration)),
                Cell::of(&run["requested_by"]),
            ]
        };
        let names = ["RUN", "WORKFLOW", "STATUS", "REASON", "ATTEMPT", "ENQUEUED", "TOOK", "BY"];
        say(table(names, runs.iter().map(row).collect()));
        if more {
            tell(format_args!("the newest {}; --all or --limit for more", runs.len()));
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Show {
    async fn run(self) -> Result<ExitCode, Failure> {
        let (client, id) = (self.connection.client()?, &self.id);
        let run = client.get(&format!("/runs/{id}")).await?;
        let run = run.ok_or_else(|| Failure::Failed(format!("there is no run {id}")))?;
        if self.json {
            say_json(&run);
            return Ok(ExitCode::SUCCESS);
        }
        let mut text = facts_of(&run);
        if let Some(attempts) = client.get(&format!("/runs/{id}/attempts")).await? {
            text += &attempts_of(&attempts["items"]);
        }
        let (events, _) = client.list(&format!("/runs/{id}/events"), &[], usize::MAX).await?;
        text += &section(
            ["WHEN", "STATUS", "REASON", "BY"],
            events.iter().map(|event| {
                [
                    Cell::of(&event["at"]),
                    Cell::status(&event["to_status"]),
                    Cell::of(&event["reason"]),
                    Cell::of(&event["actor"]),
                ]
            }),
        );
        if let Some(refusals) = client.get(&format!("/runs/{id}/refusals")).await? {
            let refusals = refusals["items"].as_array().cloned().unwrap_or_default();
            text += &section(
                ["REFUSED", "TIMES", "LAST"],
                refusals.iter().map(|refused| {
                    let who = refused["requester"].as_str().unwrap_or("others");
                    [Cell::text(who), Cell::of(&refused["refusals"]), Cell::of(&refused["last_at"])]
                }),
            );
        }
        say(text);
        tell(client.page_of_run(id));
        Ok(ExitCode::SUCCESS)
    }
}

fn facts_of(run: &Value) -> String {
    let took = seconds(&run["started_at"], &run["finished_at"]).map_or("-".into(), duration);
    facts([
        ("Run", Cell::of(&run["id"])),
        ("Workflow", Cell::text(format!("{}, revision {}", words(&run["workflow_id"]), run["revision"]))),
        ("Status", Cell::status(&run["status"])),
        ("Reason", Cell::of(&run["reason"])),
        (
            "Enqueued",
            Cell::text(format!(
                "{} ({}), by {}",
                words(&run["created_at"]),
                ago(&run["created_at"]),
                words(&run["requested_by"])
            )),
        ),
        ("Due", Cell::of(&run["run_at"])),
        ("Started", Cell::of(&run["started_at"])),
        ("Finished", Cell::of(&run["finished_at"])),
        ("Took", Cell::text(took)),
        ("Queue", Cell::text(format!("{}, priority {}", words(&run["queue"]), run["priority"]))),
        ("Worker", Cell::of(&run["worker"])),
        ("Exit code", Cell::of(&run["exit_code"])),
        ("Error", Cell::of(&run["error"])),
        ("Labels", Cell::text(labels(&run["labels"]))),
        ("Input", Cell::of(&run["input"])),
        ("Output", Cell::of(&run["output"])),
        ("Rerun of", Cell::of(&run["rerun_of"])),
        ("Blocked by", Cell::of(&run["blocked_by"])),
    ])
}

fn attempts_of(attempts: &Value) -> String {
    let row = |attempt: &Value| {
        [
            Cell::of(&attempt["attempt"]),
            Cell::status(&attempt["status"]),
            Cell::of(&attempt["reason"]),
            Cell::of(&attempt["started_at"]),
            Cell::text(seconds(&attempt["started_at"], &attempt["finished_at"]).map_or("-".into(), duration)),
            Cell::of(&attempt["worker"]),
            Cell::of(&attempt["error"]),
        ]
    };
    let names = ["ATTEMPT", "STATUS", "REASON", "STARTED", "TOOK", "WORKER", "ERROR"];
    section(names, attempts.as_array().into_iter().flatten().map(row))
}

/// A table below something else; nothing where it has no rows.
fn section<const N: usize>(names: [&str; N], rows: impl Iterator<Item = [Cell; N]>) -> String {
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() { String::new() } else { format!("\n{}", table(names, rows)) }
}

impl Many {
    async fn run(self, what: &'static str) -> Result<ExitCode, Failure> {
        let client = self.connection.client()?;
        match (self.ids.is_empty(), self.filter.body()) {
            (false, None) => self.each(&client, what).await,
            (true, Some(which)) => self.all(&client, what, which).await,
            (true, None) => Err(Failure::Usage(format!("name the runs to {what}, or filters such as --workflow"))),
            (false, Some(_)) => Err(Failure::Usage("name runs or filters, not both".into())),
        }
    }

    async fn each(&self, client: &Client, what: &str) -> Result<ExitCode, Failure> {
        let mut code = ExitCode::SUCCESS;
        for id in &self.ids {
            let answer = client.send(Method::POST, &format!("/runs/{id}/{what}"), &json!({}), &[]).await?;
            if self.json {
                say_json(&answer.body);
            }
            match client.good(answer) {
                Ok(_) if self.json => {}
                Ok(run) if what == "rerun" => {
                    say(format_args!("{}\n", words(&run["id"])));
                    tell(format_args!("run {id} again: {}", in_a_line(&run)));
                }
                Ok(run) if run["finished_at"].is_null() => {
                    tell(format_args!("{}: its end was asked for", in_a_line(&run)))
                }
                Ok(run) => tell(in_a_line(&run)),
                Err(failure) => {
                    eprintln!("singletrack: {failure}");
                    code = failure.code();
                }
            }
        }
        Ok(code)
    }

    async fn all(&self, client: &Client, what: &str, mut which: Value) -> Result<ExitCode, Failure> {
        let path = format!("/runs/{what}");
        which["dry_run"] = true.into();
        let found = client.post(&path, &which).await?;
        if self.dry_run {
            return Ok(self.report(&found, &format!("would {what}")));
        }
        let matched = &found["matched"];
        if *matched != 0 && !self.yes {
            match is_confirmed(&format!("{what} {matched} runs?")) {
                Some(true) => {}
                Some(false) => return Ok(ExitCode::FAILURE),
                None => {
                    return Err(Failure::Usage(format!(
                        "{what} {matched} runs? Say --yes, or --dry-run to see which: nobody can be asked here"
                    )));
                }
            }
        }
        which["dry_run"] = false.into();
        Ok(self.report(&client.post(&path, &which).await?, what))
    }

    fn report(&self, done: &Value, what: &str) -> ExitCode {
        if self.json {
            say_json(done);
            return ExitCode::SUCCESS;
        }
        for id in done["ids"].as_array().into_iter().flatten() {
            say(format_args!("{}\n", words(id)));
        }
        let counts = done["counts"].as_object().into_iter().flatten();
        let counts: Vec<_> = counts.map(|(name, count)| format!("{count} {name}")).collect();
        let counts = if counts.is_empty() { String::new() } else { format!(": {}", counts.join(", ")) };
        let more = if done["more"] == true { "; there are more: do it again" } else { "" };
        tell(format_args!("{what} {} runs{counts}{more}", done["matched"]));
        ExitCode::SUCCESS
    }
}

impl Logs {
    async fn run(self) -> Result<ExitCode, Failure> {
        let client = self.connection.client()?;
        if self.follow {
            return watch(&client, &self.id, true, self.json, None).await;
        }
        if self.json {
            let attempt: Vec<_> = self.attempt.map(|attempt| ("attempt", attempt.to_string())).into_iter().collect();
            let (pieces, _) = client.list(&format!("/runs/{}/logs", self.id), &attempt, usize::MAX).await?;
            say_json(&json!({"items": pieces}));
            return Ok(ExitCode::SUCCESS);
        }
        print_log(&client, &self.id, self.attempt, false, false).await?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A status, as part of a line.
pub(super) fn change(event: &Value) -> String {
    match event["from"].as_str() {
        None => coloured(&event["to"]),
        Some(from) if event["to"] == from => format!("{from}, to be cancelled"),
        Some(from) => format!("{from} -> {}", coloured(&event["to"])),
    }
}
