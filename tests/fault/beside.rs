//! A replica of the version before and one of this version work on one database, which the new one migrates beneath the old one.
//!
//! Each serves a queue of its own, so that it is known who executes what, and both serve one more. The old one is never started
//! again: what began before the migration has to go on.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use singletrack::dev::Postgres;
use sqlx::PgPool;
use tokio::time::sleep;

/// For anything that has to happen: the short lease is over within six seconds.
const LIMIT: Duration = Duration::from_secs(60);
/// How many workflows both are asked to run at the same time.
const CROWD: usize = 60;
/// Runs until there is a file of its name.
const HELD: &str = "until [ -e \"go.$SINGLETRACK_RUN_ID\" ]; do sleep 0.05; done";

/// Plays all of it on a new database; what was seen, in a line.
pub async fn beside(old: &Path, new: &Path, postgres: &Mutex<Postgres>, folder: &Path) -> Result<String> {
    let folder = folder.join("beside");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    let (admin, url) = {
        let postgres = postgres.lock().expect("nobody panics here");
        (postgres.url("postgres"), postgres.url("beside"))
    };
    let admin = PgPool::connect(&admin).await?;
    sqlx::query("drop database if exists beside with (force)").execute(&admin).await?;
    sqlx::query("create database beside").execute(&admin).await?;
    admin.close().await;
    let sql = PgPool::connect(&url).await?;

    let old = Replica::start(old, "old", &url, &folder).await.context("the old one")?;
    old.define().await?;
    let before = newest(&sql).await?;
    // One that is under way all the while.
    let across = old.enqueue("held-old@across", json!({})).await?;
    old.runs(&across, &old).await?;
    let new_one = Replica::start(new, "new", &url, &folder).await.context("the new one")?;
    let after = newest(&sql).await?;
    ensure!(after > before, "the new one has no migration that the old one has not");

    let mut both = Both { old, new: new_one };
    both.old.release(&across).await?;
    for (here, there) in [(&both.old, &both.new), (&both.new, &both.old)] {
        both.refuse(here, there).await?;
        both.cancel(here, there).await?;
        both.stand_in_line(here, there).await?;
        both.pull(here, there).await?;
    }
    both.share().await?;
    both.lose_the_new_one(new, &url).await?;
    both.freeze_the_old_one().await?;
    both.leave(&sql).await?;
    let runs: i64 = sqlx::query_scalar("select count(*) from test_runs").fetch_one(&sql).await?;
    sql.close().await;
    Ok(format!(
        "a version of migration {before} beside one of {after}: {runs} runs, each final; neither had to be stopped"
    ))
}

async fn newest(sql: &PgPool) -> Result<i64> {
    Ok(sqlx::query_scalar("select max(version) from _sqlx_migrations").fetch_one(sql).await?)
}

struct Both {
    old: Replica,
    new: Replica,
}

impl Both {
    /// What one executes keeps its slot at the other.
    async fn refuse(&self, here: &Replica, there: &Replica) -> Result<()> {
        let workflow = format!("held-{}@refused", here.name);
        let id = there.enqueue(&workflow, json!({})).await?;
        there.runs(&id, here).await?;
        for asked in [here, there] {
            let (status, answer) = asked.post(&format!("/workflows/{workflow}/runs"), json!({})).await?;
            ensure!((status, &answer["run_id"]) == (409, &json!(id)), "{} answered {status} {answer}", asked.name);
        }
        there.release(&id).await
    }

    /// What one executes the other cancels.
    async fn cancel(&self, here: &Replica, there: &Replica) -> Result<()> {
        let id = here.enqueue(&format!("held-{}@cancelled", here.name), json!({})).await?;
        here.runs(&id, here).await?;
        let (status, answer) = there.post(&format!("/runs/{id}/cancel"), json!({})).await?;
        ensure!(status == 202, "{} answered {status} {answer}", there.name);
        there.final_as(&id, "cancelled").await
    }

    /// Runs of the one wait behind, and replace, runs of the other.
    async fn stand_in_line(&self, here: &Replica, there: &Replica) -> Result<()> {
        let workflow = format!("held-{}@line", here.name);
        let first = here.enqueue(&workflow, json!({})).await?;
        here.runs(&first, here).await?;
        let second = there.enqueue(&workflow, json!({"on_conflict": "wait"})).await?;
        there.is(&second, "waiting").await?;
        here.release(&first).await?;
        there.runs(&second, here).await?;
        let third = there.enqueue(&workflow, json!({"on_conflict": "replace"})).await?;
        here.final_as(&second, "cancelled").await?;
        here.runs(&third, here).await?;
        there.release(&third).await
    }

    /// A pull worker speaks to one and then to the other.
    async fn pull(&self, here: &Replica, there: &Replica) -> Result<()> {
        let id = here.enqueue("pull", json!({})).await?;
        let claim = json!({"worker": "beside", "workflows": ["pull"], "max": 1, "wait_seconds": 10});
        let (status, answer) = there.post("/claims", claim).await?;
        let run = &answer["runs"][0];
        ensure!((status, &run["id"]) == (200, &json!(id)), "{} answered {status} {answer}", there.name);
        let token = &run["lease"]["token"];
        let (status, answer) = here.post("/leases/heartbeat", json!({"leases": [{"token": token}]})).await?;
        ensure!((status, &answer["leases"][0]["result"]) == (200, &json!("ok")), "{} said {answer}", here.name);
        let log = json!({"token": token, "stream": "stdout", "seq": 1, "text": "at work\n"});
        let (status, answer) = there.post("/leases/logs", log).await?;
        ensure!(status == 204, "{} answered {status} {answer}", there.name);
        let end = json!({"leases": [{"token": token, "outcome": "succeeded"}]});
        let (status, answer) = here.post("/leases/finish", end).await?;
        ensure!(status == 200, "{} answered {status} {answer}", here.name);
        there.final_as(&id, "succeeded").await
    }

    /// Many workflows at once: each is accepted by one of the two, refused by the other, and executed by either.
    async fn share(&self) -> Result<()> {
        let mut accepted = Vec::new();
        for number in 0..CROWD {
            let path = format!("/workflows/quick@{number}/runs");
            let (one, other) = tokio::join!(self.old.post(&path, json!({})), self.new.post(&path, json!({})));
            let (one, other) = (one?, other?);
            // The first may be over before the second is asked for.
            ensure!([one.0, other.0].contains(&202), "{one:?} {other:?}");
            for (status, answer) in [&one, &other] {
                match status {
                    202 => accepted.push(answer["id"].as_str().context("an id")?.to_owned()),
                    409 => ensure!(answer["run_id"] == one.1["id"] || answer["run_id"] == other.1["id"], "{answer}"),
                    _ => bail!("{status} {answer}"),
                }
            }
        }
        let mut workers = std::collections::HashSet::new();
        for id in &accepted {
            self.old.final_as(id, "succeeded").await?;
            workers.insert(self.new.run(id).await?["worker"].to_string());
        }
        ensure!(workers.len() == 2, "only {workers:?} took part");
        Ok(())
    }

    /// The old one ends what a killed new one has left.
    async fn lose_the_new_one(&mut self, program: &Path, url: &str) -> Result<()> {
        let id = self.new.enqueue("held-new@lost", json!({})).await?;
        self.old.runs(&id, &self.new).await?;
        self.new.child.kill()?;
        self.new.child.wait()?;
        self.old.final_as(&id, "stale").await?;
        let next = self.old.enqueue("held-new@lost", json!({})).await?;
        self.new = Replica::start(program, "new", url, &self.old.folder).await.context("the new one, again")?;
        self.new.runs(&next, &self.new).await?;
        self.old.release(&next).await
    }

    /// The new one ends what the old one held when it was frozen; and that one goes on when it thaws.
    async fn freeze_the_old_one(&self) -> Result<()> {
        let id = self.old.enqueue("held-old@frozen", json!({})).await?;
        self.new.runs(&id, &self.old).await?;
        self.old.signal(Signal::STOP)?;
        let settled = self.new.final_as(&id, "stale").await;
        let next = self.new.enqueue("held-old@frozen", json!({})).await;
        self.old.signal(Signal::CONT)?;
        settled?;
        let next = next?;
        self.old.runs(&next, &self.old).await?;
        self.new.release(&next).await
    }

    /// Both are well to the end, and so is what they leave.
    async fn leave(&mut self, sql: &PgPool) -> Result<()> {
        for replica in [&mut self.old, &mut self.new] {
            let ended = replica.child.try_wait()?;
            ensure!(ended.is_none(), "{} has ended by itself: {ended:?}", replica.name);
            let (status, answer) = replica.get("/readyz").await?;
            ensure!(status == 200, "{} is not ready: {answer}", replica.name);
        }
        let broken: Vec<(String, String)> =
            sqlx::query_as("select violation, detail from invariant_violations").fetch_all(sql).await?;
        ensure!(broken.is_empty(), "{broken:?}");
        let open: i64 =
            sqlx::query_scalar("select count(*) from test_runs where finished_at is null").fetch_one(sql).await?;
        ensure!(open == 0, "{open} runs are not final");
        for replica in [&mut self.old, &mut self.new] {
            replica.signal(Signal::TERM)?;
            let since = Instant::now();
            let ended = loop {
                match replica.child.try_wait()? {
                    Some(status) => break status,
                    None if since.elapsed() > LIMIT => bail!("{} does not stop", replica.name),
                    None => sleep(Duration::from_millis(20)).await,
                }
            };
            ensure!(ended.success(), "{} ended with {ended}", replica.name);
        }
        Ok(())
    }
}

/// A process of one of the two versions, killed when dropped.
struct Replica {
    name: &'static str,
    child: Child,
    base: String,
    http: reqwest::Client,
    folder: PathBuf,
}

impl Replica {
    async fn start(program: &Path, name: &'static str, url: &str, folder: &Path) -> Result<Self> {
        // The service brings its own TLS to its clients; one without must be told of one, though it never uses it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let log = folder.join(format!("{name}.log"));
        let child = Command::new(program)
            .arg("serve")
            .env("DATABASE_URL", url)
            .env("SINGLETRACK_LISTEN", format!("127.0.0.1:{port}"))
            .env("SINGLETRACK_QUEUES", format!("{name},default"))
            .envs(super::cluster::SHORT_LEASE.iter().copied())
            .env("SINGLETRACK_WORKERS", "2")
            .stdin(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| program.display().to_string())?;
        let http = reqwest::Client::builder().no_proxy().timeout(LIMIT).build()?;
        let mut this = Self { name, child, base: format!("http://127.0.0.1:{port}"), http, folder: folder.to_owned() };
        let since = Instant::now();
        while !matches!(this.get("/readyz").await, Ok((200, _))) {
            if this.child.try_wait()?.is_some() || since.elapsed() > LIMIT {
                bail!("it does not get ready: {}", fs::read_to_string(&log)?);
            }
            sleep(Duration::from_millis(50)).await;
        }
        Ok(this)
    }

    async fn define(&self) -> Result<()> {
        let command = |queue: &str, script: &str| {
            let executor = json!({"type": "command", "argv": ["sh", "-c", script], "cwd": self.folder});
            json!({"queue": queue, "executor": executor})
        };
        let definitions = [
            ("held-old", command("old", HELD)),
            ("held-new", command("new", HELD)),
            ("quick", command("default", "sleep 0.1")),
            ("pull", json!({"executor": {"type": "pull"}})),
        ];
        for (id, definition) in definitions {
            let path = format!("{}/api/v1/workflows/{id}", self.base);
            let answer = self.http.put(path).json(&definition).send().await?;
            ensure!(answer.status().is_success(), "{}", answer.text().await?);
        }
        Ok(())
    }

    async fn get(&self, path: &str) -> Result<(u16, Value)> {
        read(self.http.get(format!("{}{path}", self.base))).await
    }

    async fn post(&self, path: &str, body: Value) -> Result<(u16, Value)> {
        read(self.http.post(format!("{}/api/v1{path}", self.base)).json(&body)).await
    }

    /// Enqueues a run, which must be accepted; its id.
    async fn enqueue(&self, workflow: &str, body: Value) -> Result<String> {
        let (status, answer) = self.post(&format!("/workflows/{workflow}/runs"), body).await?;
        ensure!(status == 202, "{} answered {status} {answer}", self.name);
        Ok(answer["id"].as_str().context("an id")?.to_owned())
    }

    async fn run(&self, id: &str) -> Result<Value> {
        let (status, run) = self.get(&format!("/api/v1/runs/{id}")).await?;
        ensure!(status == 200, "{} answered {status} {run}", self.name);
        Ok(run)
    }

    /// Waits until it says that the run has this status; the run.
    async fn is(&self, id: &str, status: &str) -> Result<Value> {
        let since = Instant::now();
        loop {
            let run = self.run(id).await?;
            if run["status"] == status {
                return Ok(run);
            }
            let over = run["finished_at"].is_string();
            ensure!(!over && since.elapsed() < LIMIT, "not {status} at {}: {run}", self.name);
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until it says that `worker` executes the run.
    async fn runs(&self, id: &str, worker: &Replica) -> Result<()> {
        let run = self.is(id, "running").await?;
        let pid = worker.child.id().to_string();
        let named = run["worker"].as_str().and_then(|name| name.split(':').nth(1));
        ensure!(named == Some(&pid), "{} (process {pid}) does not execute {run}", worker.name);
        Ok(())
    }

    async fn final_as(&self, id: &str, status: &str) -> Result<()> {
        self.is(id, status).await.map(drop)
    }

    /// Lets a held run end, and waits for its success.
    async fn release(&self, id: &str) -> Result<()> {
        fs::write(self.folder.join(format!("go.{id}")), "")?;
        self.final_as(id, "succeeded").await
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status and body; a body that is none is null.
async fn read(request: reqwest::RequestBuilder) -> Result<(u16, Value)> {
    let response = request.send().await?;
    Ok((response.status().as_u16(), serde_json::from_slice(&response.bytes().await?).unwrap_or_default()))
}
