//! `singletrack doctor`: what is wrong with a live database, in words or as JSON.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::{configure, in_a_line, servers};
use crate::app::doctor::{Check, Finding, Outcome, Report, Terms, examine};
use crate::config::Settings;

/// Exit code for a database that can't be looked at, as in sysexits.h.
const UNAVAILABLE: u8 = 69;

#[derive(Args, Debug)]
pub(super) struct Doctor {
    /// Look at all of history, and not only at live runs and the last 24 hours; takes as long as it takes.
    #[arg(long)]
    full: bool,
    /// For how long a transaction may be open, or nobody end one that was prepared.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = humantime::parse_duration)]
    snapshot_age: Duration,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

impl Doctor {
    /// Looks, prints what it saw, and says by the exit code whether all is well.
    pub(super) fn run(&self) -> ExitCode {
        let config = match configure(&self.settings, std::env::var("DATABASE_URL").ok(), true) {
            Ok(config) => config,
            Err(code) => return code,
        };
        let terms = Terms { full: self.full, snapshot_age: self.snapshot_age, pool_size: config.pool_size };
        let looked = servers(&config).and_then(|servers| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(examine(servers, &terms))
        });
        match looked {
            Ok(report) => {
                let text = if self.json { as_json(&report) } else { in_words(&report) };
                // A reader who has seen enough closes the pipe: that is no failure.
                let _ = io::stdout().write_all(text.as_bytes());
                match report.outcome {
                    Outcome::Ok => ExitCode::SUCCESS,
                    Outcome::Findings => ExitCode::FAILURE,
                    Outcome::Unseen => ExitCode::from(UNAVAILABLE),
                }
            }
            Err(error) => {
                eprintln!("singletrack: {}", in_a_line(&error));
                ExitCode::from(UNAVAILABLE)
            }
        }
    }
}

fn as_json(report: &Report) -> String {
    // Strings and numbers only: there is nothing that could fail.
    format!("{}\n", serde_json::to_string_pretty(report).unwrap_or_default())
}

fn in_words(report: &Report) -> String {
    let lines: Vec<String> = report.checks.iter().flat_map(lines).collect();
    let count = |outcome| report.checks.iter().filter(|check| check.outcome == outcome).count();
    let (found, unseen) = (count(Outcome::Findings), count(Outcome::Unseen));
    let over = if report.full { "all of history" } else { "live runs and the last 24 hours (--full: all of history)" };
    let sum = match (found, unseen) {
        (0, 0) => "nothing is wrong".to_owned(),
        (found, 0) => format!("{found} with findings"),
        (found, unseen) => format!("{found} with findings, {unseen} not made"),
    };
    let (database, version) = (&report.database, &report.server_version);
    let checks = report.checks.len();
    format!("{}\ndatabase {database} on Postgres {version}, {over}\n{checks} checks: {sum}\n", lines.join("\n"))
}

/// A check in a line, and below it what there is to say.
fn lines(check: &Check) -> Vec<String> {
    let (word, says) = match check.outcome {
        Outcome::Ok => ("ok", check.holds),
        Outcome::Unseen => ("unseen", check.holds),
        Outcome::Findings => ("FINDING", check.findings.first().map_or("", |finding| finding.what.as_str())),
    };
    let mut lines = vec![format!("{word:<8} {:<22} {says}", check.name)];
    for (number, finding) in check.findings.iter().enumerate() {
        if number > 0 {
            lines.push(format!("{:<8} {:<22} {}", "FINDING", check.name, finding.what));
        }
        lines.extend(details(finding));
    }
    lines.extend(check.notes.iter().map(|note| format!("           {note}")));
    lines
}

fn details(finding: &Finding) -> Vec<String> {
    let mut lines: Vec<String> = finding.rows.iter().map(|row| format!("           - {row}")).collect();
    if finding.more > 0 {
        lines.push(format!("           - and {} more", finding.more));
    }
    lines.push(format!("           means:  {}", finding.means));
    lines.push(format!("           remedy: {}", finding.remedy));
    lines
}
