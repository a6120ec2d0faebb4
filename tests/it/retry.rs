//! Attempts after the first: when there is one, how long it waits, and what a worker may still say about the one before.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use singletrack::config;
use singletrack::domain::{Backoff, Lease, Outcome, RetryOn, Status, Verdict};
use singletrack::engine::reaper::Reaper;
use singletrack::store::reap::unstarted;
use singletrack::store::settle::{Settled, settle};
use uuid::Uuid;

use crate::support::calls::{LIMIT, attempts, cancel, claim_one, outcome, row, settle_as, settle_once, settle_one};
use crate::support::database::TestDb;
use crate::support::plant;

/// Plants a running run that may have `attempts` attempts.
async fn running(test: &TestDb, workflow: &str, attempts: i32) -> Lease {
    let lease = plant::run(test, workflow, Status::Running).await;
    plant::allow(&test.sql, lease.run_id, attempts).await;
    lease
}

async fn set_backoff(test: &TestDb, backoff: Value) {
    sqlx::query("update workflow_revisions set backoff = $1").bind(backoff).execute(&test.sql).await.unwrap();
}

fn time(value: &Value) -> DateTime<Utc> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Seconds from the end of the attempt before to when the run is due.
async fn wait(test: &TestDb, run_id: Uuid) -> f64 {
    let ended = time(&attempts(&test.sql, run_id).await.last().unwrap()["finished_at"]);
    (time(&row(&test.sql, run_id).await["available_at"]) - ended).as_seconds_f64()
}

/// Running runs that are at the `attempts`, so many of each.
const AT_ATTEMPTS: &str = "
    insert into test_runs (id, workflow_id, definition, revision, status, executor_type, version, requested_by, available_at,
                           attempt, max_attempts, fence, lease_secret, worker, started_at, timeout_seconds,
                           heartbeat_timeout_seconds)
    select gen_random_uuid(), $1 || '@' || n || '-' || s, $1, 1, 'running', 'command', 1, 'test', now(),
           n, 1000, nextval('run_fence'), gen_random_uuid(), 'test', now(), 600, 60
    from unnest($2::int[]) n, generate_series(1, $3) s
    returning id, fence, lease_secret";

const SAMPLES: i32 = 25;

#[tokio::test]
async fn every_wait_is_its_backoff_within_jitter_and_ceiling_up_to_attempt_1000() {
    let test = TestDb::new().await;
    let backoff =
        |initial_seconds, factor, max_seconds, jitter| Backoff { initial_seconds, factor, max_seconds, jitter };
    let cases = [
        Backoff::default(),
        backoff(86_400.0, 100.0, 604_800.0, 1.0),
        backoff(1.0, 1.01, 604_800.0, 0.5),
        backoff(3.0, 1.0, 100.0, 0.0),
        backoff(0.0, 100.0, 604_800.0, 1.0),
        backoff(10.0, 3.0, 2.0, 0.1),
        backoff(7.0, 2.0, 0.0, 0.5),
        // So little that a product of two is nothing, which Postgres calls an error.
        backoff(5e-324, 1.0 + f64::EPSILON, 60.0, 5e-324),
    ];
    let numbers = [1, 2, 3, 10, 100, 500, 999];
    for (number, backoff) in cases.into_iter().enumerate() {
        let workflow = format!("w{number}");
        plant::workflow(&test.sql, &workflow, &["true"]).await;
        set_backoff(&test, json!(backoff)).await;
        let planted: Vec<(Uuid, i64, Uuid)> =
            sqlx::query_as(AT_ATTEMPTS).bind(&workflow).bind(numbers).bind(SAMPLES).fetch_all(&test.sql).await.unwrap();
        let outcomes: Vec<(Lease, Outcome)> = planted
            .into_iter()
            .map(|(run_id, fence, secret)| (Lease { run_id, fence, secret: Some(secret) }, outcome(Verdict::Failed)))
            .collect();
        let settled = test.db.with(async |connection| settle(connection, &outcomes, "test").await).await.unwrap();
        assert!(settled.iter().all(|one| *one == Settled::Recorded(Status::Queued)), "{backoff:?}: {settled:?}");

        let waits: Vec<(i32, f64)> = sqlx::query_as(
            "select r.attempt, extract(epoch from r.available_at - e.at)::float8
             from test_runs r join run_events e on e.run_id = r.id where r.definition = $1",
        )
        .bind(&workflow)
        .fetch_all(&test.sql)
        .await
        .unwrap();
        assert_eq!(waits.len(), outcomes.len());
        assert_waits(&backoff, &waits);
    }
}

fn assert_waits(backoff: &Backoff, waits: &[(i32, f64)]) {
    let mut by_attempt: BTreeMap<i32, Vec<f64>> = BTreeMap::new();
    for (attempt, wait) in waits {
        by_attempt.entry(*attempt).or_default().push(*wait);
    }
    for (attempt, waits) in by_attempt {
        let plain = backoff.initial_seconds * backoff.factor.powi(attempt - 1).min(1e300);
        let within = |share: f64| (plain * share).min(backoff.max_seconds);
        let (low, high) = (within(1.0 - backoff.jitter), within(1.0 + backoff.jitter));
        for wait in &waits {
            let slack = 1e-5 + high * 1e-6;
            assert!(
                (low - slack..=high + slack).contains(wait),
                "{backoff:?}, {attempt}: {wait} not in {low} to {high}"
            );
        }
        let spread = waits.iter().copied().fold(f64::MIN, f64::max) - waits.iter().copied().fold(f64::MAX, f64::min);
        // Where the ceiling cuts it off, most may be the same.
        assert!(
            high >= backoff.max_seconds || spread >= (high - low) * 0.3,
            "{backoff:?}, {attempt}: all waits alike: {waits:?}"
        );
    }
}

#[tokio::test]
async fn a_wait_that_somebody_asked_for_counts_where_it_is_longer_and_a_week_at_most() {
    let test = TestDb::new().await;
    let second = Duration::from_secs;
    for (number, (asked, low, high)) in [
        (second(1), 4.0, 6.0),
        (second(60), 60.0, 60.0),
        (Duration::from_millis(6_500), 6.5, 6.5),
        (Duration::MAX, 604_800.0, 604_800.0),
    ]
    .into_iter()
    .enumerate()
    {
        let lease = running(&test, &format!("w{number}"), 2).await;
        let outcome = Outcome { retry_after: Some(asked), ..outcome(Verdict::Failed) };
        assert_eq!(settle_as(&test.db, lease, outcome).await, Settled::Recorded(Status::Queued));
        let wait = wait(&test, lease.run_id).await;
        assert!((low..=high).contains(&wait), "asked for {asked:?}: {wait}");
    }
    test.check().await;
}

#[tokio::test]
async fn only_an_end_that_is_named_is_followed_by_another_attempt() {
    let test = TestDb::new().await;
    let ends =
        [(Verdict::Failed, RetryOn::Failed), (Verdict::TimedOut, RetryOn::TimedOut), (Verdict::Stale, RetryOn::Stale)];
    for mask in 0..8 {
        let named: Vec<&str> = (0..3).filter(|bit| mask >> bit & 1 == 1).map(|bit| ends[bit].1.as_str()).collect();
        for verdict in Verdict::ALL {
            let lease = running(&test, &format!("w{mask}-{}", verdict.status().as_str()), 2).await;
            sqlx::query("update workflow_revisions set retry_on = $1").bind(&named).execute(&test.sql).await.unwrap();
            let again = named.contains(&verdict.status().as_str());
            let expected = if again { Status::Queued } else { verdict.status() };
            let settled = settle_one(&test.db, lease, verdict).await;
            assert_eq!(settled, Settled::Recorded(expected), "{verdict:?} with {named:?}");
        }
    }
    test.check().await;
}

#[tokio::test]
async fn a_pull_worker_that_gives_up_after_its_time_limit_has_timed_out() {
    let test = TestDb::new().await;
    let ends = [Verdict::Failed, Verdict::Cancelled, Verdict::Succeeded];
    let (timed_out, again) = (["timed_out", "timed_out", "succeeded"], ["queued", "queued", "succeeded"]);
    let cases = [
        ("pull", 3600, false, 1, timed_out),
        ("pull", 3600, false, 2, again),
        ("pull", 3600, true, 2, ["cancelled", "cancelled", "succeeded"]),
        ("pull", 300, false, 1, ["failed", "cancelled", "succeeded"]),
        // Its worker ends it at the limit, and knows which came first.
        ("command", 3600, false, 1, ["failed", "cancelled", "succeeded"]),
    ];
    for (number, (executor_type, age, asked, attempts, expected)) in cases.into_iter().enumerate() {
        for (verdict, expected) in ends.into_iter().zip(expected) {
            let lease = running(&test, &format!("w{number}-{}", verdict.status().as_str()), attempts).await;
            sqlx::query("update test_runs set executor_type = $2, version = version + 1 where id = $1")
                .bind(lease.run_id)
                .bind(executor_type)
                .execute(&test.sql)
                .await
                .unwrap();
            plant::silence(&test.sql, lease.run_id, age).await;
            if asked {
                cancel(&test.db, lease.run_id).await;
            }
            let settled = settle_one(&test.db, lease, verdict).await;
            assert_eq!(settled, Settled::Recorded(expected.parse().unwrap()), "case {number}, {verdict:?}");
            let attempt = crate::support::calls::attempts(&test.sql, lease.run_id).await.remove(0);
            let late = matches!(expected, "timed_out" | "queued");
            assert_eq!(attempt["reason"] == "timeout", late, "case {number}, {verdict:?}: {attempt}");
            assert_eq!(attempt["verdict"], json!(verdict.status()), "by which it is known when it repeats itself");
        }
    }
    test.check().await;
}

#[tokio::test]
async fn a_run_without_its_revision_has_no_further_attempt_and_frees_its_slot() {
    let test = TestDb::new().await;
    let lease = running(&test, "w", 5).await;
    sqlx::query("delete from workflow_revisions").execute(&test.sql).await.unwrap();
    assert_eq!(settle_one(&test.db, lease, Verdict::Failed).await, Settled::Recorded(Status::Failed));
    test.check().await;
}

#[tokio::test]
async fn a_worker_that_repeats_itself_is_known_also_when_the_run_has_gone_on() {
    let test = TestDb::new().await;
    let first = running(&test, "w", 2).await;
    assert_eq!(settle_one(&test.db, first, Verdict::Failed).await, Settled::Recorded(Status::Queued));
    let thief = Lease { secret: Some(Uuid::new_v4()), ..first };
    let reaper = Lease { secret: None, ..first };
    let repeat = async |status: Status| {
        let before = row(&test.sql, first.run_id).await;
        for verdict in Verdict::ALL {
            let again = settle_one(&test.db, first, verdict).await;
            let same = verdict == Verdict::Failed;
            assert_eq!(again, if same { Settled::Already(status) } else { Settled::Lost(Some(status)) }, "{verdict:?}");
            for other in [thief, reaper] {
                assert_eq!(settle_one(&test.db, other, verdict).await, Settled::Lost(Some(status)), "{verdict:?}");
            }
        }
        assert_eq!(row(&test.sql, first.run_id).await, before);
    };
    repeat(Status::Queued).await;
    plant::due(&test.sql, first.run_id).await;
    let second = claim_one(&test.db).await;
    assert!(second.fence > first.fence && second.run_id == first.run_id);
    repeat(Status::Running).await;
    assert_eq!(settle_one(&test.db, second, Verdict::Succeeded).await, Settled::Recorded(Status::Succeeded));
    repeat(Status::Succeeded).await;
    assert_eq!(settle_one(&test.db, second, Verdict::Succeeded).await, Settled::Already(Status::Succeeded));
    assert_eq!(attempts(&test.sql, first.run_id).await.len(), 2);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_meets_its_own_lost_record_comes_after_it_and_is_known_though_another_attempt_is_due() {
    let test = TestDb::new().await;
    for (verdict, expected) in
        [(Verdict::Failed, Settled::Already(Status::Queued)), (Verdict::Succeeded, Settled::Lost(Some(Status::Queued)))]
    {
        let lease = running(&test, verdict.status().as_str(), 2).await;
        let mut lost = test.sql.begin().await.unwrap();
        settle(&mut lost, &[(lease, outcome(Verdict::Failed))], "test").await.unwrap();
        assert_eq!(settle_once(&test.db, lease, verdict).await, Settled::Busy);
        lost.commit().await.unwrap();
        assert_eq!(settle_once(&test.db, lease, verdict).await, expected);
    }
    test.check().await;
}

#[tokio::test]
async fn of_several_ends_of_one_run_brought_together_the_first_counts() {
    let test = TestDb::new().await;
    let (lease, other) = (running(&test, "w", 1).await, running(&test, "other", 1).await);
    let thief = Lease { secret: Some(Uuid::new_v4()), ..lease };
    let ends = [
        (thief, Verdict::Stale),
        (lease, Verdict::Failed),
        (other, Verdict::Succeeded),
        (lease, Verdict::Succeeded),
        (lease, Verdict::Failed),
    ];
    let outcomes = ends.map(|(lease, verdict)| (lease, outcome(verdict)));
    let settled = test.db.with(async |connection| settle(connection, &outcomes, "test").await).await.unwrap();
    let expected = [
        Settled::Lost(Some(Status::Failed)),
        Settled::Recorded(Status::Failed),
        Settled::Recorded(Status::Succeeded),
        Settled::Lost(Some(Status::Failed)),
        Settled::Already(Status::Failed),
    ];
    assert_eq!(settled, expected);
    assert_eq!(attempts(&test.sql, lease.run_id).await[0]["verdict"], "failed");
    test.check().await;
}

#[tokio::test]
async fn a_run_that_kills_its_worker_each_time_is_stale_after_its_last_attempt() {
    let test = TestDb::new().await;
    let mut lease = plant::overdue(&test, "poison", 1).await;
    plant::allow(&test.sql, lease.run_id, 3).await;
    set_backoff(&test, json!(Backoff { initial_seconds: 0.0, ..Backoff::default() })).await;
    let hour = Duration::from_secs(3600);
    let mut reaper =
        Reaper::new(test.db.clone(), &config::Reaper { interval: hour, start_within: hour, blind_after: hour });
    let mut fences = HashSet::new();
    for attempt in 1..=3 {
        assert!(fences.insert(lease.fence));
        let since = Instant::now();
        while reaper.pass().await.unwrap().ended != [lease.run_id] {
            assert!(since.elapsed() < LIMIT, "attempt {attempt} is not ended");
        }
        let run = row(&test.sql, lease.run_id).await;
        assert_eq!(run["attempt"], attempt);
        if attempt < 3 {
            assert_eq!((&run["status"], &run["reason"]), (&json!("queued"), &json!("backoff")), "{run}");
            lease = claim_one(&test.db).await;
            plant::silence(&test.sql, lease.run_id, 3600).await;
        } else {
            assert_eq!((&run["status"], &run["reason"]), (&json!("stale"), &json!("worker_lost")), "{run}");
        }
    }
    let ended: Vec<Value> = attempts(&test.sql, lease.run_id).await;
    let told: Vec<_> = ended.iter().map(|one| (one["attempt"].clone(), one["status"].clone())).collect();
    assert_eq!(told, [1, 2, 3].map(|attempt| (json!(attempt), json!("stale"))));
    assert!(ended.iter().all(|one| one["reason"] == "worker_lost" && one["lease_secret"].is_null()), "{ended:?}");
    assert!(reaper.pass().await.unwrap().ended.is_empty(), "it is over");
    test.check().await;
}

#[tokio::test]
async fn a_run_in_backoff_expires_only_when_nobody_takes_it_after_that() {
    let test = TestDb::new().await;
    let lease = running(&test, "w", 2).await;
    let outcome = Outcome { exit_code: Some(3), ..outcome(Verdict::Failed) };
    assert_eq!(settle_as(&test.db, lease, outcome).await, Settled::Recorded(Status::Queued));
    let found = test.db.with(async |connection| unstarted(connection, 0, 100).await).await.unwrap();
    assert!(found.is_empty(), "the wait does not count");

    plant::due(&test.sql, lease.run_id).await;
    sqlx::query("update workflow_revisions set start_within_seconds = 1").execute(&test.sql).await.unwrap();
    sqlx::query("update test_runs set available_at = now() - interval '2 s', version = version + 1")
        .execute(&test.sql)
        .await
        .unwrap();
    let hour = Duration::from_secs(3600);
    let settings = config::Reaper { interval: hour, start_within: hour, blind_after: hour };
    assert_eq!(Reaper::new(test.db.clone(), &settings).pass().await.unwrap().expired, [lease.run_id]);
    let run = row(&test.sql, lease.run_id).await;
    assert_eq!((&run["status"], &run["reason"], &run["attempt"]), (&json!("failed"), &json!("expired"), &json!(1)));
    assert_eq!((&run["exit_code"], &run["settled_fence"]), (&json!(3), &json!(lease.fence)), "of the attempt it had");
    test.check().await;
}
