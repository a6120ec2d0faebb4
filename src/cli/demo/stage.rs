//! Where the demo is played: a private Postgres, replicas that are processes of their own, and a folder. None of it outlives us.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::stat::Mode;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::sleep;
use url::Url;

use super::super::client::Client;
use crate::dev::{self, Postgres};

/// How long a replica may take to start, or a command to say something.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at something that another process does.
const LOOK: Duration = Duration::from_millis(2);
/// How long a replica may take to stop before it is killed.
const LEAVING: Duration = Duration::from_secs(5);

/// The settings of the replicas; the shortest lease that they allow, for those who watch.
const SETTINGS: [(&str, &str); 8] = [
    ("SINGLETRACK_LISTEN", "127.0.0.1:0"),
    ("SINGLETRACK_WORKERS", "2"),
    ("SINGLETRACK_HEARTBEAT_INTERVAL", "500ms"),
    ("SINGLETRACK_HEARTBEAT_TIMEOUT", "5s"),
    ("SINGLETRACK_KILL_GRACE", "200ms"),
    ("SINGLETRACK_REAP_INTERVAL", "200ms"),
    ("SINGLETRACK_DRAIN_TIMEOUT", "1s"),
    ("SINGLETRACK_LOG_FORMAT", "json"),
];

/// All of it. What is dropped is stopped and removed: replicas first, then Postgres, then the folder.
pub(super) struct Stage {
    pub(super) replicas: Vec<Replica>,
    postgres: Option<Postgres>,
    folder: TempDir,
}

impl Stage {
    /// A Postgres and no replica yet. Blocks for as long as that takes to start.
    pub(super) fn open(bin_dir: Option<PathBuf>) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("singletrack-demo-").tempdir().context("can't make a folder")?;
        // As root the account of Postgres must pass through; what is in it is closed by itself.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o711))?;
        let options = dev::Options { data_dir: folder.path().join("data"), bin_dir, ..dev::Options::default() };
        let postgres = Some(Postgres::start(options)?);
        Ok(Self { replicas: Vec::new(), postgres, folder })
    }

    pub(super) fn database_url(&self) -> anyhow::Result<String> {
        Ok(self.postgres.as_ref().context("Postgres was stopped")?.url("postgres"))
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts so many replicas at once; they migrate the database between them.
    pub(super) async fn add_replicas(&mut self, count: usize) -> anyhow::Result<()> {
        let url = self.database_url()?;
        for number in 1..=count {
            self.replicas.push(Replica::spawn(number, &url, self.folder.path())?);
        }
        for replica in &mut self.replicas {
            replica.ready().await?;
        }
        Ok(())
    }

    /// Makes what a command can tell us through whether it lives.
    pub(super) fn ear(&self) -> anyhow::Result<Ear> {
        let path = self.folder.path().join("alive");
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        Ear::open(path)
    }

    /// Stops everything in order and removes it; the processes and folders that are left all the same.
    pub(super) async fn close(mut self) -> Vec<String> {
        for replica in &self.replicas {
            let _ = kill_process(Pid::from_child(&replica.child), Signal::TERM);
        }
        let since = Instant::now();
        while since.elapsed() < LEAVING
            && self.replicas.iter_mut().any(|replica| matches!(replica.child.try_wait(), Ok(None)))
        {
            sleep(LOOK).await;
        }
        let places = self.places();
        drop(self);
        places.into_iter().filter(|place| place.exists()).map(|place| place.display().to_string()).collect()
    }

    /// The folder, and that of Postgres where that one could not enter ours.
    fn places(&self) -> [PathBuf; 2] {
        let data = self.postgres.as_ref().map_or(self.folder.path(), Postgres::data_dir);
        [self.folder.path().to_owned(), data.to_owned()]
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let [_, data] = self.places();
        self.replicas.clear();
        self.postgres = None;
        let _ = fs::remove_dir_all(data);
    }
}

/// A `singletrack serve`, killed when dropped.
pub(super) struct Replica {
    /// As people count.
    pub(super) number: usize,
    pub(super) url: String,
    child: Child,
    log: PathBuf,
    client: Option<Client>,
}

impl Replica {
    fn spawn(number: usize, database: &str, folder: &Path) -> anyhow::Result<Self> {
        let log = folder.join(format!("replica-{number}.log"));
        let mut command = Command::new(std::env::current_exe()?);
        // What is exported is meant for others.
        command.arg("serve").env_clear().envs(SETTINGS).env("DATABASE_URL", database);
        for name in ["PATH", "HOME", "LANG", "TMPDIR"] {
            command.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        // A terminal's Ctrl-C goes to the whole foreground group, and we stop them ourselves.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        dev::die_with_us(&mut command, Signal::KILL);
        let child = command.spawn().context("can't start a replica")?;
        Ok(Self { number, url: String::new(), child, log, client: None })
    }

    /// Waits until it says where it listens.
    async fn ready(&mut self) -> anyhow::Result<()> {
        let since = Instant::now();
        loop {
            let log = fs::read_to_string(&self.log)?;
            let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            let address = lines
                .filter(|line| line["message"] == "ready")
                .find_map(|line| Some(line["address"].as_str()?.to_owned()));
            if let Some(address) = address {
                self.url = format!("http://{address}");
                self.client = Some(Client::new(&Url::parse(&self.url)?, "")?);
                return Ok(());
            }
            if since.elapsed() > PATIENCE || self.child.try_wait()?.is_some() {
                bail!("replica {} did not start: {}", self.number, log.trim());
            }
            sleep(LOOK).await;
        }
    }

    /// A client of it.
    pub(super) fn client(&self) -> anyhow::Result<&Client> {
        self.client.as_ref().context("it did not start")
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Hears of a command: whatever lives of it holds the other end of this pipe.
pub(super) struct Ear {
    pub(super) path: PathBuf,
    pipe: File,
}

impl Ear {
    fn open(path: PathBuf) -> anyhow::Result<Self> {
        let pipe = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&path)?;
        Ok(Self { path, pipe })
    }

    /// Waits until a command says something; that.
    pub(super) async fn hears(&mut self) -> anyhow::Result<String> {
        let mut heard = Vec::new();
        let since = Instant::now();
        while !heard.ends_with(b"\n") {
            if since.elapsed() > PATIENCE {
                bail!("the command did not start");
            }
            self.read(&mut heard)?;
            sleep(LOOK).await;
        }
        Ok(String::from_utf8_lossy(&heard).trim().to_owned())
    }

    /// Waits until nothing is alive of it.
    pub(super) async fn falls_silent(&mut self) -> anyhow::Result<()> {
        let since = Instant::now();
        while self.read(&mut Vec::new())? != Some(0) {
            if since.elapsed() > PATIENCE {
                bail!("the command is still alive");
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// How many bytes came: none where nobody holds the other end, `None` where somebody does who says nothing.
    fn read(&mut self, heard: &mut Vec<u8>) -> anyhow::Result<Option<usize>> {
        let mut bytes = [0; 256];
        match self.pipe.read(&mut bytes) {
            Ok(count) => {
                heard.extend(bytes.iter().take(count));
                Ok(Some(count))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
