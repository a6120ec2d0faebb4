//! What is said of standbys and of replication slots.

use sqlx::postgres::PgConnection;

use super::server::PINNED;
use super::{Checks, Finding, Judged};
use crate::store::doctor::server::{self as facts, ReplicationSlot, Standby};

/// Transactions that a snapshot may be behind, where it is not known since when it is there.
const FAR_BEHIND: i64 = 100_000;
/// Bytes of WAL that a slot nobody reads may keep.
const MUCH_WAL: i64 = 1 << 30;
/// Makes the checks.
pub(super) async fn look(connection: &mut PgConnection, checks: &mut Checks) -> sqlx::Result<()> {
    const NAMES: &str = "synchronous_standby_names";
    let names = facts::settings(connection, &[NAMES]).await;
    let standbys = facts::standbys(connection).await;
    let judged = names.and_then(|names| {
        let names = names.first().map_or("", |setting| setting.value.as_str());
        Ok(lossy(&standbys?, names))
    });
    checks.add("standbys", "a failover to a standby loses nothing", judged)?;
    let slots = facts::replication_slots(connection).await;
    checks.add(
        "replication-slots",
        "no replication slot keeps what nobody reads",
        slots.map(|slots| keeping(&slots).into()),
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(active: bool, age: Option<i64>, kept_bytes: i64) -> ReplicationSlot {
        ReplicationSlot { name: "s".into(), active, age, kept_bytes: Some(kept_bytes) }
    }

    fn whats(findings: Vec<Finding>) -> Vec<String> {
        findings.into_iter().map(|finding| finding.what).collect()
    }

    #[test]
    fn a_replication_slot_is_wrong_when_it_keeps_old_rows_or_much_that_nobody_reads() {
        for fine in [slot(true, Some(FAR_BEHIND), 0), slot(true, None, 2 * MUCH_WAL), slot(false, None, MUCH_WAL)] {
            assert_eq!(whats(keeping(std::slice::from_ref(&fine))), [""; 0], "{fine:?}");
        }
        let cases = [
            (slot(true, Some(100_001), 0), "replication slot s keeps rows of 100001 transactions ago"),
            (slot(false, Some(7), 0), "replication slot s keeps rows of 7 transactions ago, and nobody reads from it"),
            (slot(false, None, 2 * MUCH_WAL), "replication slot s keeps 2048 MB of WAL, and nobody reads from it"),
        ];
        for (wrong, said) in cases {
            assert_eq!(whats(keeping(&[wrong])), [said]);
        }
    }

    #[test]
    fn a_standby_whose_queries_hold_back_the_primary_is_wrong_also_when_commits_wait_for_it() {
        let standby = Standby {
            name: "s".into(),
            sync_state: Some("quorum".into()),
            behind_bytes: Some(0),
            lag_ms: None,
            age: Some(FAR_BEHIND + 1),
        };
        let found = lossy(std::slice::from_ref(&standby), "ANY 1 (s)");
        assert_eq!(whats(found.findings), ["standby s keeps rows of 100001 transactions ago (hot_standby_feedback)"]);
        let asynchronous = Standby { sync_state: Some("async".into()), age: None, lag_ms: Some(12), ..standby.clone() };
        let both = lossy(&[Standby { age: None, ..standby }, asynchronous], "ANY 1 (s)");
        assert_eq!(whats(both.findings), [""; 0]);
        assert_eq!(both.notes, ["s (asynchronous): 0 bytes behind, 12 ms"]);
    }
}
