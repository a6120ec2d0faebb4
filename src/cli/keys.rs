//! `singletrack keys`: who may use the API, straight in the database.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use chrono::Utc;
use clap::{Args, Subcommand};
use serde_json::json;

use super::{USAGE, configure, in_a_line, servers};
use crate::app::Servers;
use crate::app::keys::{self, Key, NewKey};
use crate::config::Settings;
use crate::domain::{Patterns, Scope};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a key and print it, this once. With the first one the service begins to ask for keys, and never stops.
    Create(Create),
    /// List all keys, without their secrets.
    Ls(Ls),
    /// Revoke a key: it is refused within five seconds.
    Revoke(Revoke),
}

#[derive(Args, Debug)]
pub(super) struct Create {
    /// The actor of what is done with it, 1 to 128 characters.
    name: String,
    /// What it may: read, enqueue, work or admin, which may all of it. Once or more.
    #[arg(short, long = "scope", value_name = "SCOPE", required = true)]
    scopes: Vec<Scope>,
    /// A workflow that it is for, or a pattern such as 'deploy@*'; others do not exist for it. Once or more. [default: all]
    #[arg(short, long = "workflow", value_name = "PATTERN")]
    workflows: Vec<String>,
    /// When it expires, such as 90d. [default: never]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    expires_in: Option<Duration>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args, Debug)]
pub(super) struct Ls {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args, Debug)]
pub(super) struct Revoke {
    /// The key's id, the middle part of st_<id>_<secret>.
    id: String,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

impl Command {
    /// Runs it to its exit code.
    pub(super) fn run(self) -> ExitCode {
        let (Self::Create(Create { settings, .. })
        | Self::Ls(Ls { settings, .. })
        | Self::Revoke(Revoke { settings, .. })) = &self;
        let config = match configure(settings, std::env::var("DATABASE_URL").ok(), true) {
            Ok(config) => config,
            Err(code) => return code,
        };
        if let Err(mistake) = self.check() {
            eprintln!("{mistake}");
            return ExitCode::from(USAGE);
        }
        let printed = servers(&config).and_then(|servers| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(self.print(&servers))
        });
        match printed {
            Ok(text) => {
                // A reader who has seen enough closes the pipe: that is no failure.
                let _ = io::stdout().write_all(text.as_bytes());
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("singletrack: {}", in_a_line(&error));
                ExitCode::FAILURE
            }
        }
    }

    fn check(&self) -> Result<(), String> {
        let Self::Create(Create { name, workflows, .. }) = self else { return Ok(()) };
        if !(1..=128).contains(&name.chars().count()) || name.contains(char::is_control) {
            return Err("the name must be 1 to 128 characters, none of them a control character".into());
        }
        if workflows.is_empty() {
            return Ok(());
        }
        Patterns::new(workflows.clone()).map(|_| ()).map_err(|mistake| format!("--workflow: {mistake}"))
    }

    async fn print(self, servers: &Servers) -> anyhow::Result<String> {
        match self {
            Self::Create(Create { name, scopes, workflows, expires_in, json, .. }) => {
                let workflows = (!workflows.is_empty()).then_some(workflows);
                let new = NewKey { name, scopes, workflows, seconds: expires_in.map(|time| time.as_secs_f64()) };
                let (key, token) = keys::create(servers, &new).await?;
                if json {
                    let mut document = json!(key);
                    document["token"] = token.into();
                    return Ok(format!("{document:#}\n"));
                }
                // Beside what a script reads.
                eprintln!(
                    "key {} ({}): shown this once, and kept nowhere. SINGLETRACK_API_KEY is where clients look.",
                    key.id, key.name
                );
                Ok(format!("{token}\n"))
            }
            Self::Ls(Ls { json, .. }) => {
                let keys = keys::list(servers).await?;
                Ok(if json { format!("{:#}\n", json!({"items": keys})) } else { keys.iter().map(line).collect() })
            }
            Self::Revoke(Revoke { id, json, .. }) => {
                keys::revoke(servers, &id).await?;
                let document = json!({"id": id, "revoked": true});
                Ok(if json { format!("{document:#}\n") } else { format!("revoked {id}\n") })
            }
        }
    }
}

/// A key in a line.
fn line(key: &Key) -> String {
    let state = match (key.revoked_at, key.expires_at) {
        (Some(at), _) => format!("revoked {}", at.format("%F")),
        (None, Some(at)) if at <= Utc::now() => format!("expired {}", at.format("%F")),
        (None, Some(at)) => format!("good until {}", at.format("%F")),
        (None, None) => "good".to_owned(),
    };
    let workflows = key.workflows.as_ref().map_or("all workflows".to_owned(), |patterns| patterns.join(","));
    let used = key.last_used_at.map_or("never used".to_owned(), |at| format!("used {}", at.format("%F")));
    format!("{}  {:<20}  {:<24}  {workflows}  {state}  {used}\n", key.id, key.name, key.scopes.join(","))
}
