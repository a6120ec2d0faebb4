//! What is said of the server around the tables.

use sqlx::postgres::PgConnection;

use super::{Checks, Finding, Judged, Terms};
use crate::store::doctor::server::{self as facts, Pin, ReplicationSlot, Room, Setting, Standby};

/// Seconds after which locks of somebody who does nothing are worth a word, unless open transactions are sooner.
const IDLE: i32 = 60;
/// Transactions that a snapshot may be behind, where it is not known since when it is there.
const FAR_BEHIND: i64 = 100_000;
/// Bytes of WAL that a slot nobody reads may keep.
const MUCH_WAL: i64 = 1 << 30;
/// Transactions without a freeze after which it is time: the server stops at 2 billion.
const OLD_AGE: i64 = 1_000_000_000;

/// What an old snapshot costs.
const PINNED: &str = "Vacuum can't remove rows that changed since: a busy workflow's enqueues and claims get slower and slower, five \
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
    let names: Vec<&str> = WANTED.iter().map(|(name, ..)| *name).chain(["synchronous_standby_names"]).collect();
    let settings = facts::settings(connection, &names).await;
    let standby_names =
        settings.as_ref().ok().and_then(|settings| value(settings, "synchronous_standby_names")).unwrap_or_default();
    checks.add(
        "settings",
        "nothing acknowledged is lost in a crash, and the server looks after itself",
        settings.map(|settings| unwanted(&settings).into()),
    )?;
    let standbys = facts::standbys(connection).await;
    checks.add(
        "standbys",
        "a failover to a standby loses nothing",
        standbys.map(|standbys| lossy(&standbys, &standby_names)),
    )?;
    let slots = facts::replication_slots(connection).await;
    checks.add(
        "replication-slots",
        "no replication slot keeps what nobody reads",
        slots.map(|slots| keeping(&slots).into()),
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

fn value(settings: &[Setting], name: &str) -> Option<String> {
    settings
        .iter()
        .find(|setting| setting.name == name && setting.scope.is_empty())
        .map(|setting| setting.value.clone())
}

/// Settings that are not as they should be, of the server, of the database or of a role.
fn unwanted(settings: &[Setting]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, wanted, scope, means) in WANTED {
        let found = settings.iter().filter(|setting| setting.name == *name);
        for Setting { value, scope: of, .. } in
            found.filter(|setting| *scope == Scope::All || !setting.scope.is_empty())
        {
            // Of its several values only one does not wait for the disk.
            let good = if *name == "synchronous_commit" { value != "off" } else { value == wanted };
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

/// What a failover would lose, and commits that wait for nobody.
fn lossy(standbys: &[Standby], names: &str) -> Judged {
    let mut judged = Judged::default();
    let (asynchronous, others): (Vec<&Standby>, Vec<&Standby>) =
        standbys.iter().partition(|standby| standby.sync_state.as_deref() == Some("async"));
    let rows: Vec<String> = asynchronous.iter().map(|standby| behind(standby)).collect();
    if names.is_empty() && !asynchronous.is_empty() {
        let total = i64::try_from(rows.len()).unwrap_or(i64::MAX);
        judged.findings.push(
            Finding::new(
                format!("{total} standbys, and none that a commit waits for"),
                "A failover loses what the standby has not got yet, acknowledged runs and ends of runs among it; a fence may then be given twice.",
                "Set synchronous_standby_names, or accept the loss: what is behind now is the least of it.",
            )
            .about(rows.into_iter().take(10).collect(), total),
        );
    } else {
        judged.notes.extend(rows);
    }
    let waited_for = others.iter().any(|standby| matches!(standby.sync_state.as_deref(), Some("sync" | "quorum")));
    let all_known = standbys.iter().all(|standby| standby.sync_state.is_some());
    if !names.is_empty() && all_known && !waited_for {
        judged.findings.push(Finding::new(
            format!("synchronous_standby_names is {names}, and no such standby is connected"),
            "Every commit waits for it: nothing is enqueued, claimed or finished.",
            "Bring the standby back, or take it out of synchronous_standby_names and select pg_reload_conf();",
        ));
    }
    for standby in standbys.iter().filter(|standby| standby.age.is_some_and(|age| age > FAR_BEHIND)) {
        let age = standby.age.unwrap_or_default();
        judged.findings.push(Finding::new(
            format!("standby {} keeps rows of {age} transactions ago (hot_standby_feedback)", standby.name),
            PINNED,
            "End the long query on that standby, or set hot_standby_feedback = off there.",
        ));
    }
    if !all_known {
        judged.notes.push("this account may not see the state of the standbys: grant pg_read_all_stats to ...;".into());
    }
    judged
}

fn behind(standby: &Standby) -> String {
    let lag = standby.lag_ms.map_or(String::new(), |ms| format!(", {ms} ms"));
    let bytes = standby.behind_bytes.map_or("unknown".into(), |bytes| bytes.to_string());
    format!("{} (asynchronous): {bytes} bytes behind{lag}", standby.name)
}

/// What runs out. A replica has two connections besides its pool.
fn scarce(room: &Room, pool_size: u32) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Room { connections, connections_limit: limit, replicas, wraparound_age, ref collation } = *room;
    let wanted = replicas * (i64::from(pool_size) + 2);
    if connections * 10 > limit * 9 {
        findings.push(Finding::new(
            format!("{connections} of {limit} connections are in use"),
            "The next replica, or the next statement of one, may find none; a lease that can't be renewed is lost.",
            "Raise max_connections, lower SINGLETRACK_POOL_SIZE, or put a pooler in session mode between.",
        ));
    }
    if wanted > limit {
        findings.push(Finding::new(
            format!("{replicas} replicas may want {wanted} connections (SINGLETRACK_POOL_SIZE={pool_size} and 2 each), and there are {limit}"),
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

fn keeping(slots: &[ReplicationSlot]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for ReplicationSlot { name, active, age, kept_bytes } in slots {
        let kept = kept_bytes.unwrap_or_default();
        let pins = age.is_some_and(|age| age > FAR_BEHIND || !active);
        if pins {
            let age = age.unwrap_or_default();
            let idle = if *active { "" } else { ", and nobody reads from it" };
            findings.push(Finding::new(
                format!("replication slot {name} keeps rows of {age} transactions ago{idle}"),
                PINNED,
                format!("Bring its standby back, or give it up: select pg_drop_replication_slot('{name}');"),
            ));
        } else if !active && kept > MUCH_WAL {
            findings.push(Finding::new(
                format!("replication slot {name} keeps {} MB of WAL, and nobody reads from it", kept >> 20),
                "It grows until the disk is full, and then the server stops.",
                format!("Bring its reader back, or give it up: select pg_drop_replication_slot('{name}');"),
            ));
        }
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
