//! The one table of transitions against the SQL that carries it out: every status, every event, every standing.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use singletrack::domain::status::transition;
use singletrack::domain::{Event, Landing, Lease, Standing, Status, Transition, Verdict};
use singletrack::store::enqueue::Enqueued;
use singletrack::store::settle::Settled;
use singletrack::store::{due, reap};
use uuid::Uuid;

use crate::support::calls::{attempts, claim_some, events, release_one, request, row, send, settle_one};
use crate::support::database::TestDb;
use crate::support::plant;

/// Everything the database knows about one run.
#[derive(Debug, PartialEq)]
struct Seen {
    row: Value,
    events: Vec<Value>,
    attempts: Vec<Value>,
}

impl Seen {
    async fn now(test: &TestDb, run_id: Uuid) -> Self {
        Self {
            row: row(&test.sql, run_id).await,
            events: events(&test.sql, run_id).await,
            attempts: attempts(&test.sql, run_id).await,
        }
    }
}

fn every_event() -> Vec<Event> {
    let others = [
        Event::Claim,
        Event::Release,
        Event::Expire,
        Event::Cancel,
        Event::ForceRelease,
        Event::Promote,
        Event::Supersede,
    ];
    let due = [Landing::Slot, Landing::Line, Landing::Nowhere].map(Event::Due);
    others.into_iter().chain(due).chain(Verdict::ALL.map(Event::Settle)).collect()
}

/// A database whose planted runs may have one attempt more than they had, or none.
async fn planted(may_retry: bool) -> TestDb {
    let test = TestDb::new().await;
    if may_retry {
        sqlx::query("alter table test_runs alter max_attempts set default 2").execute(&test.sql).await.unwrap();
    }
    test
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_does_to_every_status_what_the_table_says() {
    for may_retry in [false, true] {
        let test = planted(may_retry).await;
        // Whether a final run may have another attempt nothing asks any more.
        for from in Status::ALL.into_iter().filter(|from| !may_retry || !from.is_final()) {
            for event in every_event() {
                prove(&test, from, Standing { may_retry, ..Standing::default() }, event).await;
            }
        }
        test.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_does_to_a_run_whose_end_was_asked_for_what_the_table_says() {
    for may_retry in [false, true] {
        let test = planted(may_retry).await;
        for event in every_event() {
            let standing = Standing { cancel_requested: true, may_retry, ..Standing::default() };
            prove(&test, Status::Running, standing, event).await;
        }
        test.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_does_to_a_run_between_two_attempts_what_the_table_says() {
    let test = planted(true).await;
    for last in [Verdict::Failed, Verdict::TimedOut, Verdict::Stale] {
        for event in every_event() {
            prove(&test, Status::Queued, Standing { last: Some(last), ..Standing::default() }, event).await;
        }
    }
    test.check().await;
}

/// A run of a workflow of its own in the status and standing of a case.
async fn plant(test: &TestDb, workflow: &str, from: Status, standing: Standing) -> Lease {
    let lease = match standing.last {
        None => plant::run(test, workflow, from).await,
        Some(last) => {
            let lease = plant::run(test, workflow, Status::Running).await;
            assert_eq!(settle_one(&test.db, lease, last).await, Settled::Recorded(Status::Queued));
            plant::due(&test.sql, lease.run_id).await;
            lease
        }
    };
    if from == Status::Waiting {
        // Or nothing could supersede it.
        change(test, "update test_runs set next_in_line = true, version = version + 1 where id = $1", lease.run_id)
            .await;
    }
    if standing.cancel_requested {
        assert_eq!(by_hand(test, "select cancel_run($1)", lease.run_id).await, "cancel-requested");
    }
    lease
}

async fn prove(test: &TestDb, from: Status, standing: Standing, event: Event) {
    let case = format!("{} with {event:?}, {standing:?}", from.as_str());
    let workflow = format!("case-{}", Uuid::new_v4().simple());
    let lease = plant(test, &workflow, from, standing).await;
    if let (Status::Scheduled, Event::Due(landing)) = (from, event) {
        let policy = if landing == Landing::Line { "wait" } else { "reject" };
        let set = "update test_runs set on_conflict = $2, run_at = now(), version = version + 1 where id = $1";
        sqlx::query(set).bind(lease.run_id).bind(policy).execute(&test.sql).await.unwrap();
        if landing != Landing::Slot {
            plant::run(test, &workflow, Status::Queued).await;
        }
    }
    let before = Seen::now(test, lease.run_id).await;
    let taken = fire(test, event, &workflow, lease).await;
    let after = Seen::now(test, lease.run_id).await;

    match transition(from, standing, event) {
        Transition::To(to) => {
            assert!(taken, "{case}: refused");
            assert_moved(&case, &before, &after, (from, event, to));
            if to.holds_slot() {
                assert_holds_slot(&case, test, &workflow, lease.run_id).await;
            }
        }
        Transition::Noted => {
            assert!(taken, "{case}: refused");
            assert_noted(&case, &before, &after, standing.cancel_requested);
        }
        Transition::Refused => {
            assert!(!taken, "{case}: whoever fired it was told that it took effect");
            assert_eq!(before, after, "{case}: a refused event changed something");
        }
    }
    // Out of the way of the next case, which claims and expires whatever is due.
    for end in [
        "select cancel_run(id) from test_runs where workflow_id = $1 and finished_at is null",
        "select force_release_run(id, 'the case is over') from test_runs where workflow_id = $1 and finished_at is null",
    ] {
        sqlx::query(end).bind(&workflow).execute(&test.sql).await.unwrap();
    }
}

/// Fires an event the way the service does; whether it says that it took effect.
async fn fire(test: &TestDb, event: Event, workflow: &str, lease: Lease) -> bool {
    match event {
        Event::Claim => claim_some(&test.db, 100).await.unwrap().iter().any(|claimed| claimed.run.id == lease.run_id),
        Event::Release => release_one(&test.db, lease).await,
        Event::Settle(verdict) => matches!(settle_one(&test.db, lease, verdict).await, Settled::Recorded(_)),
        Event::Due(_) => {
            let runs = [lease.run_id];
            let started = test.db.with(async |connection| due::start(connection, &runs).await).await.unwrap();
            started == runs
        }
        Event::Promote => {
            let promote = "select promote($1)";
            let promoted: Option<Uuid> = sqlx::query_scalar(promote).bind(workflow).fetch_one(&test.sql).await.unwrap();
            promoted == Some(lease.run_id)
        }
        Event::Supersede => {
            // By a run, and for a holder, that play no part.
            let replace = "select replace_holder(gen_random_uuid(), $1, gen_random_uuid(), 'test')";
            sqlx::query(replace).bind(workflow).execute(&test.sql).await.unwrap();
            row(&test.sql, lease.run_id).await["reason"] == "superseded"
        }
        Event::Expire => {
            let runs = [lease.run_id];
            let expired = test.db.with(async |connection| reap::expire(connection, 0, &runs).await).await.unwrap();
            expired.contains(&lease.run_id)
        }
        Event::Cancel => {
            let answer = by_hand(test, "select cancel_run($1)", lease.run_id).await;
            matches!(answer.as_str(), "cancelled" | "cancel-requested")
        }
        Event::ForceRelease => by_hand(test, "select force_release_run($1, 'x')", lease.run_id).await == "released",
    }
}

async fn change(test: &TestDb, statement: &'static str, run_id: Uuid) {
    sqlx::query(statement).bind(run_id).execute(&test.sql).await.unwrap();
}

async fn by_hand(test: &TestDb, statement: &'static str, run_id: Uuid) -> String {
    sqlx::query_scalar(statement).bind(run_id).fetch_one(&test.sql).await.unwrap()
}

async fn assert_holds_slot(case: &str, test: &TestDb, workflow: &str, run_id: Uuid) {
    match send(&test.db, &request(workflow), false).await.unwrap() {
        Enqueued::SlotTaken(holder) => assert_eq!(holder.run_id, run_id, "{case}"),
        other => panic!("{case}: its slot was given away: {other:?}"),
    }
}

fn assert_moved(case: &str, before: &Seen, after: &Seen, (from, event, to): (Status, Event, Status)) {
    let row = &after.row;
    assert_eq!(row["status"], to.as_str(), "{case}");
    assert_eq!(row["version"], json!(before.row["version"].as_i64().unwrap() + 1), "{case}: not by the service");
    assert_eq!(row["finished_at"].is_string(), to.is_final(), "{case}");
    assert_eq!(row["lease_secret"].is_string(), to == Status::Running, "{case}");
    assert_eq!(row["reason"], reason(before, event, to), "{case}");

    let (event_row, earlier) = after.events.split_last().unwrap();
    assert_eq!(earlier, before.events, "{case}: not exactly one event");
    let (name_before, name_after) = (json!(from.as_str()), json!(to.as_str()));
    assert_eq!((&event_row["from_status"], &event_row["to_status"]), (&name_before, &name_after), "{case}");
    assert_eq!((&event_row["fence"], &event_row["attempt"]), (&row["fence"], &row["attempt"]), "{case}");
    assert_eq!(
        event_row["reason"],
        if event == Event::Release { known_as(row, "released") } else { row["reason"].clone() }
    );
    let actor = match event {
        Event::Expire => "reaper",
        Event::Cancel | Event::ForceRelease => "singletrack",
        Event::Due(_) => "scheduler",
        Event::Promote => "promoter",
        _ => "test",
    };
    assert_eq!(event_row["actor"], actor, "{case}");
    assert_attempt(case, before, after, (from, event, to));
    if to == Status::Queued {
        assert_unclaimed(case, before, after, event);
    }
}

/// The reason that the row gives, or `otherwise`.
fn known_as(row: &Value, otherwise: &str) -> Value {
    if row["reason"].is_null() { json!(otherwise) } else { row["reason"].clone() }
}

/// The reason that the run has after a move.
fn reason(before: &Seen, event: Event, to: Status) -> Value {
    match (event, to) {
        (Event::Expire, _) => json!("expired"),
        (Event::ForceRelease, _) => json!("forced"),
        (Event::Supersede, _) => json!("superseded"),
        (Event::Due(Landing::Nowhere), _) => json!("conflict"),
        (Event::Cancel, _) | (Event::Release, Status::Cancelled) => json!("requested"),
        (Event::Settle(_), Status::Cancelled) if before.row["cancel_requested_at"].is_string() => json!("requested"),
        (Event::Settle(_), Status::Cancelled) => json!("by_worker"),
        (Event::Settle(_), Status::Queued) => json!("backoff"),
        _ => Value::Null,
    }
}

/// A run that is queued is nobody's, and due at once, or after the wait of the default backoff.
fn assert_unclaimed(case: &str, before: &Seen, after: &Seen, event: Event) {
    for column in ["worker", "claim_id", "claim_position", "lease_secret", "finished_at"] {
        assert_eq!(after.row[column], Value::Null, "{case}: {column}");
    }
    if event == Event::Release {
        assert_eq!(after.row["available_at"], before.row["available_at"], "{case}");
        return;
    }
    let at = |value: &Value| -> DateTime<Utc> { serde_json::from_value(value.clone()).unwrap() };
    let wait = at(&after.row["available_at"]) - at(&after.events.last().unwrap()["at"]);
    if !matches!(event, Event::Settle(_)) {
        assert!(wait.is_zero(), "{case}: {wait}");
        return;
    }
    assert!((4_000..=6_000).contains(&wait.num_milliseconds()), "{case}: 5 s, more or less by a fifth: {wait}");
}

/// An attempt is recorded when it is over, and only then.
fn assert_attempt(case: &str, before: &Seen, after: &Seen, (from, event, to): (Status, Event, Status)) {
    if to == Status::Running {
        assert!(after.row["fence"].as_i64() > before.row["fence"].as_i64(), "{case}: no new fence");
        assert_eq!(after.row["attempt"], json!(before.row["attempt"].as_i64().unwrap() + 1), "{case}");
        assert!(after.row["started_at"].is_string() && after.row["worker"] == "test", "{case}: {:?}", after.row);
    } else {
        assert_eq!(after.row["fence"], before.row["fence"], "{case}");
    }
    if from != Status::Running {
        assert_eq!(after.attempts, before.attempts, "{case}: an attempt that never was");
        return;
    }
    assert_eq!(after.row["settled_fence"], before.row["fence"], "{case}");
    let [attempt] = after.attempts.as_slice() else { panic!("{case}: not one attempt: {:?}", after.attempts) };
    let released = event == Event::Release;
    let (ended, why) = match event {
        Event::Release => ("released", Value::Null),
        Event::Settle(verdict) if !to.is_final() => (verdict.status().as_str(), Value::Null),
        _ => (to.as_str(), after.row["reason"].clone()),
    };
    assert_eq!((&attempt["status"], &attempt["reason"]), (&json!(ended), &why), "{case}");
    // By these a worker that repeats itself is known.
    let (said, secret) = match event {
        Event::Settle(verdict) => (json!(verdict.status().as_str()), before.row["lease_secret"].clone()),
        _ => (Value::Null, Value::Null),
    };
    assert_eq!((&attempt["verdict"], &attempt["lease_secret"]), (&said, &secret), "{case}");
    for column in ["fence", "attempt", "worker", "started_at"] {
        assert_eq!(attempt[column], before.row[column], "{case}: {column}");
    }
    assert!(attempt["finished_at"].is_string(), "{case}");
    let counted = before.row["attempt"].as_i64().unwrap() - i64::from(released);
    assert_eq!(after.row["attempt"], json!(counted), "{case}: a released attempt does not count, any other does");
}

fn assert_noted(case: &str, before: &Seen, after: &Seen, noted_before: bool) {
    if noted_before {
        assert_eq!(before, after, "{case}: the second request changed something");
        return;
    }
    let mut row = after.row.clone();
    assert!(row["cancel_requested_at"].is_string(), "{case}");
    row["cancel_requested_at"] = Value::Null;
    row["version"] = before.row["version"].clone();
    assert_eq!(row, before.row, "{case}: more than the request changed");
    assert_eq!(after.attempts, before.attempts, "{case}");
    let (event, earlier) = after.events.split_last().unwrap();
    assert_eq!(earlier, before.events, "{case}");
    assert_eq!((&event["from_status"], &event["to_status"]), (&json!("running"), &json!("running")), "{case}");
    assert_eq!(event["reason"], "cancel_requested", "{case}");
}
