//! The reaper, pass by pass: what it ends, what it leaves alone, and what can't keep it from its work.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;
use singletrack::config;
use singletrack::domain::{Lease, Status, Verdict};
use singletrack::engine::reaper::{Reaper, Report};
use singletrack::engine::{Next, lookout};
use singletrack::store::claim::Renewal;
use singletrack::store::reap::{expire, sweep_leases};
use singletrack::store::settle::Settled;
use uuid::Uuid;

use crate::support::calls::{LIMIT, attempts, events, renew, row, settle_one};
use crate::support::database::TestDb;
use crate::support::plant;

const HOUR: Duration = Duration::from_secs(3600);

/// A reaper that has seen nothing yet and takes no gap between two passes for an outage.
pub fn reaper(test: &TestDb) -> Reaper {
    Reaper::new(test.db.clone(), &config::Reaper { interval: HOUR, start_within: HOUR, blind_after: HOUR })
}

/// Passes until one has ended `runs` runs in all; what they did, as one.
async fn passes(reaper: &mut Reaper, runs: usize) -> Report {
    let mut all = Report { ended: Vec::new(), given_back: Vec::new(), expired: Vec::new(), next: Next::Rest };
    let since = std::time::Instant::now();
    while all.ended.len() < runs {
        assert!(since.elapsed() < LIMIT, "ended only {:?}", all.ended);
        let report = reaper.pass().await.unwrap();
        all.ended.extend(report.ended);
        all.expired.extend(report.expired);
        all.next = report.next;
    }
    all
}

async fn database_time(test: &TestDb) -> DateTime<Utc> {
    sqlx::query_scalar("select clock_timestamp()").fetch_one(&test.sql).await.unwrap()
}

#[tokio::test]
async fn a_silent_run_becomes_stale_and_one_that_is_heard_of_stays() {
    let test = TestDb::new().await;
    let silent = plant::overdue(&test, "silent", 1).await;
    let fresh = plant::run(&test, "fresh", Status::Running).await;
    let renewed = plant::run(&test, "renewed", Status::Running).await;
    plant::silence(&test.sql, renewed.run_id, 300).await;
    assert_eq!(renew(&test.db, &[renewed]).await, [Renewal::Held]);

    let report = passes(&mut reaper(&test), 1).await;
    assert_eq!(report.ended, [silent.run_id]);
    let run = row(&test.sql, silent.run_id).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("stale"), &json!("worker_lost")));
    let attempts = attempts(&test.sql, silent.run_id).await;
    assert_eq!(attempts.len(), 1);
    assert_eq!((&attempts[0]["status"], &attempts[0]["reason"]), (&json!("stale"), &json!("worker_lost")));
    let event = events(&test.sql, silent.run_id).await.pop().unwrap();
    assert_eq!((&event["to_status"], &event["actor"]), (&json!("stale"), &json!("reaper")));
    for lease in [fresh, renewed] {
        assert_eq!(plant::status(&test.sql, lease.run_id).await, Status::Running);
        assert_eq!(renew(&test.db, &[lease]).await, [Renewal::Held]);
    }
    assert_eq!(renew(&test.db, &[silent]).await, [Renewal::Lost]);
    test.check().await;
}

#[tokio::test]
async fn silence_counts_only_from_when_the_reaper_began_to_look() {
    let test = TestDb::new().await;
    let silent = plant::overdue(&test, "w", 2).await;
    let began = database_time(&test).await;
    let mut reaper = reaper(&test);
    let report = reaper.pass().await.unwrap();
    assert!(report.ended.is_empty(), "nobody could be heard before it looked: {report:?}");
    let report = passes(&mut reaper, 1).await;
    assert_eq!(report.ended, [silent.run_id]);
    let finished: DateTime<Utc> =
        serde_json::from_value(row(&test.sql, silent.run_id).await["finished_at"].clone()).unwrap();
    assert!(finished - began >= chrono::TimeDelta::seconds(2), "ended after {}", finished - began);
    test.check().await;
}

#[tokio::test]
async fn a_reaper_without_a_good_pass_for_too_long_begins_to_look_anew() {
    let test = TestDb::new().await;
    let silent = plant::overdue(&test, "w", 1).await;
    let blind_after = Duration::ZERO;
    let settings = config::Reaper { interval: HOUR, start_within: HOUR, blind_after };
    let mut blind = Reaper::new(test.db.clone(), &settings);
    let began = database_time(&test).await;
    // To this one each pass comes too late, so it never has seen silence for as long as the run may be silent.
    while database_time(&test).await - began < chrono::TimeDelta::seconds(2) {
        let report = blind.pass().await.unwrap();
        assert!(report.ended.is_empty(), "{report:?}");
    }
    assert_eq!(passes(&mut reaper(&test), 1).await.ended, [silent.run_id], "one that can see ends it");
    test.check().await;
}

#[tokio::test]
async fn glances_between_two_passes_far_apart_keep_the_reaper_from_beginning_anew() {
    let test = TestDb::new().await;
    let silent = plant::overdue(&test, "w", 1).await;
    let settings = config::Reaper { interval: HOUR, start_within: HOUR, blind_after: Duration::from_millis(900) };
    let (mut seeing, mut blind) = (Reaper::new(test.db.clone(), &settings), Reaper::new(test.db.clone(), &settings));
    for reaper in [&mut seeing, &mut blind] {
        assert!(reaper.pass().await.unwrap().ended.is_empty());
    }
    let began = database_time(&test).await;
    while database_time(&test).await - began < chrono::TimeDelta::milliseconds(1500) {
        seeing.saw(&lookout::pass(&test.db).await.unwrap());
    }
    assert!(blind.pass().await.unwrap().ended.is_empty(), "it has seen nothing for too long");
    assert_eq!(seeing.pass().await.unwrap().ended, [silent.run_id]);
    test.check().await;
}

#[tokio::test]
async fn a_run_that_renews_long_after_its_time_limit_is_timed_out_as_unkillable() {
    let test = TestDb::new().await;
    let lease = plant::overdue(&test, "w", 1).await;
    let within = plant::overdue(&test, "within-its-limit", 1).await;
    sqlx::query("update test_runs set timeout_seconds = 7200, version = version + 1 where id = $1")
        .bind(within.run_id)
        .execute(&test.sql)
        .await
        .unwrap();
    let mut reaper = reaper(&test);
    let since = std::time::Instant::now();
    let ended = loop {
        assert_eq!(renew(&test.db, &[lease, within]).await, [Renewal::Overdue, Renewal::Held]);
        let report = reaper.pass().await.unwrap();
        if !report.ended.is_empty() {
            break report.ended;
        }
        assert!(since.elapsed() < LIMIT);
    };
    assert_eq!(ended, [lease.run_id]);
    let run = row(&test.sql, lease.run_id).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("timed_out"), &json!("unkillable")));
    assert_eq!(renew(&test.db, &[lease, within]).await, [Renewal::Lost, Renewal::Held]);
    test.check().await;
}

#[tokio::test]
async fn a_worker_that_is_asked_to_cancel_and_falls_silent_leaves_a_cancelled_run() {
    let test = TestDb::new().await;
    let lease = plant::overdue(&test, "w", 1).await;
    sqlx::query("select cancel_run($1)").bind(lease.run_id).execute(&test.sql).await.unwrap();
    passes(&mut reaper(&test), 1).await;
    let run = row(&test.sql, lease.run_id).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("cancelled"), &json!("worker_lost")));
    test.check().await;
}

#[tokio::test]
async fn a_stale_run_that_can_not_be_ended_does_not_keep_the_others() {
    let test = TestDb::new().await;
    let mut silent = vec![plant::overdue(&test, "a", 1).await.run_id];
    let bad = plant::overdue(&test, "poison", 1).await;
    silent.push(plant::overdue(&test, "b", 1).await.run_id);
    plant::poison(&test).await;
    let mut reaper = reaper(&test);
    assert_eq!(passes(&mut reaper, 2).await.ended, silent);
    let report = reaper.pass().await.unwrap();
    assert_eq!((report.ended, report.next), (vec![], Next::Rest), "it must not turn in circles over the bad one");
    assert_eq!(plant::status(&test.sql, bad.run_id).await, Status::Running);
}

/// Plants a run that a pull worker claimed and never confirmed.
async fn unconfirmed(test: &TestDb, workflow: &str) -> Lease {
    let lease = plant::overdue(test, workflow, 1).await;
    sqlx::query("update test_runs set executor_type = 'pull', version = version + 1 where id = $1")
        .bind(lease.run_id)
        .execute(&test.sql)
        .await
        .unwrap();
    lease
}

#[tokio::test]
async fn a_run_that_can_not_be_given_back_keeps_neither_the_given_back_nor_the_stale() {
    let test = TestDb::new().await;
    let a = unconfirmed(&test, "a").await.run_id;
    let bad = unconfirmed(&test, "poison").await.run_id;
    let b = unconfirmed(&test, "b").await.run_id;
    let silent = plant::overdue(&test, "silent", 1).await.run_id;
    sqlx::raw_sql(
        "create function refuse_poison() returns trigger language plpgsql as $$
         begin raise exception 'this row is poisoned'; end $$;
         create trigger poisoned before update on test_runs for each row
         when (new.workflow_id = 'poison' and new.status = 'queued') execute function refuse_poison()",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let mut reaper = reaper(&test);
    let (mut given_back, mut ended) = (Vec::new(), Vec::new());
    let since = std::time::Instant::now();
    // The refused batch may hold its locks for a moment after its answer, and what is locked is for the next pass.
    while (given_back.len(), ended.len()) != (2, 1) {
        assert!(since.elapsed() < LIMIT, "given back {given_back:?}, ended {ended:?}");
        let report = reaper.pass().await.unwrap();
        given_back.extend(report.given_back);
        ended.extend(report.ended);
    }
    given_back.sort();
    assert_eq!((given_back, ended), (vec![a, b], vec![silent]));
    assert_eq!(plant::status(&test.sql, bad).await, Status::Running);
    let report = reaper.pass().await.unwrap();
    assert_eq!((report.given_back, report.next), (vec![], Next::Rest), "it must not turn in circles over the bad one");
    sqlx::raw_sql("drop trigger poisoned on test_runs").execute(&test.sql).await.unwrap();
    assert_eq!(reaper.pass().await.unwrap().given_back, [bad]);
    test.check().await;
}

#[tokio::test]
async fn a_run_that_is_asked_to_end_and_never_confirmed_is_cancelled_and_not_queued_again() {
    let test = TestDb::new().await;
    let lease = unconfirmed(&test, "w").await;
    sqlx::query("select cancel_run($1)").bind(lease.run_id).execute(&test.sql).await.unwrap();
    let mut reaper = reaper(&test);
    let since = std::time::Instant::now();
    while reaper.pass().await.unwrap().given_back != [lease.run_id] {
        assert!(since.elapsed() < LIMIT);
    }
    let run = row(&test.sql, lease.run_id).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("cancelled"), &json!("requested")), "{run}");
    test.check().await;
}

#[tokio::test]
async fn an_expired_run_that_can_not_be_ended_keeps_neither_the_expired_nor_the_stale() {
    let test = TestDb::new().await;
    let mut expired = Vec::new();
    for workflow in ["a", "poison", "b"] {
        let run_id = plant::run(&test, workflow, Status::Queued).await.run_id;
        unstarted(&test, run_id, 7200).await;
        if workflow != "poison" {
            expired.push(run_id);
        }
    }
    plant::poison(&test).await;
    // Passes that fail over the bad row would look like an outage, after which silence counts anew.
    let settings = config::Reaper { interval: HOUR, start_within: HOUR, blind_after: Duration::from_millis(500) };
    let mut reaper = Reaper::new(test.db.clone(), &settings);
    let mut found = Vec::new();
    // The refused batch may hold its locks for a moment after its answer, and what is locked is for the next pass.
    let since = std::time::Instant::now();
    while found.len() < expired.len() {
        assert!(since.elapsed() < LIMIT, "expired only {found:?}");
        found.extend(reaper.pass().await.unwrap().expired);
    }
    found.sort();
    assert_eq!(found, expired);
    let silent = plant::overdue(&test, "silent", 1).await;
    assert_eq!(passes(&mut reaper, 1).await.ended, [silent.run_id]);
    test.check().await;
}

#[tokio::test]
async fn a_full_batch_is_followed_by_the_next_at_once() {
    let test = TestDb::new().await;
    let mut silent = Vec::new();
    for number in 0..130 {
        let lease = plant::run(&test, &format!("w{number}"), Status::Running).await;
        silent.push(lease.run_id);
    }
    silent.push(plant::overdue(&test, "last", 1).await.run_id);
    sqlx::query("update test_runs set heartbeat_timeout_seconds = 1, started_at = '2020-01-01', version = version + 1")
        .execute(&test.sql)
        .await
        .unwrap();
    let mut reaper = reaper(&test);
    let first = passes(&mut reaper, 1).await;
    assert_eq!((first.ended.len(), first.next), (100, Next::Again));
    let second = reaper.pass().await.unwrap();
    assert_eq!((second.ended.len(), second.next), (31, Next::Rest));
    assert_eq!([first.ended, second.ended].concat(), silent);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_that_somebody_has_locked_are_ended_later_and_delay_no_others() {
    let test = TestDb::new().await;
    let [locked, silent] = [plant::overdue(&test, "a", 1).await.run_id, plant::overdue(&test, "b", 1).await.run_id];
    let [unstarted_locked, unstarted_free] =
        [plant::run(&test, "c", Status::Queued).await.run_id, plant::run(&test, "d", Status::Queued).await.run_id];
    for run_id in [unstarted_locked, unstarted_free] {
        unstarted(&test, run_id, 7200).await;
    }
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("select from test_runs where id in ($1, $2) for update")
        .bind(locked)
        .bind(unstarted_locked)
        .execute(&mut *open)
        .await
        .unwrap();
    // Were one to wait for the lock, its statement would fail at the lock timeout.
    let both = [unstarted_locked, unstarted_free];
    let expired = test.db.with(async |connection| expire(connection, 3600, &both).await).await.unwrap();
    assert_eq!(expired, [unstarted_free]);
    let mut reaper = reaper(&test);
    let report = passes(&mut reaper, 1).await;
    assert_eq!((report.ended, report.expired), (vec![silent], vec![]));
    open.rollback().await.unwrap();
    let report = reaper.pass().await.unwrap();
    assert_eq!((report.ended, report.expired), (vec![locked], vec![unstarted_locked]));
    test.check().await;
}

#[tokio::test]
async fn a_lease_that_somebody_has_locked_is_ended_later_and_delays_no_other() {
    let test = TestDb::new().await;
    let [locked, silent] = [plant::overdue(&test, "a", 1).await, plant::overdue(&test, "b", 1).await];
    assert_eq!(renew(&test.db, &[locked, silent]).await, [Renewal::Overdue, Renewal::Overdue]);
    for lease in [locked, silent] {
        plant::silence(&test.sql, lease.run_id, 3600).await;
    }
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("select from run_leases where run_id = $1 for update")
        .bind(locked.run_id)
        .execute(&mut *open)
        .await
        .unwrap();
    let mut reaper = reaper(&test);
    assert_eq!(passes(&mut reaper, 1).await.ended, [silent.run_id]);
    open.rollback().await.unwrap();
    assert_eq!(reaper.pass().await.unwrap().ended, [locked.run_id]);
    test.check().await;
}

/// Makes a queued run look as if nobody had started it for `seconds`.
async fn unstarted(test: &TestDb, run_id: Uuid, seconds: i32) {
    sqlx::query(
        "update test_runs set available_at = now() - make_interval(secs => $2), version = version + 1 where id = $1",
    )
    .bind(run_id)
    .bind(seconds)
    .execute(&test.sql)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_run_that_nobody_starts_is_skipped_after_its_own_time_or_the_default() {
    let test = TestDb::new().await;
    let impatient = plant::run(&test, "impatient", Status::Queued).await.run_id;
    sqlx::query("update workflow_revisions set start_within_seconds = 60").execute(&test.sql).await.unwrap();
    let usual = plant::run(&test, "usual", Status::Queued).await.run_id;
    let mut reaper = reaper(&test);
    for (age, expected) in [(50, vec![]), (70, vec![impatient]), (3500, vec![]), (3700, vec![usual])] {
        for run_id in [impatient, usual] {
            if plant::status(&test.sql, run_id).await == Status::Queued {
                unstarted(&test, run_id, age).await;
            }
        }
        assert_eq!(reaper.pass().await.unwrap().expired, expected, "after {age} s");
    }
    for (run_id, seconds) in [(impatient, 60), (usual, 3600)] {
        let run = row(&test.sql, run_id).await;
        assert_eq!((&run["status"], &run["reason"]), (&json!("skipped"), &json!("expired")));
        assert_eq!(run["error"], format!("no worker started it within {seconds} s"));
    }
    test.check().await;
}

#[tokio::test]
async fn leases_are_swept_when_their_run_is_over_and_no_renewal_can_still_be_under_way() {
    let test = TestDb::new().await;
    let leases: [Lease; 3] = [
        plant::run(&test, "running", Status::Running).await,
        plant::run(&test, "just-over", Status::Running).await,
        plant::run(&test, "long-over", Status::Running).await,
    ];
    assert_eq!(renew(&test.db, &leases).await, [Renewal::Held; 3]);
    for lease in &leases[1..] {
        assert_eq!(settle_one(&test.db, *lease, Verdict::Succeeded).await, Settled::Recorded(Status::Succeeded));
    }
    // Final rows can't be changed, and these must be older than they are.
    let mut connection = test.sql.acquire().await.unwrap();
    sqlx::query("set session_replication_role = replica").execute(&mut *connection).await.unwrap();
    for (lease, age) in leases[1..].iter().zip([200, 600]) {
        sqlx::query(
            "update test_runs
             set finished_at = finished_at - make_interval(secs => $2), started_at = started_at - make_interval(secs => $2)
             where id = $1",
        )
        .bind(lease.run_id)
        .bind(age)
        .execute(&mut *connection)
        .await
        .unwrap();
    }
    let swept = test.db.with(async |connection| sweep_leases(connection, 100).await).await.unwrap();
    let left: Vec<Uuid> =
        sqlx::query_scalar("select run_id from run_leases order by run_id").fetch_all(&test.sql).await.unwrap();
    assert_eq!((swept, left), (1, vec![leases[0].run_id, leases[1].run_id]));
}
