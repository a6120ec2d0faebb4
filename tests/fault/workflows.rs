//! The workflows that the suite runs.

use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use serde_json::{Value, json};

use super::http::Replicas;

/// The ids, by what executes them.
#[derive(Clone)]
pub struct Workflows {
    pub pull: Vec<String>,
    pub handlers: Vec<String>,
    pub commands: Vec<String>,
    /// A few of any kind for which many ask at once.
    pub contended: Vec<String>,
}

impl Workflows {
    pub fn new() -> Self {
        let ids = |name: &str, count: usize| (0..count).map(|number| format!("{name}-{number}")).collect::<Vec<_>>();
        let (pull, handlers, commands) = (ids("pull", 300), ids("handler", 100), ids("command", 8));
        let contended =
            ["pull-0", "pull-1", "pull-2", "handler-0", "handler-1", "command-0"].map(str::to_owned).to_vec();
        Self { pull, handlers, commands, contended }
    }

    /// Distinct ones that are no commands.
    pub fn sample_many(&self, rng: &mut StdRng, count: usize) -> Vec<String> {
        self.pull.iter().chain(&self.handlers).cloned().sample(rng, count)
    }

    pub fn is_command(&self, id: &str) -> bool {
        id.starts_with("command-")
    }

    /// Defines all of them. `argv` is the command, `mark` a variable by which its processes are found again.
    pub async fn define(&self, replicas: &Replicas, argv: &[&str], mark: (&str, &str)) {
        let common = |executor: Value| {
            json!({"executor": executor, "max_attempts": 3, "timeout_seconds": 60,
                   "backoff": {"initial_seconds": 0.2, "max_seconds": 1}, "max_waiting": 10})
        };
        let command = json!({"type": "command", "argv": argv, "env": {mark.0: mark.1}});
        for (ids, executor) in [
            (&self.pull, json!({"type": "pull"})),
            (&self.handlers, json!({"type": "handler"})),
            (&self.commands, command),
        ] {
            for id in ids {
                replicas.define(id, &common(executor.clone())).await;
            }
        }
    }
}
