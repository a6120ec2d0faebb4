//! Broken promises, leases held by nobody, slots nobody serves; and a service at work, of which nothing is said.

use std::time::Duration;

use serde_json::json;
use singletrack::app::doctor::{Outcome, Terms};
use singletrack::domain::Status;
use sqlx::PgPool;
use uuid::Uuid;

use super::{TERMS, check, clean, look, named, only, plant, report};
use crate::support::calls::renew;
use crate::support::database::TestDb;
use crate::support::replica::Replica;
use crate::support::{eventually, plant as planted};
use crate::views::BROKEN;

/// A database with a running, a queued and a succeeded run, of `busy`, `next` and `done`.
async fn three_runs() -> TestDb {
    let test = TestDb::new().await;
    for (workflow, status) in [("busy", Status::Running), ("next", Status::Queued), ("done", Status::Succeeded)] {
        planted::run(&test, workflow, status).await;
    }
    test
}

#[tokio::test]
async fn every_broken_promise_is_found_with_its_rows_and_what_to_do() {
    clean(&report(&three_runs().await).await);
    for (kind, statements) in BROKEN {
        let test = three_runs().await;
        plant(&test, statements).await;
        let report = report(&test).await;
        let found = named(&report, Outcome::Findings);
        // What had to be taken away for it is found too, and who runs twice holds the slot twice.
        let beside = ["indexes", "constraints", "two-slots", "doubled-slots"];
        assert!(found.iter().all(|name| name == kind || beside.contains(name)), "{kind}: {report:#?}");
        let [finding] = &check(&report, kind).findings[..] else { panic!("{kind}: {report:#?}") };
        let about = if kind.contains("two-") { 2 } else { 1 };
        let ids = finding.rows[0].split([' ', ':']).filter(|word| word.parse::<Uuid>().is_ok()).count();
        assert_eq!((finding.rows.len(), ids, finding.more), (1, about, 0), "{finding:?}");
        assert!(!finding.means.is_empty() && !finding.remedy.is_empty());
    }
}

#[tokio::test]
async fn what_was_broken_long_ago_is_found_by_looking_at_all_of_history() {
    let of_history =
        ["overlapping-attempts", "fence-went-back", "final-twice", "changed-after-final", "final-without-attempt"];
    for (kind, statements) in BROKEN.iter().filter(|(kind, _)| of_history.contains(kind)) {
        let test = three_runs().await;
        plant(&test, statements).await;
        plant(
            &test,
            "set local session_replication_role = replica;
             update run_events set at = at - interval '3 days';
             update test_runs set created_at = created_at - interval '3 days', started_at = started_at - interval '3 days',
                                  finished_at = finished_at - interval '3 days' where status = 'succeeded'",
        )
        .await;
        clean(&report(&test).await);
        only(&look(&test.options(), &Terms { full: true, ..TERMS }).await, kind);
    }
}

#[tokio::test]
async fn ten_rows_are_named_and_the_others_counted() {
    let test = TestDb::new().await;
    plant(
        &test,
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, run_at)
         select gen_random_uuid(), 'late-' || n, 'late', 1, 'scheduled', 'command', now() - interval '2 minutes'
         from generate_series(1, 13) n",
    )
    .await;
    let finding = only(&report(&test).await, "due-and-scheduled");
    assert_eq!((finding.rows.len(), finding.more), (10, 3), "{finding:?}");
    assert!(finding.what.starts_with("13 scheduled runs"), "{finding:?}");
}

#[tokio::test]
async fn a_second_run_that_a_damaged_index_hides_is_found() {
    let test = three_runs().await;
    // An index that misses a row: it was not written to for a moment.
    plant(&test, "update pg_index set indisready = false where indexrelid = 'test_runs_one_slot'::regclass").await;
    plant(
        &test,
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, available_at, version)
         values ('00000000-0000-7000-8000-000000000001', 'next', 'next', 1, 'queued', 'command', now(), 1);
         insert into run_events (run_id, to_status, attempt, fence, actor)
         values ('00000000-0000-7000-8000-000000000001', 'queued', 0, 0, 'test')",
    )
    .await;
    plant(&test, "update pg_index set indisready = true where indexrelid = 'test_runs_one_slot'::regclass").await;
    // So that such a small table is read by it all the same.
    plant(
        &test,
        "do $$ begin execute format('alter database %I set enable_seqscan = off', current_database()); end $$",
    )
    .await;
    let report = report(&test).await;
    assert!(check(&report, "two-slots").findings.is_empty(), "the index does not hide it: {report:#?}");
    let finding = &check(&report, "doubled-slots").findings[0];
    assert!(finding.rows[0].starts_with("next: 00000000-0000-7000-8000-000000000001 queued, "), "{finding:?}");
}

#[tokio::test]
async fn fences_that_would_be_given_again_are_found() {
    let test = three_runs().await;
    plant(&test, "select setval('run_fence', 1)").await;
    let finding = only(&report(&test).await, "fences");
    assert_eq!(finding.what, "the sequence run_fence is at 1, and fence 2 is in use");
    let remedy: &'static str = finding.remedy.leak();
    plant(&test, remedy).await;
    clean(&report(&test).await);
}

async fn lease(sql: &PgPool, run_id: Uuid, fence: i64) {
    sqlx::query("insert into run_leases (run_id, fence, heartbeat_at) values ($1, $2, now())")
        .bind(run_id)
        .bind(fence)
        .execute(sql)
        .await
        .unwrap();
}

#[tokio::test]
async fn leases_that_nobody_holds_are_found() {
    let test = TestDb::new().await;
    let unknown = Uuid::now_v7();
    lease(&test.sql, unknown, 0).await;
    let finding = only(&report(&test).await, "orphan-lease");
    assert_eq!(finding.rows, [format!("{unknown}: there is no such run")]);

    let test = TestDb::new().await;
    let over = planted::run(&test, "over", Status::Succeeded).await;
    lease(&test.sql, over.run_id, over.fence).await;
    clean(&report(&test).await); // the reaper leaves it there for five minutes
    plant(
        &test,
        "set local session_replication_role = replica;
         update test_runs set started_at = now() - interval '7 minutes', finished_at = now() - interval '7 minutes'",
    )
    .await;
    let finding = only(&report(&test).await, "orphan-lease");
    assert!(
        finding.rows[0].starts_with(&format!("{} of over: the run is succeeded since", over.run_id)),
        "{finding:?}"
    );

    let test = TestDb::new().await;
    let never = planted::run(&test, "never", Status::Queued).await;
    lease(&test.sql, never.run_id, 0).await;
    let finding = only(&report(&test).await, "orphan-lease");
    assert_eq!(finding.rows, [format!("{} of never: the run is queued and was never claimed", never.run_id)]);

    let test = TestDb::new().await;
    let other = planted::run(&test, "other", Status::Running).await;
    renew(&test.db, &[other]).await;
    plant(&test, "update run_leases set fence = nextval('run_fence')").await;
    let finding = only(&report(&test).await, "foreign-lease");
    assert!(finding.rows[0].starts_with(&format!("{} of other: claimed under fence", other.run_id)), "{finding:?}");
}

#[tokio::test]
async fn a_run_whose_worker_is_gone_is_found_before_its_lease_is_over() {
    let test = TestDb::new().await;
    let run = planted::run(&test, "w", Status::Running).await;
    planted::silence(&test.sql, run.run_id, 40).await;
    let finding = only(&report(&test).await, "lost-worker");
    assert!(finding.rows[0].contains("its worker planted is not known"), "{finding:?}");
    plant(&test, "insert into workers (name, executor_types, seen_at) values ('planted', '{command}', now() - interval '2 minutes')").await;
    let finding = only(&report(&test).await, "lost-worker");
    assert!(finding.rows[0].contains("its worker planted was last seen at"), "{finding:?}");
    // One that is seen, or renews, is there.
    plant(&test, "update workers set seen_at = now()").await;
    clean(&report(&test).await);
    plant(&test, "delete from workers").await;
    renew(&test.db, &[run]).await;
    clean(&report(&test).await);
}

#[tokio::test]
async fn a_run_that_is_renewed_for_ever_is_found() {
    let test = TestDb::new().await;
    let run = planted::overdue(&test, "w", 1).await;
    lease(&test.sql, run.run_id, run.fence).await;
    // It renews all the while that this test looks.
    plant(&test, "update run_leases set heartbeat_at = now() + interval '1 hour'").await;
    let finding = eventually("the server is up for two of its timeouts", Duration::from_secs(30), async || {
        let report = report(&test).await;
        (report.outcome == Outcome::Findings).then(|| only(&report, "past-time-limit"))
    })
    .await;
    assert!(finding.rows[0].starts_with(&format!("{} of w: should have ended at", run.run_id)), "{finding:?}");
}

#[tokio::test]
async fn a_slot_that_nobody_serves_and_a_pause_that_was_forgotten_are_found() {
    let test = TestDb::new().await;
    let run = planted::run(&test, "w", Status::Queued).await;
    plant(&test, "update test_runs set queue = 'gpu', version = version + 1").await;
    clean(&report(&test).await); // a worker may be on its way
    plant(&test, "update test_runs set available_at = now() - interval '2 minutes', version = version + 1").await;
    plant(&test, "insert into workers (name, executor_types, queues) values ('a', '{command}', '{default}'), ('b', '{pull}', null)").await;
    let finding = only(&report(&test).await, "no-worker");
    assert!(
        finding.rows[0].starts_with(&format!("{} of w: command in queue gpu, to be started since", run.run_id)),
        "{finding:?}"
    );
    plant(&test, "update workers set queues = '{default, gpu}' where name = 'a'").await;
    clean(&report(&test).await);

    for (kind, name) in [("workflow", "w"), ("queue", "gpu")] {
        sqlx::query("insert into pauses (kind, name, reason, paused_by, paused_at) values ($1, $2, 'moving', 'ann', now() - interval '2 days')")
            .bind(kind)
            .bind(name)
            .execute(&test.sql)
            .await
            .unwrap();
        let finding = only(&report(&test).await, "paused-for-long");
        assert!(finding.rows[0].starts_with(&format!("{kind} {name}: paused since")), "{finding:?}");
        assert!(finding.rows[0].ends_with("by ann (moving), 1 runs wait for it"), "{finding:?}");
        plant(&test, "update pauses set paused_at = now()").await;
        clean(&report(&test).await);
        plant(&test, "delete from pauses").await;
    }
}

#[tokio::test]
async fn replicas_that_fell_silent_or_are_of_another_version_are_told_of_and_no_finding() {
    let test = TestDb::new().await;
    plant(
        &test,
        "insert into workers (name, executor_types, version, seen_at)
         values ('new', '{command,http}', '9.9.9', now()), ('old', '{command,http}', null, now()), ('puller', '{pull}', '0.0.1', now()),
                ('gone', '{command,http}', '9.9.9', now() - interval '5 minutes')",
    )
    .await;
    let report = report(&test).await;
    clean(&report);
    let notes = &check(&report, "replicas").notes;
    assert_eq!(
        notes[..2],
        ["2 replicas that execute runs, 1 pull workers", "of different versions: 9.9.9, an older one"]
    );
    assert!(notes[2].starts_with("gone was last seen 30"), "{notes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_service_at_work_nothing_is_said() {
    let test = TestDb::new().await;
    let (one, other) = (Replica::start(&test).await, Replica::start(&test).await);
    let client = &one.client;
    for n in 0..4 {
        let body = json!({"executor": {"type": "command", "argv": ["sh", "-c", if n == 3 { "exit 1" } else { "sleep 0.05" }]},
                          "max_attempts": 3, "backoff": {"initial_seconds": 0, "factor": 1, "max_seconds": 0, "jitter": 0}});
        assert_eq!(client.put(&format!("/api/v1/workflows/w{n}"), body).await.status, 201);
    }
    let mut runs = Vec::new();
    for n in 0..60 {
        let policy = ["wait", "reject", "replace", "wait"][n / 4 % 4];
        let client = if n % 2 == 0 { client } else { &other.client };
        let answer = client.post(&format!("/api/v1/workflows/w{}/runs", n % 4), json!({"on_conflict": policy})).await;
        assert!([202, 409].contains(&answer.status), "{answer:?}");
        if answer.status == 202 {
            runs.push(answer.run_id());
        }
        if n % 10 == 5 {
            let (_, token) = client.working(&format!("pulled{n}")).await;
            client.beat(&token).await;
            clean(&report(&test).await);
            client.say_one("finish", &token, json!({"outcome": "succeeded"})).await;
        }
    }
    for run in &runs {
        one.client.finished(*run).await;
    }
    let report = look(&test.options(), &Terms { full: true, ..TERMS }).await;
    clean(&report);
    assert_eq!(check(&report, "replicas").notes[0], "2 replicas that execute runs, 1 pull workers");
    one.finish().await;
    other.finish().await;
}
