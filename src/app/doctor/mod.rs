//! `singletrack doctor`: looks at a live database and says in words what is wrong with it. It never writes.
//!
//! The facts come from [`crate::store::doctor`]; here they are judged. A check that could not be made is never taken for a good one.

mod promise;
mod replication;
mod schema;
mod server;

use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use sqlx::postgres::PgConnection;
use tokio::time::timeout;

use crate::store::{Servers, doctor as facts, pooler};

/// How long one statement may take, unless all of history is asked for.
const LIMIT: Duration = Duration::from_secs(300);
/// How long it may take in all, with the same exception: a server that vanished does not even refuse.
const PATIENCE: Duration = Duration::from_secs(1800);
/// How far the database's clock may be from this machine's without being worth a word.
const CLOCKS_AGREE: TimeDelta = TimeDelta::seconds(1);

/// What to look at.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// All of history, without a limit on the time that a statement takes; else live runs and the last 24 hours, 5 minutes each.
    pub full: bool,
    /// For how long a transaction may be open.
    pub snapshot_age: Duration,
    /// Size of the replicas' pools.
    pub pool_size: u32,
}

/// What was found. As JSON it is what `singletrack doctor --json` prints; members are added, and none changes its meaning.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The database that was looked at.
    pub database: String,
    /// The version of its server.
    pub server_version: String,
    /// The version of this program.
    pub singletrack_version: &'static str,
    /// When it was looked at, by the database's clock.
    pub checked_at: DateTime<Utc>,
    /// Whether all of history was looked at, and not only live runs and the last 24 hours.
    pub full: bool,
    /// What it comes to.
    pub outcome: Outcome,
    /// Every check, in the order in which they were made.
    pub checks: Vec<Check>,
}

/// What a check, or all of them together, came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing was found.
    Ok,
    /// It could not be made, or not all of them could; what could be made found nothing.
    Unseen,
    /// Something is wrong.
    Findings,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub struct Check {
    /// Its name, which stays: `two-slots`.
    pub name: &'static str,
    /// What is so when nothing is found.
    pub holds: &'static str,
    /// What it came to.
    pub outcome: Outcome,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// What is worth knowing and not wrong; also why a check could not be made, or not wholly.
    pub notes: Vec<String>,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is wrong.
    pub what: String,
    /// Where: at most 10 rows, each with its ids. Empty where `what` says it all.
    pub rows: Vec<String>,
    /// How many rows there are besides those.
    pub more: i64,
    /// What it means for runs and callers.
    pub means: String,
    /// What to do: a command, or SQL.
    pub remedy: String,
}

impl Finding {
    fn new(what: impl Into<String>, means: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), rows: Vec::new(), more: 0, means: means.into(), remedy: remedy.into() }
    }

    /// Names the rows that it is about.
    fn about(mut self, rows: Vec<String>, total: i64) -> Self {
        self.more = total - i64::try_from(rows.len()).unwrap_or(total);
        self.rows = rows;
        self
    }
}

/// What the facts of one check come to.
#[derive(Debug, Default)]
struct Judged {
    findings: Vec<Finding>,
    notes: Vec<String>,
}

impl From<Vec<Finding>> for Judged {
    fn from(findings: Vec<Finding>) -> Self {
        Self { findings, notes: Vec::new() }
    }
}

/// Looks at the database on the primary of `servers`, on one connection, which can't write.
///
/// # Errors
/// When there is no connection to be had, or it breaks.
pub async fn examine(servers: impl Into<Servers>, terms: &Terms) -> anyhow::Result<Report> {
    const CANT: &str = "can't look at the database (DATABASE_URL)";
    let servers = servers.into();
    // What a session is told stays on a shared connection, and would make somebody else's read-only.
    pooler::refuse_sharing(&servers).await.context(CANT)?;
    let mut connection = facts::connect(servers, (!terms.full).then_some(LIMIT)).await.context(CANT)?;
    let mut checks = Checks { account: String::new(), made: Vec::new() };
    let patience = if terms.full { Duration::MAX } else { PATIENCE };
    let place = timeout(patience, look(&mut connection, &mut checks, terms))
        .await
        .map_err(anyhow::Error::from)
        .and_then(|looked| Ok(looked?))
        .context(CANT)?;
    facts::close(connection).await;
    let checks = checks.made;
    Ok(Report {
        database: place.database,
        server_version: place.version,
        singletrack_version: env!("CARGO_PKG_VERSION"),
        checked_at: place.now,
        full: terms.full,
        outcome: checks.iter().map(|check| check.outcome).max().unwrap_or(Outcome::Unseen),
        checks,
    })
}

/// Makes every check there is something for.
async fn look(connection: &mut PgConnection, checks: &mut Checks, terms: &Terms) -> sqlx::Result<facts::Place> {
    let asked = Utc::now();
    let place = facts::place(connection).await?;
    checks.account.clone_from(&place.account);
    checks.add("database", "a primary, of a version that is tested", Ok(database(&place, asked, Utc::now())))?;
    server::look(connection, checks, terms).await?;
    replication::look(connection, checks).await?;
    if schema::look(connection, checks, place.schema.is_some()).await? {
        server::look_at_tables(connection, checks, place.sees_others, terms).await?;
        promise::look(connection, checks, terms.full).await?;
    }
    Ok(place)
}

/// Judges where the connection leads; `asked` and `answered` are this machine's clock around the question.
fn database(place: &facts::Place, asked: DateTime<Utc>, answered: DateTime<Utc>) -> Judged {
    let mut judged = Judged::default();
    if place.in_recovery {
        judged.findings.push(Finding::new(
            "this is a standby",
            "Replicas can't work on it, and what it shows may be behind the primary.",
            "Name the primary in DATABASE_URL.",
        ));
    }
    if !(140_000..190_000).contains(&place.version_number) {
        judged.notes.push(format!("Postgres {} is none of those that are tested, 14 to 18", place.version));
    }
    // It was read somewhere between the two.
    let off = (asked - place.now).max(place.now - answered);
    if off > CLOCKS_AGREE {
        judged.notes.push(format!(
            "the database's clock is {} s from this machine's; every time in a run is the database's",
            off.num_seconds()
        ));
    }
    judged
}

/// The checks that were made so far.
struct Checks {
    account: String,
    made: Vec<Check>,
}

impl Checks {
    /// Adds what a check came to. What the database refuses is a check that was not made; a connection that broke ends them all.
    fn add(&mut self, name: &'static str, holds: &'static str, judged: sqlx::Result<Judged>) -> sqlx::Result<()> {
        let judged = match judged {
            Ok(judged) => Ok(judged),
            Err(error) => Err(self.why_unseen(error)?),
        };
        self.push(name, holds, judged);
        Ok(())
    }

    fn push(&mut self, name: &'static str, holds: &'static str, judged: Result<Judged, String>) {
        let (outcome, judged) = match judged {
            Ok(judged) if judged.findings.is_empty() => (Outcome::Ok, judged),
            Ok(judged) => (Outcome::Findings, judged),
            Err(why) => (Outcome::Unseen, Judged { findings: Vec::new(), notes: vec![why] }),
        };
        let Judged { findings, notes } = judged;
        self.made.push(Check { name, holds, outcome, findings, notes });
    }

    /// Why the database did not answer, and what helps.
    fn why_unseen(&self, error: sqlx::Error) -> sqlx::Result<String> {
        let Some(database) = error.as_database_error() else { return Err(error) };
        let code = database.code().unwrap_or_default().into_owned();
        let message = database.message();
        Ok(match &*code {
            "42501" => {
                let account = &self.account;
                format!(
                    "not looked at: {message}; an account that may: grant select on all tables in schema ... to {account};"
                )
            }
            "57014" => "not looked at: it took longer than 5 minutes; --full sets no limit".into(),
            "55P03" => format!("not looked at: {message}; somebody has a table locked, a migration perhaps: try again"),
            // admin_shutdown and its like: the connection is gone
            code if code.starts_with("57P") => return Err(error),
            _ => format!("not looked at: {message}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_off_and_a_server_that_is_not_tested_are_told_of() {
        let now = DateTime::UNIX_EPOCH;
        let place = facts::Place {
            database: "d".into(),
            account: "a".into(),
            version: "17.5".into(),
            version_number: 170_005,
            now,
            in_recovery: false,
            sees_others: true,
            schema: None,
        };
        let seconds = TimeDelta::seconds;
        // A slow answer is no clock that is off.
        assert_eq!(database(&place, now - seconds(5), now).notes, [""; 0]);
        assert_eq!(database(&place, now, now + seconds(5)).notes, [""; 0]);
        let off = "the database's clock is 2 s from this machine's; every time in a run is the database's";
        assert_eq!(database(&place, now + seconds(2), now + seconds(3)).notes, [off]);
        assert_eq!(database(&place, now - seconds(3), now - seconds(2)).notes, [off]);
        let old = facts::Place { version: "13.2".into(), version_number: 130_002, in_recovery: true, ..place };
        let judged = database(&old, now, now);
        assert_eq!(judged.notes, ["Postgres 13.2 is none of those that are tested, 14 to 18"]);
        assert_eq!(judged.findings[0].what, "this is a standby");
    }

    #[test]
    fn what_the_database_refused_was_not_looked_at_and_what_broke_ends_it_all() {
        let mut checks = Checks { account: "a".into(), made: Vec::new() };
        let broken = sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        assert!(checks.add("x", "x holds", Err(broken)).is_err());
        checks.push("x", "x holds", Err("not looked at: why".into()));
        checks.push("y", "y holds", Ok(Judged::default()));
        let outcomes: Vec<Outcome> = checks.made.iter().map(|check| check.outcome).collect();
        assert_eq!(outcomes, [Outcome::Unseen, Outcome::Ok]);
        assert_eq!(checks.made[0].notes, ["not looked at: why"]);
        assert!(Outcome::Findings > Outcome::Unseen && Outcome::Unseen > Outcome::Ok, "the worst is what it comes to");
    }
}
