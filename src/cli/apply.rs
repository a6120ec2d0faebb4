//! `singletrack workflows apply`: definitions of workflows, as files have them.

use std::fs;
use std::io::{self, Read as _};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::client::{Client, Connection, Failure};
use super::definitions::{self, Wanted};
use super::diff::{Change, diff};
use super::output::{say, say_json};
use crate::domain::{Definition, json};

#[derive(Args, Debug)]
pub(super) struct Apply {
    /// The file, or - for standard input. YAML 1.2: `workflows:`, and below it each id with its definition, the fields of
    /// PUT /api/v1/workflows/{id}. examples/workflows.yaml is one.
    #[arg(short, long, value_name = "FILE")]
    file: String,
    /// Print what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

/// What became of one workflow.
#[derive(Debug, Serialize)]
struct Applied {
    id: String,
    result: &'static str,
    /// What differed from the service's definition; empty for one that is new.
    changes: Vec<Change>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Apply {
    /// Runs it to its exit code.
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let client = self.connection.client()?;
        let wanted = self.read()?;
        // All of them before the first change: a service that is not there, or lets nobody in, has changed nothing then.
        let mut plan = Vec::new();
        for wanted in wanted {
            let current = client.get(&path(&wanted)).await?;
            plan.push((planned(&wanted, current), wanted));
        }
        let mut code = ExitCode::SUCCESS;
        let mut done = Vec::new();
        for (mut applied, wanted) in plan {
            if let Err(failure) = self.put(&client, &applied, &wanted).await {
                eprintln!("singletrack: {}: {failure}", applied.id);
                code = failure.code();
                applied = Applied { result: "failed", error: Some(failure.to_string()), ..applied };
            }
            if !self.json && applied.error.is_none() {
                say(applied.in_words());
            }
            done.push(applied);
        }
        if self.json {
            say_json(&json!({"dry_run": self.dry_run, "workflows": done}));
        }
        Ok(code)
    }

    fn read(&self) -> Result<Vec<Wanted>, Failure> {
        let (name, text) = match self.file.as_str() {
            "-" => {
                let mut text = String::new();
                ("standard input", io::stdin().read_to_string(&mut text).map(|_| text))
            }
            file => (file, fs::read_to_string(file)),
        };
        let text = text.map_err(|error| Failure::Usage(format!("can't read {name}: {error}")))?;
        definitions::read(&text).map_err(|mistakes| {
            let lines = mistakes.iter().map(|mistake| format!("{name}:{mistake}"));
            Failure::Usage(lines.collect::<Vec<_>>().join("\n"))
        })
    }

    async fn put(&self, client: &Client, applied: &Applied, wanted: &Wanted) -> Result<(), Failure> {
        if self.dry_run || applied.result == "unchanged" {
            return Ok(());
        }
        client.put(&path(wanted), &wanted.body).await.map(drop)
    }
}

impl Applied {
    /// A line, and one more for each change.
    fn in_words(&self) -> String {
        let changes: String = self.changes.iter().map(|change| format!("  {change}\n")).collect();
        format!("{}: {}\n{changes}", self.id, self.result)
    }
}

fn path(wanted: &Wanted) -> String {
    // An id has no character that means something in a path.
    format!("/workflows/{}", wanted.id)
}

/// What applying will do, given the service's current revision.
fn planned(wanted: &Wanted, current: Option<Value>) -> Applied {
    let (result, changes) = match current {
        None => ("created", Vec::new()),
        Some(current) => match diff(&said(current), &plain(json!(wanted.definition))) {
            changes if changes.is_empty() => ("unchanged", changes),
            changes => ("changed", changes),
        },
    };
    Applied { id: wanted.id.to_string(), result, changes, error: None }
}

/// What a revision of the service says as a definition. What else is known of it is left out; one that another version of
/// the service wrote, in a way that is not known here, stays as it is.
fn said(mut revision: Value) -> Value {
    loop {
        match json::read::<Definition>(revision.clone()) {
            Ok(definition) => return plain(json!(definition)),
            Err((pointer, detail)) => {
                let name = pointer.strip_prefix('/').filter(|_| detail.starts_with("unknown field"));
                let members = revision.as_object_mut();
                let gone = name.zip(members).and_then(|(name, members)| members.remove(name));
                if gone.is_none() {
                    return plain(revision);
                }
            }
        }
    }
}

/// Whole numbers as such: `5` and `5.0` are the same to JSON, and to the database.
fn plain(value: Value) -> Value {
    /// Up to here every whole number is one of floating point.
    const EXACT: f64 = (1_u64 << 53) as f64;
    match value {
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() <= EXACT => json!(float as i64),
            _ => Value::Number(number),
        },
        Value::Array(entries) => entries.into_iter().map(plain).collect(),
        Value::Object(members) => members.into_iter().map(|(name, value)| (name, plain(value))).collect(),
        other => other,
    }
}
