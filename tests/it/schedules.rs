//! Schedules: whoever is there fires each tick once, and what is not fired is said.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use singletrack::domain::{Status, WorkflowId};
use singletrack::engine::scheduler::{Report, Scheduler};
use singletrack::engine::sweeper::start_due;
use singletrack::store::pauses;
use singletrack::store::schedules::{advance, pending};
use singletrack::store::workflows::{self, Deleted};
use tokio::task::JoinSet;

use crate::support::calls::row;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::process::{Process, SHORT_LEASE};
use crate::support::replica::Replica;

const SOON: Duration = Duration::from_secs(30);

/// A cron of one second in a year.
fn yearly(tick: DateTime<Utc>) -> String {
    tick.format("%S %M %H %d %m *").to_string()
}

/// The database's clock some seconds ago, in whole seconds.
async fn ago(test: &TestDb, seconds: i64) -> DateTime<Utc> {
    let now: DateTime<Utc> =
        sqlx::query_scalar("select date_trunc('second', now())").fetch_one(&test.sql).await.unwrap();
    now - TimeDelta::seconds(seconds)
}

/// Defines `workflow` by what `members` say besides its executor.
async fn define(test: &TestDb, workflow: &str, mut members: Value) -> workflows::Put {
    members["executor"] = json!({"type": "command", "argv": ["true"]});
    let (id, definition) = (workflow.parse::<WorkflowId>().unwrap(), serde_json::from_value(members).unwrap());
    test.db.with(async |connection| workflows::put(connection, &id, &definition, "test").await).await.unwrap()
}

/// Makes it look as if a replica had worked out `tick` as the next one.
async fn expect_at(test: &TestDb, workflow: &str, tick: DateTime<Utc>) {
    let done =
        sqlx::query("update workflow_schedules set next_at = $2, since = $2 - interval '1 s' where workflow_id = $1")
            .bind(workflow)
            .bind(tick)
            .execute(&test.sql)
            .await
            .unwrap();
    assert_eq!(done.rows_affected(), 1, "{workflow} has no schedule");
}

/// A workflow with a tick that came `seconds` ago, and is the only one of the year.
async fn ticking(
    test: &TestDb,
    workflow: &str,
    seconds: i64,
    mut schedule: Value,
    mut members: Value,
) -> DateTime<Utc> {
    let tick = ago(test, seconds).await;
    schedule["cron"] = json!(yearly(tick));
    members["schedule"] = schedule;
    define(test, workflow, members).await;
    expect_at(test, workflow, tick).await;
    tick
}

async fn pass(test: &TestDb) -> Report {
    Scheduler::new(test.db.clone()).pass().await.unwrap()
}

/// Since when the schedule counts, and its next tick.
async fn standing(test: &TestDb, workflow: &str) -> Option<(DateTime<Utc>, Option<DateTime<Utc>>)> {
    sqlx::query_as("select since, next_at from workflow_schedules where workflow_id = $1")
        .bind(workflow)
        .fetch_optional(&test.sql)
        .await
        .unwrap()
}

/// The ticks for which there is a run, with its status and reason.
async fn ticks(test: &TestDb, workflow: &str) -> Vec<(DateTime<Utc>, String, Option<String>)> {
    sqlx::query_as(
        "select tick_at, status, reason from test_runs where workflow_id = $1 and tick_at is not null order by tick_at",
    )
    .bind(workflow)
    .fetch_all(&test.sql)
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_replicas_fire_each_tick_once() {
    let test = TestDb::new().await;
    let mut due = Vec::new();
    for number in 0..30 {
        let workflow = format!("w{number}");
        due.push((ticking(&test, &workflow, 5, json!({}), json!({})).await, workflow));
    }
    let mut passes = JoinSet::new();
    for _ in 0..10 {
        let mut scheduler = Scheduler::new(test.db.clone());
        passes.spawn(async move { scheduler.pass().await.unwrap() });
    }
    let reports = passes.join_all().await;
    assert_eq!(reports.iter().map(|report| report.fired.len()).sum::<usize>(), 30);
    assert_eq!(reports.iter().map(|report| report.advanced).sum::<usize>(), 30);
    for (tick, workflow) in &due {
        assert_eq!(ticks(&test, workflow).await, [(*tick, "queued".to_owned(), None)]);
        let (_, next) = standing(&test, workflow).await.unwrap();
        assert!(next.unwrap() > *tick + TimeDelta::days(300), "{next:?}");
    }
    assert_eq!(pass(&test).await.advanced, 0);
    test.check().await;
}

#[tokio::test]
async fn a_tick_that_comes_again_is_not_fired_again() {
    let test = TestDb::new().await;
    let tick = ticking(&test, "w", 5, json!({}), json!({"on_conflict": "wait"})).await;
    assert_eq!(pass(&test).await.fired.len(), 1);
    // The clock was set back, or somebody was at the table by hand.
    expect_at(&test, "w", tick).await;
    let report = pass(&test).await;
    assert_eq!((report.fired.len(), report.advanced), (0, 1));
    assert_eq!(ticks(&test, "w").await.len(), 1);
    test.check().await;
}

#[tokio::test]
async fn a_tick_makes_a_run_as_the_workflow_says_and_never_ahead() {
    let test = TestDb::new().await;
    let put = define(
        &test,
        "w",
        json!({"schedule": {"cron": "0 0 1 1 *", "time_zone": "Asia/Tokyo", "input": {"a": [1]}}, "priority": 7, "labels": {"team": "a"}}),
    )
    .await;
    assert_eq!(
        put.revision.schedule,
        Some(json!({"cron": "0 0 1 1 *", "time_zone": "Asia/Tokyo", "missed": "skip", "input": {"a": [1]}}))
    );
    let (since, next) = standing(&test, "w").await.unwrap();
    assert_eq!((since, next), (put.revision.created_at, None), "to be worked out");
    let report = pass(&test).await;
    assert_eq!((report.fired.len(), report.advanced), (0, 1));
    let (_, next) = standing(&test, "w").await.unwrap();
    assert!(
        next.unwrap() > since && next.unwrap().format("%m-%d %H:%M:%S").to_string() == "12-31 15:00:00",
        "{next:?}"
    );
    assert_eq!(pass(&test).await.advanced, 0);

    let tick = ago(&test, 3).await;
    expect_at(&test, "w", tick).await;
    let report = pass(&test).await;
    let run = row(&test.sql, report.fired[0]).await;
    assert_eq!((&run["status"], &run["requested_by"]), (&json!("queued"), &json!("schedule")), "{run}");
    assert_eq!(
        (&run["input"], &run["priority"], &run["labels"]),
        (&json!({"a": [1]}), &json!(7), &json!({"team": "a"}))
    );
    let shown = |name: &str| run[name].as_str().unwrap().parse::<DateTime<Utc>>().unwrap();
    assert_eq!((shown("tick_at"), shown("run_at")), (tick, tick));
    assert!(shown("created_at") >= tick);
    test.check().await;
}

#[tokio::test]
async fn a_tick_meets_a_taken_slot_as_on_conflict_says() {
    let test = TestDb::new().await;
    for (policy, status, reason) in [
        ("reject", "skipped", Some("conflict")),
        ("return_existing", "skipped", Some("conflict")),
        ("wait", "waiting", None),
        ("replace", "waiting", None),
    ] {
        let tick = ticking(&test, policy, 5, json!({}), json!({"on_conflict": policy})).await;
        let holder = plant::run(&test, policy, Status::Running).await.run_id;
        let report = pass(&test).await;
        assert_eq!(ticks(&test, policy).await, [(tick, status.to_owned(), reason.map(str::to_owned))], "{policy}");
        let blocked_by = if reason.is_some() { json!(holder) } else { Value::Null };
        assert_eq!(row(&test.sql, report.fired[0]).await["blocked_by"], blocked_by, "{policy}");
        let asked_to_end = !row(&test.sql, holder).await["cancel_requested_at"].is_null();
        assert_eq!(asked_to_end, policy == "replace");
    }
    test.check().await;
}

#[tokio::test]
async fn a_tick_of_a_paused_workflow_waits_or_is_skipped() {
    let test = TestDb::new().await;
    for (policy, status, reason) in
        [("reject", "skipped", Some("paused")), ("replace", "skipped", Some("paused")), ("wait", "waiting", None)]
    {
        let tick = ticking(&test, policy, 5, json!({}), json!({"on_conflict": policy})).await;
        let pause = async |connection: &mut sqlx::PgConnection| {
            pauses::pause(connection, pauses::Kind::Workflow, policy, None, "test").await
        };
        test.db.with(pause).await.unwrap();
        pass(&test).await;
        assert_eq!(ticks(&test, policy).await, [(tick, status.to_owned(), reason.map(str::to_owned))], "{policy}");
    }
    test.check().await;
}

#[tokio::test]
async fn ticks_of_an_outage_are_skipped_or_made_up_for_by_one_run() {
    let test = TestDb::new().await;
    // Every hour, the last time half an hour ago; the last that anybody saw was ten years ago.
    let last = ago(&test, 1800).await;
    let cron = last.format("%S %M * * * *").to_string();
    for missed in ["skip", "run_once"] {
        define(&test, missed, json!({"schedule": {"cron": cron, "missed": missed}})).await;
        expect_at(&test, missed, last - TimeDelta::hours(87_600)).await;
        let report = pass(&test).await;
        assert_eq!(report.advanced, 1);
        let (_, next) = standing(&test, missed).await.unwrap();
        assert_eq!(next, Some(last + TimeDelta::hours(1)));
    }
    assert_eq!(ticks(&test, "skip").await, []);
    assert_eq!(ticks(&test, "run_once").await, [(last, "queued".to_owned(), None)]);

    // Of every second, and a year: no more work than that.
    define(&test, "often", json!({"schedule": {"cron": "* * * * * *"}, "on_conflict": "wait"})).await;
    let before = ago(&test, 31_536_000).await;
    expect_at(&test, "often", before).await;
    assert_eq!(pass(&test).await.advanced, 1);
    let ticks = ticks(&test, "often").await;
    assert!(
        ticks.len() == 1 && ago(&test, 0).await - ticks[0].0 < TimeDelta::seconds(60),
        "the last, which is not late: {ticks:?}"
    );
    test.check().await;
}

#[tokio::test]
async fn a_changed_schedule_holds_at_once_and_what_was_due_before_never_fires() {
    let test = TestDb::new().await;
    ticking(&test, "w", 5, json!({}), json!({})).await;
    let seen = test.db.with(async |connection| pending(connection, 10).await).await.unwrap().remove(0);
    let put = define(&test, "w", json!({"schedule": {"cron": "0 0 1 1 *"}})).await;
    assert_eq!(standing(&test, "w").await, Some((put.revision.created_at, None)));
    // A replica that saw the old one a moment ago.
    let late = test
        .db
        .with(async |connection| advance(connection, &seen, seen.next_at, seen.now + TimeDelta::days(1)).await)
        .await
        .unwrap();
    assert_eq!(late, None);
    assert!(pass(&test).await.fired.is_empty());
    assert_eq!(ticks(&test, "w").await, []);

    // The zone and the policy are part of it.
    for schedule in
        [json!({"cron": "0 0 1 1 *", "time_zone": "Asia/Tokyo"}), json!({"cron": "0 0 1 1 *", "missed": "run_once"})]
    {
        assert!(standing(&test, "w").await.unwrap().1.is_some());
        let put = define(&test, "w", json!({"schedule": schedule})).await;
        assert_eq!(standing(&test, "w").await, Some((put.revision.created_at, None)));
        pass(&test).await;
    }
    test.check().await;
}

#[tokio::test]
async fn a_definition_that_says_the_same_of_when_leaves_the_schedule_where_it_stands() {
    let test = TestDb::new().await;
    let schedule = json!({"cron": "0 0 1 1 *"});
    define(&test, "w", json!({"schedule": schedule})).await;
    pass(&test).await;
    let before = standing(&test, "w").await;
    assert!(before.unwrap().1.is_some());
    define(&test, "w", json!({"schedule": schedule})).await;
    assert_eq!(standing(&test, "w").await, before, "the same again");
    define(&test, "w", json!({"schedule": schedule, "priority": 3})).await;
    assert_eq!(standing(&test, "w").await, before, "something else changed");
    define(&test, "w", json!({"schedule": {"cron": "0 0 1 1 *", "input": 4}, "priority": 3})).await;
    assert_eq!(standing(&test, "w").await, before, "the input changed");
    let tick = ago(&test, 2).await;
    expect_at(&test, "w", tick).await;
    let fired = pass(&test).await.fired;
    let run = row(&test.sql, fired[0]).await;
    assert_eq!((&run["revision"], &run["input"]), (&json!(3), &json!(4)), "as the newest revision says");
    test.check().await;
}

#[tokio::test]
async fn a_workflow_without_a_schedule_and_one_that_is_deleted_have_none_that_stands() {
    let test = TestDb::new().await;
    let schedule = json!({"cron": "0 0 1 1 *"});
    define(&test, "w", json!({"schedule": schedule})).await;
    define(&test, "w", json!({})).await;
    assert_eq!(standing(&test, "w").await, None);
    define(&test, "w", json!({"schedule": schedule})).await;
    let id: WorkflowId = "w".parse().unwrap();
    let deleted = test.db.with(async |connection| workflows::delete(connection, &id, "test").await).await.unwrap();
    assert_eq!((deleted, standing(&test, "w").await), (Deleted::Gone, None));
    let put = define(&test, "w", json!({"schedule": schedule})).await;
    assert_eq!(standing(&test, "w").await, Some((put.revision.created_at, None)), "the id came back");

    // A replica of a version that knows no schedules deletes, or changes, the workflow alone.
    for change in [
        "update workflows set deleted_at = now() where id = 'w'",
        "update workflows set deleted_at = null, revision = 3 where id = 'w'",
    ] {
        sqlx::query(change).execute(&test.sql).await.unwrap();
        let tick = ago(&test, 2).await;
        expect_at(&test, "w", tick).await;
        assert_eq!(pass(&test).await.advanced, 0, "{change}");
    }
    test.check().await;
}

#[tokio::test]
async fn a_tick_is_fired_and_moved_on_together_or_not_at_all_and_the_others_are_served() {
    let test = TestDb::new().await;
    let tick = ticking(&test, "poison", 5, json!({}), json!({})).await;
    for workflow in ["a", "b", "c"] {
        ticking(&test, workflow, 5, json!({}), json!({})).await;
    }
    // Of another version, which knows more than this one.
    define(&test, "strange", json!({"schedule": {"cron": "0 0 1 1 *"}})).await;
    let stranger = r#"{"cron": "every full moon", "time_zone": "UTC"}"#;
    sqlx::query("update workflow_revisions set schedule = $1::jsonb where workflow_id = 'strange'")
        .bind(stranger)
        .execute(&test.sql)
        .await
        .unwrap();
    // After the row was inserted and the schedule moved on, as late as it can fail.
    sqlx::raw_sql(
        "create function refuse_poison() returns trigger language plpgsql as $$
         begin raise exception 'this row is poisoned'; end $$;
         create constraint trigger poisoned after insert on test_runs initially deferred for each row
         when (new.workflow_id = 'poison') execute function refuse_poison()",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let mut scheduler = Scheduler::new(test.db.clone());
    let report = scheduler.pass().await.unwrap();
    assert_eq!((report.fired.len(), report.advanced), (3, 3));
    assert_eq!(ticks(&test, "poison").await, []);
    assert_eq!(standing(&test, "poison").await.unwrap().1, Some(tick), "still to be fired");

    sqlx::raw_sql("drop trigger poisoned on test_runs").execute(&test.sql).await.unwrap();
    let report = scheduler.pass().await.unwrap();
    assert_eq!((report.fired.len(), report.advanced), (1, 1));
    assert_eq!(ticks(&test, "poison").await.len(), 1);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_has_locked_keeps_no_schedule_and_loses_no_tick() {
    let test = TestDb::new().await;
    let tick = ticking(&test, "w", 5, json!({}), json!({"on_conflict": "wait"})).await;
    let holder = plant::run(&test, "w", Status::Running).await.run_id;
    let mut hand = test.sql.begin().await.unwrap();
    sqlx::query("select from test_runs where id = $1 for update").bind(holder).execute(&mut *hand).await.unwrap();
    ticking(&test, "other", 5, json!({}), json!({})).await;
    let report = pass(&test).await;
    assert_eq!((report.fired.len(), ticks(&test, "other").await.len()), (2, 1));
    // However long somebody has it locked, the tick is not lost: there is a run, and the schedule has moved on.
    assert_eq!(ticks(&test, "w").await, [(tick, "scheduled".to_owned(), None)]);
    assert!(standing(&test, "w").await.unwrap().1.unwrap() > tick + TimeDelta::days(300));
    assert!(start_due(&test.db).await.unwrap().runs.is_empty());
    hand.rollback().await.unwrap();
    assert_eq!(start_due(&test.db).await.unwrap().runs.len(), 1);
    assert_eq!(ticks(&test, "w").await, [(tick, "waiting".to_owned(), None)]);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_ticks_are_told() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let executor = json!({"type": "command", "argv": ["true"]});
    let schedule = json!({"cron": "30 2 * * *", "time_zone": "Europe/Berlin"});
    let path = "/api/v1/workflows/nightly";
    let defined = replica.client.put(path, json!({"executor": executor, "schedule": schedule})).await;
    assert_eq!(
        defined.body["schedule"],
        json!({"cron": "30 2 * * *", "time_zone": "Europe/Berlin", "missed": "skip", "input": null})
    );
    assert_eq!(replica.client.get(path).await.body["schedule"], defined.body["schedule"]);

    let told = replica.client.get("/api/v1/schedules/nightly/next?count=100").await;
    assert_eq!(told.status, 200, "{told:?}");
    assert_eq!(told.names(), ["cron", "next", "paused", "time_zone", "workflow_id"]);
    let next: Vec<DateTime<Utc>> = serde_json::from_value(told.body["next"].clone()).unwrap();
    assert_eq!(next.len(), 100);
    assert!(next[0] > ago(&test, 1).await && next[0] - ago(&test, 0).await <= TimeDelta::hours(25), "{told:?}");
    assert!(next.windows(2).all(|pair| (23..=25).contains(&(pair[1] - pair[0]).num_hours())), "{next:?}");
    let fewer = replica.client.get("/api/v1/schedules/nightly/next").await;
    assert_eq!(fewer.body["next"].as_array().unwrap().len(), 10);
    assert_eq!(fewer.body["paused"], false);
    replica.client.post(&format!("{path}/pause"), json!({})).await;
    assert_eq!(replica.client.get("/api/v1/schedules/nightly/next").await.body["paused"], true);
    replica.client.put("/api/v1/workflows/nightly@own", json!({"executor": executor, "schedule": schedule})).await;
    let own = replica.client.get("/api/v1/schedules/nightly@own/next").await;
    assert_eq!(own.body["paused"], false, "it has a definition of its own: {own:?}");

    for wrong in ["count=0", "count=101", "count=many", "count="] {
        let refused = replica.client.get(&format!("/api/v1/schedules/nightly/next?{wrong}")).await;
        assert_eq!(refused.mistakes(), ["parameter count"], "{wrong}");
    }
    replica.client.define("plain", "true").await;
    for (workflow, why) in
        [("plain", "has no schedule"), ("nobody", "No workflow `nobody`"), ("nightly@prod", "no definition of its own")]
    {
        let missing = replica.client.get(&format!("/api/v1/schedules/{workflow}/next")).await;
        assert_eq!((missing.status, missing.cause()), (404, "not-found"));
        assert!(missing.body["detail"].as_str().unwrap().contains(why), "{missing:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_schedule_is_refused_where_it_is_wrong() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    for (schedule, places) in [
        (
            json!({"cron": "often", "time_zone": "Berlin"}),
            vec!["pointer /schedule/cron", "pointer /schedule/time_zone"],
        ),
        (json!({"cron": "0 0 30 2 *"}), vec!["pointer /schedule/cron"]),
        (json!({"cron": "* * * * *", "missed": "all"}), vec!["pointer /schedule/missed"]),
        (json!({"cron": "* * * * *", "zone": "UTC"}), vec!["pointer /schedule/zone"]),
        (json!({"time_zone": "UTC"}), vec!["pointer /schedule"]),
        (json!(["* * * * *", "UTC", "skip", null]), vec!["pointer /schedule"]),
        (json!("* * * * *"), vec!["pointer /schedule"]),
    ] {
        let body = json!({"executor": {"type": "command", "argv": ["true"]}, "schedule": schedule});
        let refused = replica.client.put("/api/v1/workflows/w", body).await;
        assert_eq!(refused.mistakes(), places, "{schedule}: {refused:?}");
    }
    assert_eq!(replica.client.get("/api/v1/workflows/w").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_of_every_second_runs_on_two_services_until_it_is_taken_away() {
    let test = TestDb::new().await;
    let [one, two] = [(); 2].map(|()| Process::serve(&test.url, SHORT_LEASE));
    let executor = json!({"type": "command", "argv": ["true"]});
    let body = json!({"executor": executor, "schedule": {"cron": "* * * * * *", "input": {"by": "clock"}}});
    assert_eq!(one.client.put("/api/v1/workflows/w", body).await.status, 201);
    let ran = eventually("runs of some ticks", SOON, || async {
        let done =
            two.client.get("/api/v1/runs?workflow_id=w&status=succeeded").await.body["items"].as_array()?.clone();
        (done.len() >= 3).then_some(done)
    })
    .await;
    for run in &ran {
        assert_eq!((&run["requested_by"], &run["input"]), (&json!("schedule"), &json!({"by": "clock"})));
        let time = |name: &str| run[name].as_str().unwrap().parse::<DateTime<Utc>>().unwrap();
        assert!(time("created_at") >= time("tick_at") && time("tick_at") == time("run_at"), "{run}");
    }
    assert_eq!(two.client.put("/api/v1/workflows/w", json!({"executor": executor})).await.status, 200);
    let fired = ticks(&test, "w").await;
    let mut times: Vec<_> = fired.iter().map(|(tick, ..)| *tick).collect();
    times.dedup();
    assert_eq!(times.len(), fired.len(), "one row per tick: {fired:?}");
    assert_eq!(one.client.get("/api/v1/schedules/w/next").await.status, 404);
    // Both have looked since.
    let later = ago(&test, -2).await;
    eventually("two seconds", SOON, async || (ago(&test, 0).await >= later).then_some(())).await;
    assert_eq!(ticks(&test, "w").await.len(), fired.len(), "none after it was taken away");
    test.check().await;
}
