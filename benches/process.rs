//! The processes that are measured: the service, and this program in another role.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use crate::http::{Connection, get};
use crate::server::{Database, free_port};

/// The service as it is built here.
pub const SINGLETRACK: &str = env!("CARGO_BIN_EXE_singletrack");

/// Where results, and what the processes say, are written.
pub fn folder() -> Result<PathBuf> {
    let tmp = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let folder = tmp.parent().unwrap_or(&tmp).join("bench");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// A program with nothing in its environment but what it needs, and its log in a file.
fn program(path: impl AsRef<std::ffi::OsStr>, database: &Database, log: &str) -> Result<Command> {
    let log = File::create(folder()?.join(log))?;
    let mut command = Command::new(path);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).kill_on_drop(true);
    for name in ["PATH", "HOME", "LANG", "TMPDIR"] {
        command.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    command.env("DATABASE_URL", &database.url);
    Ok(command)
}

/// A running `singletrack serve`, killed when dropped.
pub struct Serve {
    child: Child,
    /// Where its API is.
    pub address: String,
}

impl Serve {
    /// One that executes nothing.
    pub async fn start(database: &Database) -> Result<Self> {
        Self::with(database, &[("SINGLETRACK_WORKERS", "0")]).await
    }

    /// One with these settings, as soon as it is ready.
    pub async fn with(database: &Database, environment: &[(&str, &str)]) -> Result<Self> {
        let address = format!("127.0.0.1:{}", free_port()?);
        let mut command = program(SINGLETRACK, database, "serve.log")?;
        command.arg("serve").env("SINGLETRACK_LISTEN", &address).envs(environment.iter().copied());
        let child = command.stdout(Stdio::null()).spawn().context("can't start singletrack serve")?;
        let mut this = Self { child, address };
        let since = Instant::now();
        while !this.is_ready().await {
            if since.elapsed() > Duration::from_secs(30) || this.child.try_wait()?.is_some() {
                bail!("singletrack serve does not become ready: see {}", folder()?.join("serve.log").display());
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(this)
    }

    async fn is_ready(&self) -> bool {
        let Ok(mut connection) = Connection::open(&self.address).await else { return false };
        connection.call(&get("/readyz")).await.is_ok_and(|answer| answer.status == 200)
    }

    pub fn pid(&self) -> Result<u32> {
        self.child.id().context("singletrack serve has ended")
    }

    /// Has it stop in order.
    pub async fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.pid()?)?;
        kill_process(Pid::from_raw(pid).context("a process has no number")?, Signal::TERM)?;
        timeout(Duration::from_secs(60), self.child.wait()).await.context("singletrack serve does not stop")??;
        Ok(())
    }
}

/// This program in another role, on a database.
pub struct Role(Child);

impl Role {
    pub fn start(database: &Database, arguments: &[&str]) -> Result<Self> {
        let mut command = program(std::env::current_exe()?, database, "role.log")?;
        Ok(Self(command.args(arguments).spawn()?))
    }

    /// Kills it, and waits until it is gone.
    pub async fn kill(mut self) -> Result<()> {
        Ok(self.0.kill().await?)
    }

    /// The one line of JSON that it prints at its end.
    pub async fn answer(self) -> Result<Value> {
        let output = self.0.wait_with_output().await?;
        if !output.status.success() {
            bail!("a process of the benchmark failed: {}", fs::read_to_string(folder()?.join("role.log"))?.trim());
        }
        serde_json::from_slice(&output.stdout).context("what a process of the benchmark printed")
    }
}

/// A member of what a role printed.
pub fn figure(answer: &Value, name: &str) -> Result<f64> {
    answer[name].as_f64().with_context(|| format!("no {name} in {answer}"))
}
