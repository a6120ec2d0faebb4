//! What this program is besides the suite: the suite's other processes.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use serde::{Deserialize, Serialize};

use super::http::Replicas;
use super::journal::Journal;
use super::workflows::Workflows;
use super::{client, command, handlers, worker};

/// The first argument of such a process; the second one is the role as JSON.
pub const ARGUMENT: &str = "role";

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Command { folder: PathBuf },
    Worker { name: String, folder: PathBuf, ports: Vec<u16> },
    Handlers { name: String, folder: PathBuf, url: String },
    Client { name: String, folder: PathBuf, ports: Vec<u16>, rate: f64, seed: u64 },
}

impl Role {
    /// The command line of a process with this role.
    pub fn arguments(&self) -> Vec<String> {
        let program = std::env::current_exe().expect("this program").display().to_string();
        vec![program, ARGUMENT.into(), serde_json::to_string(self).expect("a role is JSON")]
    }

    pub fn process(&self) -> Command {
        let arguments = self.arguments();
        let mut command = Command::new(&arguments[0]);
        command.args(&arguments[1..]);
        command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command
    }

    pub fn play(self) -> ExitCode {
        if let Self::Command { folder } = self {
            return command::main(&folder);
        }
        tracing_subscriber::fmt().json().with_max_level(tracing::Level::INFO).init();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let journal =
            |folder: &PathBuf, name: &str| Journal::open(&folder.join(format!("{name}.jsonl"))).expect("a journal");
        // What panics in a task must not go unnoticed.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            hook(panic);
            std::process::exit(101);
        }));
        runtime.expect("a runtime").block_on(async {
            match self {
                Self::Command { .. } => {}
                Self::Worker { name, folder, ports } => {
                    worker::main(name.clone(), Replicas::new(&ports), journal(&folder, &name)).await;
                }
                Self::Handlers { name, folder, url } => {
                    handlers::main(url, name.clone(), Workflows::new().handlers, journal(&folder, &name)).await;
                }
                Self::Client { name, folder, ports, rate, seed } => {
                    let journal = journal(&folder, &format!("client-{name}"));
                    let (replicas, workflows) = (Replicas::new(&ports), Workflows::new());
                    let task = client::Task { name, seed, rate, replicas, workflows, journal };
                    client::main(task, &folder.join("stop")).await;
                }
            }
        });
        ExitCode::SUCCESS
    }
}
