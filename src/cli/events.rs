//! `singletrack events`: every change of a run's status, as it happens.

use std::process::ExitCode;

use clap::Args;
use tokio::signal::ctrl_c;

use super::client::{Connection, Failure};
use super::follow::Stream;
use super::output::{say, tell, words};
use super::runs::change;

#[derive(Args, Debug)]
pub(super) struct Events {
    /// Those of this workflow, by its full id.
    #[arg(short, long, value_name = "ID")]
    workflow: Option<String>,
    /// Those of this definition and its instances.
    #[arg(long, value_name = "ID")]
    definition: Option<String>,
    /// Those that lead to this status, once or more, or separated by commas.
    #[arg(short, long, value_name = "STATUS", value_delimiter = ',')]
    status: Vec<String>,
    /// Those of this queue.
    #[arg(short, long)]
    queue: Option<String>,
    /// Print a JSON document per line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

impl Events {
    /// Runs until nobody reads it any more, or Ctrl-C.
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let client = self.connection.client()?;
        let statuses = Some(self.status.join(",")).filter(|list| !list.is_empty());
        let query = [
            ("workflow_id", self.workflow),
            ("definition", self.definition),
            ("status", statuses),
            ("queue", self.queue),
        ];
        let query = query.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        let mut stream = Stream::new(&client, "/events".into(), query);
        loop {
            let event = tokio::select! {
                event = stream.next() => event?,
                _ = ctrl_c() => return Ok(ExitCode::SUCCESS),
            };
            let Some(event) = event else { return Ok(ExitCode::SUCCESS) };
            if event.name == "reset" {
                tell(format_args!("singletrack: {}", words(&event.data["detail"])));
                continue;
            }
            let data = event.data;
            let read = if self.json {
                say(format_args!("{data}\n"))
            } else {
                let reason = data["reason"].as_str().map(|reason| format!(" ({reason})")).unwrap_or_default();
                say(format_args!(
                    "{}  {}  {}  {}{reason}  by {}\n",
                    words(&data["at"]),
                    words(&data["run_id"]),
                    words(&data["workflow_id"]),
                    change(&data),
                    words(&data["actor"])
                ))
            };
            if !read {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
}
