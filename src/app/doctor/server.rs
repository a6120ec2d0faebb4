//! What is said of the server around the tables.

use sqlx::postgres::PgConnection;

use super::{Checks, Finding, Judged, Terms};
use crate::store::doctor::server::{self as facts, Pin, Room, Setting};

/// Seconds after which locks of somebody who does nothing are worth a word, unless open transactions are sooner.
const IDLE: i32 = 60;
/// Transactions without a freeze after which it is time: the server stops at 2 billion.
const OLD_AGE: i64 = 1_000_000_000;

/// What an old snapshot costs.
pub(super) const PINNED: &str = "Vacuum can't remove rows that changed since: a busy workflow's enqueues and claims get slower and slower, five \
                      times as slow after some thousand runs, and the tables grow.";

/// Settings that must have a value: the name, the value, where the other one matters, what it means.
const WANTED: &[(&str, &str, Scope, &str)] = &[
    ("fsync", "on", Scope::All, "A crash of the machine can destroy the database, and with it what was acknowledged."),
    (
        "full_page_writes",
        "on",
        Scope::All,
        "A crash of the machine can leave torn pages, unless the file system can't tear them.",
    ),
    (
        "synchronous_commit",
        "on",
        Scope::All,
        "Replicas set it to on for themselves; what callers enqueue from their own SQL transactions may be lost in a crash.",
    ),
    ("zero_damaged_pages", "off", Scope::All, "A damaged page is made empty: runs vanish without an error."),
    ("ignore_checksum_failure", "off", Scope::All, "Damaged pages are read as if they were good."),
    ("autovacuum", "on", Scope::All, "Dead rows pile up, and every statement gets slower."),
    ("track_counts", "on", Scope::All, "Autovacuum does not know what there is to do."),
    (
        "session_replication_role",
        "origin",
        Scope::All,
        "Triggers do not fire there: final runs can be changed, and waiting runs strand.",
    ),
    (
        "default_transaction_isolation",
        "read committed",
        Scope::All,
        "Replicas set it to read committed for themselves; enqueue_run refuses other transactions.",
    ),
    ("default_transaction_read_only", "off", Scope::Others, "Replicas of that account can't write."),
];

/// Where a setting is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    All,
    /// Not in this connection, which has set its own.
    Others,
}

/// Makes the checks that need no tables.
pub(super) async fn look(connection: &mut PgConnection, checks: &mut Checks, terms: &Terms) -> sqlx::Result<()> {
    let names: Vec<&str> = WANTED.iter().map(|(name, ..)| *name).collect();
    let settings = facts::settings(connection, &names).await;
    checks.add(
        "settings",
        "nothing acknowledged is lost in a crash, and the server looks after itself",
        settings.map(|settings| unwanted(&settings).into()),
    )?;
    let prepared = facts::prepared(connection, seconds(terms)).await;
    checks.add(
        "prepared-transactions",
        "no prepared transaction is forgotten",
        prepared.map(|found| forgotten(&found).into()),
    )
}

/// Makes those about our tables and who uses them. `sees_others` says whether other accounts' sessions are seen at all.
pub(super) async fn look_at_tables(
    connection: &mut PgConnection,
    checks: &mut Checks,
    sees_others: bool,
    terms: &Terms,
) -> sqlx::Result<()> {
    let room = facts::room(connection).await;
    checks.add(
        "room",
        "there are connections and transaction ids enough, and indexes are in order",
        room.map(|room| scarce(&room, terms.pool_size).into()),
    )?;
    let remark = |findings: Vec<Finding>| {
        let notes = if sees_others {
            Vec::new()
        } else {
            let account = "this account sees its own sessions only";
            vec![format!("{account}: an administrator can let it see all: grant pg_read_all_stats to ...;")]
        };
        Judged { findings, notes }
    };
    let sessions = facts::sessions(connection, seconds(terms)).await;
    checks.add("snapshots", "no transaction is open for too long", sessions.map(|found| remark(old(&found))))?;
    let lockers = facts::idle_lockers(connection, IDLE.min(seconds(terms))).await;
    checks.add(
        "idle-locks",
        "nobody holds locks on these tables and does nothing",
        lockers.map(|found| remark(idle(&found))),
    )?;
    let unvacuumed = facts::tables_without_autovacuum(connection).await;
    checks.add("autovacuum", "every table is vacuumed", unvacuumed.map(|tables| unvacuumed_tables(tables).into()))
}

fn seconds(terms: &Terms) -> i32 {
    i32::try_from(terms.snapshot_age.as_secs()).unwrap_or(i32::MAX)
}

/// Settings that are not as they should be, of the server, of the database or of a role.
fn unwanted(settings: &[Setting]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, wanted, scope, means) in WANTED {
        let found = settings.iter().filter(|setting| setting.name == *name);
        for Setting { value, scope: of, .. } in
            found.filter(|setting| *scope == Scope::All || !setting.scope.is_empty())
        {
            // What a role or a database has is as somebody wrote it.
            let said = match value.to_lowercase().as_str() {
                "false" | "no" | "0" => "off".to_owned(),
                "true" | "yes" | "1" => "on".to_owned(),
                said => said.to_owned(),
            };
            // Of its several values only one does not wait for the disk.
            let good = if *name == "synchronous_commit" { said != "off" } else { said == *wanted };
            if good {
                continue;
            }
            let (whose, remedy) = if of.is_empty() {
                (
                    String::new(),
                    format!(
                        "alter system set {name} = '{wanted}'; select pg_reload_conf(); or change it on the server's command line."
                    ),
                )
            } else if of == "this connection" {
                (format!(" for {of}"), "Take it out of the options in DATABASE_URL.".into())
            } else {
                (format!(" for {of}"), format!("alter {of} reset {name};"))
            };
            findings.push(Finding::new(format!("{name} is {value}{whose}"), *means, remedy));
        }
    }
    findings
}

/// What runs out. A replica has twelve connections besides its pool: ten for what is sent all the time, two that are never shared.
fn scarce(room: &Room, pool_size: u32) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Room { connections, connections_limit: limit, replicas, wraparound_age, ref collation } = *room;
    let wanted = replicas * (i64::from(pool_size) + 12);
    if connections * 10 > limit * 9 {
        findings.push(Finding::new(
            format!("{connections} of {limit} connections are in use"),
            "The next replica, or the next statement of one, may find none; a lease that can't be renewed is lost.",
            "Raise max_connections, lower SINGLETRACK_POOL_SIZE, or put a pooler in session mode between.",
        ));
    }
    if wanted > limit {
        findings.push(Finding::new(
            format!("{replicas} replicas may want {wanted} connections (SINGLETRACK_POOL_SIZE={pool_size} and 12 each), and there are {limit}"),
            "Under load some of them find none; a lease that can't be renewed is lost.",
            "Raise max_connections, or lower SINGLETRACK_POOL_SIZE. (Where the replicas have another one, give it to doctor too.)",
        ));
    }
    if wraparound_age > OLD_AGE {
        findings.push(Finding::new(
            format!("{wraparound_age} transactions were not frozen yet"),
            "At 2 billion the server refuses every write.",
            "vacuum freeze; and see the checks `snapshots`, `prepared-transactions`, `replication-slots` and `autovacuum`.",
        ));
    }
    if let Some(collation) = collation {
        findings.push(Finding::new(
            format!("the collation of this database has changed: {collation}"),
            "Indexes of text that were built before may be out of order: the unique ones that hold the promise may miss what is there.",
            "reindex database concurrently ...; then alter database ... refresh collation version; and this doctor again.",
        ));
    }
    findings
}

fn line(pin: &Pin) -> String {
    format!("{}: {}, for {} s, {} transactions behind", pin.who, pin.what, pin.seconds, pin.age)
}

/// One finding about all of `pins`, if there are any.
fn about(pins: &[Pin], what: &str, means: &str, remedy: &str) -> Vec<Finding> {
    let total = i64::try_from(pins.len()).unwrap_or(i64::MAX);
    let rows = pins.iter().take(10).map(line).collect();
    if pins.is_empty() {
        Vec::new()
    } else {
        vec![Finding::new(format!("{total} {what}"), means, remedy).about(rows, total)]
    }
}

fn old(pins: &[Pin]) -> Vec<Finding> {
    let remedy = "End the transaction, or its session: select pg_terminate_backend(PID); a long dump is better taken from a standby.";
    about(pins, "transactions that are open for too long (--snapshot-age)", PINNED, remedy)
}

fn forgotten(pins: &[Pin]) -> Vec<Finding> {
    let remedy = "commit prepared 'NAME'; or rollback prepared 'NAME'; whoever prepared it knows which.";
    about(
        pins,
        "prepared transactions that nobody ended (--snapshot-age)",
        &format!("{PINNED} Their locks stay, also over a restart."),
        remedy,
    )
}

fn idle(pins: &[Pin]) -> Vec<Finding> {
    let means = "Who wants the same rows waits: workflows they touched can't be enqueued, claimed or finished, and migrations wait.";
    let remedy = "Have that program commit; else select pg_terminate_backend(PID); idle_in_transaction_session_timeout does it by itself.";
    about(pins, "sessions that hold locks on these tables and do nothing", means, remedy)
}

fn unvacuumed_tables(tables: Vec<String>) -> Vec<Finding> {
    let total = i64::try_from(tables.len()).unwrap_or(i64::MAX);
    if tables.is_empty() {
        return Vec::new();
    }
    let means = "Dead rows pile up in them, and every statement gets slower.";
    vec![
        Finding::new(
            format!("{total} tables that autovacuum leaves alone"),
            means,
            "alter table ... reset (autovacuum_enabled);",
        )
        .about(tables, total),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whats(findings: Vec<Finding>) -> Vec<String> {
        findings.into_iter().map(|finding| finding.what).collect()
    }

    #[test]
    fn what_runs_out_is_wrong_when_little_is_left() {
        let room =
            Room { connections: 90, connections_limit: 100, replicas: 4, wraparound_age: OLD_AGE, collation: None };
        assert_eq!(whats(scarce(&room, 10)), [""; 0]);
        let full =
            Room { connections: 91, replicas: 5, wraparound_age: OLD_AGE + 1, collation: Some("x".into()), ..room };
        assert_eq!(
            whats(scarce(&full, 10)),
            [
                "91 of 100 connections are in use",
                "5 replicas may want 110 connections (SINGLETRACK_POOL_SIZE=10 and 12 each), and there are 100",
                "1000000001 transactions were not frozen yet",
                "the collation of this database has changed: x",
            ]
        );
    }
}
