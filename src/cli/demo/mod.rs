//! `singletrack demo`: the promise in half a minute, with what was measured. Everything in it is real, and gone afterwards.

mod stage;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::sleep;
use uuid::Uuid;

use self::stage::{Ear, Replica, Stage};
use super::client::Failure;
use super::{in_a_line, stop_on_signals};
use crate::app::demo::Witness;
use crate::config::DatabaseUrl;

const REPLICAS: usize = 3;
const REQUESTS: usize = 200;
const WORKFLOW: &str = "nightly-tests";
/// Says that it has begun, and holds the pipe for as long as it lives: for long, if its input says so.
const SCRIPT: &str = r#"exec 3>"$PIPE"; echo "$SINGLETRACK_RUN_ID" >&3; case "$(cat)" in *600*) exec sleep 600;; esac"#;
/// How long anything may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Its settings.
#[derive(Args, Debug)]
pub(super) struct Demo {
    /// Folder of the programs `initdb` and `postgres`. [default: looked for]
    #[arg(long, env = "SINGLETRACK_PG_BIN", value_name = "FOLDER")]
    pg_bin: Option<PathBuf>,
}

impl Demo {
    /// Plays it, and tells what it sees.
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.play().await {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(error) => Err(Failure::Failed(in_a_line(&error))),
        }
    }

    async fn play(self) -> anyhow::Result<()> {
        // From the first moment on: Ctrl-C while Postgres starts must not leave it behind.
        let stop = stop_on_signals()?;
        let since = Instant::now();
        let bin_dir = self.pg_bin.filter(|folder| !folder.as_os_str().is_empty());
        let mut stage = tokio::task::spawn_blocking(|| Stage::open(bin_dir)).await??;
        let played = tokio::select! {
            biased;
            () = stop.asked() => Err(anyhow::anyhow!("stopped before its end")),
            played = story(&mut stage, since) => played,
        };
        let left = stage.close().await;
        played?;
        ensure!(left.is_empty(), "could not be removed: {}", left.join(", "));
        headline(&format!("All as promised, in {}. Nothing of it is left.", seconds(since)))
    }
}

async fn story(stage: &mut Stage, since: Instant) -> anyhow::Result<()> {
    headline("Three replicas, each a process of its own, share a Postgres that is as private as it is durable")?;
    tell("Postgres", &format!("in {}, made and started in {}", stage.folder().display(), seconds(since)))?;
    let since = Instant::now();
    stage.add_replicas(REPLICAS).await?;
    for replica in &stage.replicas {
        tell(&format!("replica {}", replica.number), &format!("{}, process {}", replica.url, replica.pid()))?;
    }
    tell("ready", &format!("after {}; one of them made the tables while the others waited", seconds(since)))?;
    let witness = Witness::new(stage.database_url()?.parse::<DatabaseUrl>().map_err(anyhow::Error::msg)?.options());
    let mut ear = stage.ear()?;

    let first = storm(stage, &ear).await?;
    let killed = worker_of(stage, first, &mut ear).await?;
    second_row(&witness, first).await?;
    let dead_since = lose(stage, killed, first, &mut ear).await?;
    next(stage, killed, dead_since, &mut ear).await?;

    headline("What the database says of it")?;
    let broken = witness.violations().await?;
    witness.leave().await;
    ensure!(broken.is_empty(), "invariant_violations has: {}", broken.join("; "));
    tell("broken", "no promise: the view invariant_violations is empty")?;
    Ok(())
}

/// Many requests at once; the run of the one that was accepted.
async fn storm(stage: &Stage, ear: &Ear) -> anyhow::Result<Uuid> {
    headline(&format!("{REQUESTS} requests at the same time to start {WORKFLOW}, over all replicas"))?;
    let executor = json!({"type": "command", "argv": ["sh", "-c", SCRIPT], "env": {"PIPE": ear.path}});
    replica(stage, 0)?.client()?.put(&format!("/workflows/{WORKFLOW}"), &json!({"executor": executor})).await?;
    let mut requests = JoinSet::new();
    let since = Instant::now();
    for number in 0..REQUESTS {
        let client = replica(stage, number % REPLICAS)?.client()?.clone();
        requests.spawn(async move { client.ask_for(&runs(), &json!({"input": {"seconds": 600}})).await });
    }
    let answers: Vec<(u16, Value)> = requests.join_all().await.into_iter().collect::<Result<_, _>>()?;
    let took = seconds(since);
    let mut accepted = answers.iter().filter(|(status, _)| *status == 202).map(|(_, run)| &run["id"]);
    let first = accepted.next().context("none of them was accepted")?;
    ensure!(accepted.next().is_none(), "more than one of them was accepted");
    let refused = answers.iter().filter(|(status, problem)| *status == 409 && problem["run_id"] == *first).count();
    ensure!(
        refused == REQUESTS - 1,
        "only {refused} were refused with the id of the run that has the slot: {answers:?}"
    );
    let id = id(first)?;
    tell("202 Accepted", &format!("1, run {id}"))?;
    tell("409 Conflict", &format!("{refused}, each with the id of that run"))?;
    tell("took", &took)?;
    Ok(id)
}

/// Waits until the command of a run has begun; the place of the replica that executes it.
async fn worker_of(stage: &Stage, run_id: Uuid, ear: &mut Ear) -> anyhow::Result<usize> {
    let heard = ear.hears().await?;
    ensure!(heard == run_id.to_string(), "a command has begun for {heard}");
    let run = run(replica(stage, 0)?, run_id).await?;
    // Host, process, and something random.
    let pid = run["worker"].as_str().and_then(|name| name.split(':').nth(1)).context("it has no worker")?.to_owned();
    let place = stage.replicas.iter().position(|replica| replica.pid().to_string() == pid);
    let place = place.with_context(|| format!("it is executed by process {pid}, which is none of ours"))?;
    tell("executed", &format!("by replica {}", place + 1))?;
    Ok(place)
}

/// Somebody types SQL.
async fn second_row(witness: &Witness, first: Uuid) -> anyhow::Result<()> {
    headline("A second running row, typed in SQL")?;
    match witness.double(first).await? {
        Some(index) => tell("refused", &format!("by Postgres itself: unique index {index}")),
        None => bail!("the database let in a second running row"),
    }
}

/// Kills the replica that executes the run, and waits until the slot is free; when its command was dead.
async fn lose(stage: &mut Stage, place: usize, run_id: Uuid, ear: &mut Ear) -> anyhow::Result<Instant> {
    headline(&format!("kill -9 of replica {}, in the middle of the run", place + 1))?;
    let since = Instant::now();
    stage.replicas.get_mut(place).context("no such replica")?.kill()?;
    ear.falls_silent().await?;
    let dead_since = Instant::now();
    tell("its command", &format!("dead after {}: the guard saw its worker end", seconds(since)))?;
    let other = replica(stage, (place + 1) % REPLICAS)?;
    let (status, problem) = other.client()?.ask_for(&runs(), &json!({})).await?;
    ensure!((status, &problem["run_id"]) == (409, &json!(run_id)), "the slot is not kept: {status} {problem}");
    tell("the slot", "is kept for as long as the worker may be alive and unheard of: 409")?;
    let settled = settled(other, run_id).await?;
    let end = (settled["status"].as_str(), settled["reason"].as_str());
    ensure!(end == (Some("stale"), Some("worker_lost")), "it ended as {end:?}");
    tell("the run", &format!("stale after {}, 5 s (by default 60 s) after its last heartbeat", seconds(since)))?;
    Ok(dead_since)
}

/// The workflow is free again.
async fn next(stage: &Stage, killed: usize, dead_since: Instant, ear: &mut Ear) -> anyhow::Result<()> {
    headline("The next request")?;
    let other = replica(stage, (killed + 2) % REPLICAS)?;
    let since = Instant::now();
    let (status, answer) = other.client()?.ask_for(&runs(), &json!({})).await?;
    ensure!(status == 202, "it was answered by {status} {answer}");
    let run_id = id(&answer["id"])?;
    tell("202 Accepted", &format!("run {run_id}"))?;
    let heard = ear.hears().await?;
    ensure!(heard == run_id.to_string(), "a command has begun for {heard}");
    tell("begun", &format!("after {}, {} after the first command was dead", seconds(since), seconds(dead_since)))?;
    let run = settled(other, run_id).await?;
    ensure!(run["status"] == "succeeded", "it ended as {}: {}", run["status"], run["error"]);
    tell("over", &format!("succeeded after {}", seconds(since)))?;
    Ok(())
}

fn replica(stage: &Stage, place: usize) -> anyhow::Result<&Replica> {
    stage.replicas.get(place).context("no such replica")
}

fn runs() -> String {
    format!("/workflows/{WORKFLOW}/runs")
}

fn id(value: &Value) -> anyhow::Result<Uuid> {
    Ok(value.as_str().context("it has no id")?.parse()?)
}

async fn run(replica: &Replica, run_id: Uuid) -> anyhow::Result<Value> {
    replica.client()?.get(&format!("/runs/{run_id}")).await?.context("the run is lost")
}

/// The run, when it is final.
async fn settled(replica: &Replica, run_id: Uuid) -> anyhow::Result<Value> {
    let since = Instant::now();
    loop {
        let run = run(replica, run_id).await?;
        if run["finished_at"].is_string() {
            return Ok(run);
        }
        ensure!(since.elapsed() < PATIENCE, "it is not final after a minute: {run}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn headline(text: &str) -> anyhow::Result<()> {
    say(&format!("\n{text}"))
}

fn tell(what: &str, text: &str) -> anyhow::Result<()> {
    say(&format!("  {what:<14}{text}"))
}

/// Not by a macro, which panics where nobody reads it any more, as after `| head`.
fn say(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("nobody watches any more")
}

fn seconds(since: Instant) -> String {
    format!("{:.2} s", since.elapsed().as_secs_f64())
}
