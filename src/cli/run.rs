//! `singletrack run`: enqueues a run, and waits for its end where that is wanted.

use std::fs;
use std::io::{self, Read as _};
use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::Args;
use reqwest::Method;
use serde_json::{Map, Value, json};
use tokio::time::sleep;
use uuid::Uuid;

use super::client::{Answer, Client, Connection, Failure};
use super::output::{ago, coloured, duration, printable, say, say_json, seconds, tell, time, words};
use super::watch::watch;
use crate::domain::TraceContext;

/// How often an enqueue is repeated whose answer was lost, and the time between.
const TRIES: u32 = 10;
const AGAIN: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
#[command(
    after_help = "Exit code: 0 it succeeded (or, without --wait, was enqueued), 1 it ended otherwise, 2 it was cancelled,\n\
    3 the slot is taken or the workflow is paused, 4 not authorised, 64 wrong usage, 130 Ctrl-C: the run goes on.\n\n\
    Examples:\n  singletrack run deploy@prod --input '{\"ref\": \"v1.2\"}' --follow\n  \
    singletrack run e2e --on-conflict wait --wait --timeout 30m\n  singletrack run migrate --follow-holder"
)]
pub(super) struct Run {
    /// The workflow, or an instance of one, such as deploy@prod.
    workflow: String,
    /// What the run is given: JSON, @FILE, or - for standard input. [default: null]
    #[arg(short, long, value_name = "JSON")]
    input: Option<String>,
    /// Wait until the run is over; its status is the exit code. A terminal shows how far it is; what the run prints is not shown.
    #[arg(short, long)]
    wait: bool,
    /// Wait, show how far it is until it starts, and print what it prints: its standard output here, its standard error there.
    #[arg(short, long)]
    follow: bool,
    /// What to do when the slot is taken. [default: what the workflow says]
    #[arg(long, value_name = "POLICY", value_parser = ["reject", "return_existing", "wait", "replace"])]
    on_conflict: Option<String>,
    /// When the slot is taken, follow the run that has it instead.
    #[arg(long)]
    follow_holder: bool,
    /// Stop waiting after this time, such as 30m, with exit code 1; the run goes on.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Of several requests with the same key one run comes. [default: a new one, which makes the repetition of a lost request safe]
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// -100 to 100, higher first. [default: the workflow's]
    #[arg(long, allow_hyphen_values = true)]
    priority: Option<i16>,
    /// A label, once or more.
    #[arg(short, long = "label", value_name = "NAME=VALUE", value_parser = super::filter::label)]
    labels: Vec<(String, String)>,
    /// How many attempts it may have. [default: the workflow's]
    #[arg(long)]
    max_attempts: Option<i32>,
    /// Start it so much later, such as 10m.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, conflicts_with = "run_at")]
    delay: Option<Duration>,
    /// Start it at this time, such as 2026-01-31T08:00:00Z.
    #[arg(long, value_name = "TIME")]
    run_at: Option<DateTime<Utc>>,
    /// Print one JSON document: the run, or the problem. What the run prints goes to standard error then.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

impl Run {
    /// Runs it to its exit code.
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let client = self.connection.client()?;
        let body = self.body()?;
        let path = format!("/workflows/{}/runs", super::filter::workflow(&self.workflow)?);
        let answer = self.enqueue(&client, &path, &body).await?;
        let taken = answer.problem() == Some("slot-taken");
        if let (true, true, Some(id)) = (taken, self.follow_holder, answer.body["run_id"].as_str()) {
            tell(format_args!("{}: following that run", holder(&self.workflow, &answer.body)));
            let id = id.to_owned();
            return watch(&client, &id, true, self.json, self.timeout).await;
        }
        if taken {
            return Ok(self.refused(&client, &answer.body));
        }
        if answer.problem().is_some() && self.json {
            say_json(&answer.body);
        }
        let is_new = answer.status == 202;
        let run = client.good(answer)?;
        let id = run["id"].as_str().unwrap_or_default();
        let waits = self.wait || self.follow || self.follow_holder;
        match (self.json, waits) {
            (true, false) => drop(say_json(&run)),
            (true, true) => {}
            (false, _) => drop(say(format_args!("{id}\n"))),
        }
        let which = if is_new { "" } else { " (it was there already)" };
        tell(format_args!("run {id} of {}{which}: {}", printable(&self.workflow), coloured(&run["status"])));
        tell(format_args!("  {}", client.page_of_run(id)));
        if waits {
            return watch(&client, id, self.follow || self.follow_holder, self.json, self.timeout).await;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn body(&self) -> Result<Value, Failure> {
        let mut body = Map::new();
        let mut set = |name: &str, value: Value| {
            if !value.is_null() {
                body.insert(name.to_owned(), value);
            }
        };
        set("input", self.read_input()?);
        set("on_conflict", json!(self.on_conflict));
        set("priority", json!(self.priority));
        set("max_attempts", json!(self.max_attempts));
        set("delay_seconds", json!(self.delay.map(|delay| delay.as_secs_f64().ceil() as u64)));
        set("run_at", json!(self.run_at));
        if !self.labels.is_empty() {
            set("labels", self.labels.iter().map(|(name, value)| (name.clone(), json!(value))).collect());
        }
        Ok(Value::Object(body))
    }

    fn read_input(&self) -> Result<Value, Failure> {
        let Some(input) = &self.input else { return Ok(Value::Null) };
        let unread = |name: &str, error: io::Error| Failure::Usage(format!("--input: can't read {name}: {error}"));
        let text = match (input.as_str(), input.strip_prefix('@')) {
            ("-", _) => {
                let mut text = String::new();
                io::stdin().read_to_string(&mut text).map_err(|error| unread("standard input", error))?;
                text
            }
            (_, Some(file)) => fs::read_to_string(file).map_err(|error| unread(file, error))?,
            (text, None) => text.to_owned(),
        };
        serde_json::from_str(&text).map_err(|error| {
            Failure::Usage(format!("--input: is not JSON: {error}. A text is written with quotes in it: '\"text\"'"))
        })
    }

    /// Asks until there is an answer: with its key the request is the same one each time.
    async fn enqueue(&self, client: &Client, path: &str, body: &Value) -> Result<Answer, Failure> {
        let key = self.idempotency_key.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
        // As a pipeline that is traced hands it to its steps.
        let traceparent = std::env::var("TRACEPARENT").ok().filter(|context| context.parse::<TraceContext>().is_ok());
        let mut headers = vec![("Idempotency-Key", key.as_str())];
        headers.extend(traceparent.as_deref().map(|context| ("traceparent", context)));
        let mut tries = 1;
        loop {
            let asked = client.send(Method::POST, path, body, &headers).await;
            let why = match &asked {
                // Nobody was there from the beginning: then this is not a restart that is soon over.
                Err(Failure::Unreached(_)) if tries == 1 => return asked,
                Err(Failure::Unreached(why) | Failure::NoAnswer(why)) => why.clone(),
                Ok(answer) if answer.status == 503 || answer.problem() == Some("idempotency-in-flight") => {
                    words(&answer.body["detail"])
                }
                _ => return asked,
            };
            if tries == TRIES {
                return asked;
            }
            if tries == 1 {
                tell(format_args!("singletrack: {why} Asking again."));
            }
            tries += 1;
            sleep(AGAIN).await;
        }
    }

    fn refused(&self, client: &Client, problem: &Value) -> ExitCode {
        if self.json {
            say_json(problem);
        }
        let (workflow, id) = (printable(&self.workflow), problem["run_id"].as_str().unwrap_or_default());
        tell(format_args!("{}: nothing was enqueued", holder(&self.workflow, problem)));
        tell(format_args!("  look at it      {}", client.page_of_run(id)));
        tell(format_args!("  follow it       singletrack runs logs -f {id}"));
        tell(format_args!("  end it          singletrack runs cancel {id}"));
        tell(format_args!("  wait behind it  singletrack run {workflow} --on-conflict wait"));
        Failure::Conflict(String::new()).code()
    }
}

/// Who has the slot, since when, and for how long.
fn holder(workflow: &str, problem: &Value) -> String {
    let holder = &problem["holder"];
    let mut said = vec![match holder["status"].as_str() {
        Some("running") => format!("began {}", ago(&holder["started_at"])),
        _ => format!(
            "is {}, enqueued {}",
            printable(holder["status"].as_str().unwrap_or("there")),
            ago(&holder["created_at"])
        ),
    }];
    said.extend(holder["reason"].as_str().map(|reason| format!("reason {}", printable(reason))));
    said.extend(holder["requested_by"].as_str().map(|by| format!("asked for by {}", printable(by))));
    said.extend(holder["heartbeat_age_seconds"].as_f64().map(|age| format!("last sign of life {} ago", duration(age))));
    let end = &holder["expected_end_at"];
    said.extend(
        time(end)
            .filter(|end| *end > Utc::now())
            .and_then(|_| seconds(&json!(Utc::now()), end))
            .map(|left| format!("usually over in {}", duration(left))),
    );
    let id = problem["run_id"].as_str().unwrap_or_default();
    format!("{} is taken by run {id}, which {}", printable(workflow), said.join(", "))
}
