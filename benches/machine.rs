//! Where it was measured, and what.

use std::fs;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use crate::measures::Plan;
use crate::server::Server;
use crate::worker::handlers;

/// Machine, versions and settings.
pub async fn about(server: &Server, plan: &Plan) -> Result<Value> {
    let (postgres, settings) = server.facts().await?;
    let settings: Vec<String> = settings.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    let kernel = rustix::system::uname();
    Ok(json!({
        "processor": field("/proc/cpuinfo", "model name"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": field("/proc/meminfo", "MemTotal"),
        "kernel": kernel.release().to_string_lossy(),
        "postgres": postgres,
        "postgres settings": settings.join(", "),
        "singletrack": env!("CARGO_PKG_VERSION"),
        "revision": revision(),
        "handlers at once": handlers(),
        "plan": format!("{plan:?}"),
        "at": chrono::Utc::now().to_rfc3339(),
    }))
}

/// The first value of a name in a file of `/proc`.
fn field(file: &str, name: &str) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
    value.map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
}

fn revision() -> String {
    let output = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    output.map_or_else(|_| "unknown".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
