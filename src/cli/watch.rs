//! Waiting for the end of a run.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;
use tokio::pin;
use tokio::signal::ctrl_c;
use tokio::time::{Instant, interval, sleep};

use super::client::{Client, Failure};
use super::follow::Stream;
use super::output::{Progress, coloured, duration, printable, say_json, say_log, seconds, tell, words};

/// How long one request waits, which is less where somebody looks on; and how soon there is another where the service has no place to
/// wait.
const WAIT_SECONDS: u64 = 20;
const SEEN_SECONDS: u64 = 2;
const AGAIN: Duration = Duration::from_secs(1);
/// As of a process that Ctrl-C has ended.
const INTERRUPTED: u8 = 130;

/// Waits until the run is over, printing its log if `follow`; what the process ends with.
pub(super) async fn watch(
    client: &Client,
    id: &str,
    follow: bool,
    json: bool,
    timeout: Option<Duration>,
) -> Result<ExitCode, Failure> {
    let late = async {
        match timeout {
            Some(timeout) => sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let over = async {
        if follow {
            // The log is silent until it starts; where a terminal shows nothing else, nobody knows why.
            if Progress::new().is_seen() {
                wait(client, id, has_begun).await?;
            }
            print_log(client, id, None, true, json).await?;
        }
        wait(client, id, |run| run["finished_at"].is_string()).await
    };
    let run = tokio::select! {
        run = over => run?,
        () = late => {
            tell(format_args!("not over yet; it goes on. To end it: singletrack runs cancel {id}"));
            return Ok(ExitCode::FAILURE);
        }
        _ = ctrl_c() => {
            tell(format_args!("\nthe run goes on. To end it: singletrack runs cancel {id}"));
            return Ok(ExitCode::from(INTERRUPTED));
        }
    };
    if json {
        say_json(&run);
    }
    tell(in_a_line(&run));
    Ok(code(&run))
}

/// Prints the log of a run, or of one attempt; with `follow` until the run is over. As JSON it is beside what a script reads.
pub(super) async fn print_log(
    client: &Client,
    id: &str,
    attempt: Option<i32>,
    follow: bool,
    json: bool,
) -> Result<(), Failure> {
    let path = format!("/runs/{id}/logs");
    let mut query: Vec<_> = attempt.map(|attempt| ("attempt", attempt.to_string())).into_iter().collect();
    let print = |entry: &Value| {
        let text = entry["text"].as_str().unwrap_or_default();
        say_log(text, json || entry["stream"] == "stderr")
    };
    if !follow {
        let (entries, _) = client.list(&path, &query, usize::MAX).await?;
        // Who has seen enough closes the pipe.
        let _ = entries.iter().all(print);
        return Ok(());
    }
    query.push(("follow", "true".into()));
    let mut log = Stream::new(client, path, query);
    while let Some(event) = log.next().await? {
        let _ = print(&event.data);
    }
    Ok(())
}

fn has_begun(run: &Value) -> bool {
    !matches!(run["status"].as_str(), Some("scheduled" | "waiting" | "queued"))
}

/// The run, once it is far `enough`.
async fn wait(client: &Client, id: &str, enough: impl Fn(&Value) -> bool) -> Result<Value, Failure> {
    let (mut progress, mut tick) = (Progress::new(), interval(AGAIN));
    let patience = if progress.is_seen() { SEEN_SECONDS } else { WAIT_SECONDS };
    let mut run = Value::Null;
    let mut complained = false;
    loop {
        let asked_at = Instant::now();
        // The first answer is there at once, so that there is something to show.
        let asked = client.run_once_over(id, if run.is_null() { 0 } else { patience });
        pin!(asked);
        let answer = loop {
            tokio::select! {
                answer = &mut asked => break answer,
                _ = tick.tick() => progress.show(&state(&run)),
            }
        };
        match answer {
            Ok(Some(answer)) if enough(&answer) => return Ok(answer),
            Ok(Some(answer)) => (run, complained) = (answer, false),
            Ok(None) => return Err(Failure::Failed(format!("run {id} is not there any more"))),
            Err(Failure::Unreached(why) | Failure::NoAnswer(why)) if !run.is_null() => {
                if !std::mem::replace(&mut complained, true) {
                    progress.clear();
                    tell(format_args!("singletrack: {why} The run may go on; asking again."));
                }
            }
            Err(failure) => return Err(failure),
        }
        progress.show(&state(&run));
        if asked_at.elapsed() < AGAIN && !run.is_null() {
            sleep(AGAIN / 4).await;
        }
    }
}

/// What it is doing.
fn state(run: &Value) -> String {
    let since = if run["status"] == "running" { &run["started_at"] } else { &run["created_at"] };
    let Some(seconds) = seconds(since, &Value::Null) else { return String::new() };
    let attempt = match run["attempt"].as_i64() {
        Some(attempt) if attempt > 1 => format!(", attempt {attempt} of {}", words(&run["max_attempts"])),
        _ => String::new(),
    };
    let reason = run["reason"].as_str().map(|reason| format!(" ({reason})")).unwrap_or_default();
    format!("{}{reason} for {}{attempt}", words(&run["status"]), duration(seconds))
}

/// How it ended.
pub(super) fn in_a_line(run: &Value) -> String {
    let mut line = format!("run {} {}", words(&run["id"]), coloured(&run["status"]));
    if let Some(reason) = run["reason"].as_str() {
        line += &format!(" ({reason})");
    }
    if let Some(seconds) = seconds(&run["started_at"], &run["finished_at"]) {
        line += &format!(" after {}", duration(seconds));
    }
    if let Some(error) = run["error"].as_str() {
        line += &format!(": {}", printable(error));
    }
    line
}

/// What the process ends with.
fn code(run: &Value) -> ExitCode {
    ExitCode::from(match run["status"].as_str() {
        Some("succeeded") => 0,
        Some("cancelled") => 2,
        _ => 1,
    })
}
