//! The one table of transitions against the SQL that carries it out: every status, every event.

use serde_json::{Value, json};
use singletrack::domain::status::transition;
use singletrack::domain::{Event, Lease, Status, Transition, Verdict};
use singletrack::store::reap;
use singletrack::store::settle::Settled;
use uuid::Uuid;

use crate::support::calls::{attempts, claim_some, events, release_one, row, settle_one};
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
    let others = [Event::Claim, Event::Release, Event::Expire, Event::Cancel, Event::ForceRelease];
    others.into_iter().chain(Verdict::ALL.map(Event::Settle)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_does_to_every_status_what_the_table_says() {
    let test = TestDb::new().await;
    for from in Status::ALL {
        for event in every_event() {
            prove(&test, from, false, event).await;
        }
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_does_to_a_run_whose_end_was_asked_for_what_the_table_says() {
    let test = TestDb::new().await;
    for event in every_event() {
        prove(&test, Status::Running, true, event).await;
    }
    test.check().await;
}

async fn prove(test: &TestDb, from: Status, cancel_requested: bool, event: Event) {
    let case = format!("{} with {event:?}, cancel requested: {cancel_requested}", from.as_str());
    let workflow = format!("case-{}", Uuid::new_v4().simple());
    let lease = plant::run(test, &workflow, from).await;
    if cancel_requested {
        assert_eq!(by_hand(test, "select cancel_run($1)", lease.run_id).await, "cancel-requested");
    }
    let before = Seen::now(test, lease.run_id).await;
    let taken = fire(test, event, lease).await;
    let after = Seen::now(test, lease.run_id).await;

    match transition(from, cancel_requested, event) {
        Transition::To(to) => {
            assert!(taken, "{case}: refused");
            assert_moved(&case, &before, &after, (from, event, to));
        }
        Transition::Noted => {
            assert!(taken, "{case}: refused");
            assert_noted(&case, &before, &after, cancel_requested);
        }
        Transition::Refused => {
            assert!(!taken, "{case}: whoever fired it was told that it took effect");
            assert_eq!(before, after, "{case}: a refused event changed something");
        }
    }
    // Out of the way of the next case, which claims and expires whatever is due.
    by_hand(test, "select cancel_run($1)", lease.run_id).await;
    by_hand(test, "select force_release_run($1, 'the case is over')", lease.run_id).await;
}

/// Fires an event the way the service does; whether it says that it took effect.
async fn fire(test: &TestDb, event: Event, lease: Lease) -> bool {
    match event {
        Event::Claim => claim_some(&test.db, 100).await.unwrap().iter().any(|claimed| claimed.run.id == lease.run_id),
        Event::Release => release_one(&test.db, lease).await,
        Event::Settle(verdict) => matches!(settle_one(&test.db, lease, verdict).await, Settled::Recorded(_)),
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

async fn by_hand(test: &TestDb, statement: &'static str, run_id: Uuid) -> String {
    sqlx::query_scalar(statement).bind(run_id).fetch_one(&test.sql).await.unwrap()
}

fn assert_moved(case: &str, before: &Seen, after: &Seen, (from, event, to): (Status, Event, Status)) {
    let row = &after.row;
    assert_eq!(row["status"], to.as_str(), "{case}");
    assert_eq!(row["version"], json!(before.row["version"].as_i64().unwrap() + 1), "{case}: not by the service");
    assert_eq!(row["finished_at"].is_string(), to.is_final(), "{case}");
    // The worker that settled is known by it when it repeats itself.
    let known = to == Status::Running || matches!(event, Event::Settle(_));
    assert_eq!(row["lease_secret"].is_string(), known, "{case}");
    let reason = match event {
        Event::Expire => json!("expired"),
        Event::ForceRelease => json!("forced"),
        Event::Cancel => json!("requested"),
        Event::Settle(_) if to == Status::Cancelled && before.row["cancel_requested_at"].is_string() => {
            json!("requested")
        }
        Event::Release if to == Status::Cancelled => json!("requested"),
        _ => Value::Null,
    };
    assert_eq!(row["reason"], reason, "{case}");

    let (event_row, earlier) = after.events.split_last().unwrap();
    assert_eq!(earlier, before.events, "{case}: not exactly one event");
    let (name_before, name_after) = (json!(from.as_str()), json!(to.as_str()));
    assert_eq!((&event_row["from_status"], &event_row["to_status"]), (&name_before, &name_after), "{case}");
    assert_eq!((&event_row["fence"], &event_row["attempt"]), (&row["fence"], &row["attempt"]), "{case}");
    let actor = match event {
        Event::Expire => "reaper",
        Event::Cancel | Event::ForceRelease => "singletrack",
        _ => "test",
    };
    assert_eq!(event_row["actor"], actor, "{case}");
    assert_attempt(case, before, after, (from, event, to));
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
    assert_eq!(attempt["status"], if released { "released" } else { to.as_str() }, "{case}");
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
