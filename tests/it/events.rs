//! The stream of all events: each one once, in order, to whoever listens, and to whoever comes back.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;
use singletrack::domain::Status;
use singletrack::engine::retention::Keeper;
use singletrack::store::retention::Ages;
use tokio::time::timeout;
use uuid::Uuid;

use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::replica::{Client, Replica};
use crate::support::sse::{Event, Stream};

const ALL: &str = "/api/v1/events";

/// What happened to which workflow.
fn changes(events: &[Event]) -> Vec<String> {
    let text = |event: &Event, name: &str| event.data[name].as_str().unwrap_or("-").to_owned();
    events.iter().map(|event| ["workflow_id", "from", "to"].map(|name| text(event, name)).join(" ")).collect()
}

async fn enqueue(client: &Client, ids: &[&str]) {
    for id in ids {
        assert_eq!(client.enqueue(id).await.status, 202);
    }
}

async fn defined(test: &TestDb, ids: &[&str]) {
    for id in ids {
        plant::workflow(&test.sql, id, &["true"]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_tells_all_of_a_change_and_a_request_to_cancel() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    let gate = tempfile::tempdir().unwrap();
    client.define("w", &format!("while [ ! -e {} ]; do sleep 0.05; done", gate.path().join("open").display())).await;
    let mut stream = Stream::begun(client, ALL).await;
    let run_id = client.enqueue("w@a").await.run_id();
    let begun = stream.some(2).await;
    assert_eq!(changes(&begun), ["w@a - queued", "w@a queued running"]);
    client.post(&format!("/api/v1/runs/{run_id}/cancel"), json!({})).await;
    let ended = stream.some(2).await;
    assert_eq!(changes(&ended), ["w@a running running", "w@a running cancelled"]);
    let names: Vec<&str> = begun.iter().chain(&ended).map(|event| event.name.as_str()).collect();
    assert_eq!(names, ["status", "status", "cancel_requested", "status"]);

    let mut known = client.get(&format!("/api/v1/runs/{run_id}/events")).await.body["items"][1].clone();
    for (told, name) in [("from", "from_status"), ("to", "to_status")] {
        known[told] = known.as_object_mut().unwrap().remove(name).unwrap();
    }
    for (name, value) in [
        ("run_id", json!(run_id)),
        ("workflow_id", json!("w@a")),
        ("definition", json!("w")),
        ("queue", json!("default")),
    ] {
        known[name] = value;
    }
    assert_eq!(begun[1].data, known);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_committed_late_is_neither_lost_nor_doubled() {
    let test = TestDb::new().await;
    defined(&test, &["early", "late", "later"]).await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let mut stream = Stream::begun(client, ALL).await;
    let begin = stream.last_id.clone();

    // It has its number, and is not to be seen yet.
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("select enqueue_run('early')").execute(&mut *open).await.unwrap();
    enqueue(client, &["late"]).await;
    let mut other = Stream::open(client, ALL, Some(&begin)).await;
    for stream in [&mut stream, &mut other] {
        let told = timeout(Duration::from_secs(1), stream.next()).await;
        assert_eq!(told.ok(), None, "who has seen this would not come back for the one before it");
    }
    open.commit().await.unwrap();
    enqueue(client, &["later"]).await;

    let told = stream.some(3).await;
    assert_eq!(changes(&told), ["early - queued", "late - queued", "later - queued"]);
    let numbers: Vec<i64> = told.iter().map(|event| event.data["seq"].as_i64().unwrap()).collect();
    assert!(numbers.is_sorted(), "{numbers:?}");
    assert_eq!(other.some(3).await, told);
    for seen in 0..3 {
        let mut back = Stream::open(client, ALL, Some(&told[seen].id)).await;
        assert_eq!(back.some(2 - seen).await, told[seen + 1..]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_to_any_replica_gets_what_happened_since_and_nothing_twice() {
    let test = TestDb::new().await;
    let ids: Vec<String> = (0..1200).map(|n| format!("w{n}")).collect();
    defined(&test, &["definition"]).await;
    let [one, other] = [Replica::api_only(&test).await, Replica::api_only(&test).await];
    let mut stream = Stream::begun(&one.client, ALL).await;
    // More than is read at once.
    for ids in ids.chunks(400) {
        let runs: Vec<_> = ids.iter().map(|id| json!({"workflow_id": format!("definition@{id}")})).collect();
        assert_eq!(one.client.post("/api/v1/runs/batch", json!({"runs": runs})).await.status, 200);
    }
    let all = stream.some(1200).await;
    let mut workflows: Vec<_> = all.iter().map(|event| event.data["workflow_id"].as_str().unwrap()).collect();
    workflows.sort_unstable();
    workflows.dedup();
    assert_eq!(workflows.len(), 1200);
    for seen in [0, 1, 613, 1198] {
        let mut back = Stream::open(&other.client, ALL, Some(&all[seen].id)).await;
        assert!(back.some(1199 - seen).await == all[seen + 1..], "after {seen}");
        let mut back = Stream::open(&other.client, &format!("{ALL}?last_event_id={}", all[seen].id), None).await;
        assert_eq!(back.next().await.as_ref(), all.get(seen + 1), "after {seen}");
    }
    // The first request of an EventSource has the parameter, and so have all later ones, with the header.
    let mut back =
        Stream::open(&other.client, &format!("{ALL}?last_event_id={}", all[7].id), Some(&all[1198].id)).await;
    assert_eq!(back.next().await.as_ref(), all.last());
    let wrong = one.client.get(&format!("{ALL}?last_event_id=yesterday")).await;
    assert_eq!(wrong.mistakes(), ["parameter last_event_id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_gets_what_it_asked_for() {
    let test = TestDb::new().await;
    defined(&test, &["a", "b"]).await;
    sqlx::query("update workflow_revisions set queue = 'slow' where workflow_id = 'b'")
        .execute(&test.sql)
        .await
        .unwrap();
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let wanted = [
        ("workflow_id=a", vec!["a - queued", "a queued cancelled"]),
        ("definition=a", vec!["a - queued", "a@x - queued", "a queued cancelled"]),
        ("queue=slow", vec!["b - queued"]),
        ("status=cancelled,failed", vec!["a queued cancelled"]),
        ("definition=a&status=queued", vec!["a - queued", "a@x - queued"]),
    ];
    let mut streams = Vec::new();
    for (filter, _) in &wanted {
        streams.push(Stream::begun(client, &format!("{ALL}?{filter}")).await);
    }
    let begin = streams[0].last_id.clone();
    let run_id = client.enqueue("a").await.run_id();
    enqueue(client, &["a@x", "b"]).await;
    assert_eq!(client.post(&format!("/api/v1/runs/{run_id}/cancel"), json!({})).await.status, 200);
    for ((filter, expected), stream) in wanted.iter().zip(&mut streams) {
        assert_eq!(changes(&stream.some(expected.len()).await), *expected, "{filter}");
        let mut back = Stream::open(client, &format!("{ALL}?{filter}"), Some(&begin)).await;
        assert_eq!(changes(&back.some(expected.len()).await), *expected, "{filter}, later");
    }
    assert_eq!(client.get(&format!("{ALL}?status=done")).await.mistakes(), ["parameter status"]);
    assert_eq!(client.get(&format!("{ALL}?label=a=b")).await.mistakes(), ["parameter label"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_missed_what_is_not_kept_is_told_so() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let begin = Stream::begun(client, ALL).await.last_id;
    let [live, _over] =
        [plant::run(&test, "live", Status::Queued).await, plant::run(&test, "over", Status::Succeeded).await];
    let mut stream = Stream::open(client, ALL, Some(&begin)).await;
    let seen = stream.some(2).await;
    assert_eq!(changes(&seen), ["live - queued", "over - succeeded"]);

    let ages = Ages { run: Duration::ZERO, key: Duration::ZERO };
    let deleted = eventually("what is over is deleted", LIMIT, async || {
        let report = Keeper::new(test.db.clone(), ages).pass().await.unwrap();
        (!report.runs.is_empty()).then_some(report.runs)
    })
    .await;
    assert!(!deleted.contains(&live.run_id));
    defined(&test, &["next"]).await;
    for lost in [begin.as_str(), &seen[0].id, "999999999999-1"] {
        let mut back = Stream::open(client, ALL, Some(lost)).await;
        let reset = back.next().await.unwrap();
        assert_eq!((reset.name.as_str(), reset.data["detail"].is_string()), ("reset", true), "{lost}");
        let workflow = format!("next@{}", Uuid::new_v4());
        enqueue(client, &[&workflow]).await;
        assert_eq!(changes(&back.some(1).await), [format!("{workflow} - queued")], "it goes on");
        let mut again = Stream::open(client, ALL, Some(&reset.id)).await;
        assert_eq!(changes(&again.some(1).await), [format!("{workflow} - queued")]);
    }
    // Who has seen the last one that was deleted has missed nothing.
    let mut back = Stream::open(client, ALL, Some(&seen[1].id)).await;
    assert_eq!(back.next().await.unwrap().name, "status");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_does_not_read_is_dropped_and_may_come_back() {
    let test = TestDb::new().await;
    let lease = plant::run(&test, "w", Status::Queued).await;
    let replica = Replica::api_only(&test).await;
    let mut stream = Stream::begun(&replica.client, ALL).await;
    let mut quick = Stream::begun(&replica.client, ALL).await;
    // From here on they are told, and need not read for themselves what they may have missed while they came.
    plant::run(&test, "first", Status::Queued).await;
    assert_eq!(stream.some(1).await, quick.some(1).await);
    // Transactions that write no events move the position on, and nobody has missed anything by that.
    let moved: DateTime<Utc> =
        sqlx::query_scalar("select clock_timestamp() from pg_current_xact_id()").fetch_one(&test.sql).await.unwrap();
    let looks = "select 1 from pg_stat_activity
                 where datname = current_database() and query like '%page as materialized%' and query_start > $1";
    eventually("the replica has looked", LIMIT, async || {
        sqlx::query(looks).bind(moved).fetch_optional(&test.sql).await.unwrap().map(drop)
    })
    .await;
    // More than sockets and backlog hold.
    sqlx::query(
        "insert into run_events (run_id, to_status, attempt, fence, actor, reason)
         select $1, 'queued', 0, 0, 'test', repeat('x', 1000) from generate_series(1, 60000)",
    )
    .bind(lease.run_id)
    .execute(&test.sql)
    .await
    .unwrap();
    // This one reads, and yet a busy machine may have it dropped too: then it comes back.
    let mut all = Vec::new();
    while all.len() < 60_000 {
        match quick.next().await.unwrap() {
            event if event.name == "dropped" => quick = Stream::open(&replica.client, ALL, Some(&event.id)).await,
            event => all.push(event),
        }
    }
    // It may also have read from the database what is yet to be said to those who listen: that must be over as well.
    let mut late = Stream::begun(&replica.client, ALL).await;
    plant::run(&test, "late", Status::Queued).await;
    late.some(1).await;
    let told = stream.rest().await;
    let (last, before) = told.split_last().unwrap();
    assert_eq!(last.name, "dropped");
    assert!(!before.is_empty() && before.len() < 60_000 && before == &all[..before.len()], "{}", before.len());
    let mut back = Stream::open(&replica.client, ALL, Some(&last.id)).await;
    assert!(back.some(60_000 - before.len()).await == all[before.len()..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_when_the_replica_stops_and_keep_it_from_nothing() {
    let test = TestDb::new().await;
    let run_id = plant::run(&test, "w", Status::Queued).await.run_id;
    let replica = Replica::api_only(&test).await;
    let mut streams = Vec::new();
    for path in [
        ALL.into(),
        format!("/api/v1/runs/{run_id}/events?follow=true"),
        format!("/api/v1/runs/{run_id}/logs?follow=true"),
    ] {
        streams.push(Stream::open(&replica.client, &path, None).await);
    }
    streams[1].some(1).await;
    timeout(Duration::from_secs(5), replica.finish()).await.expect("streams must not keep it");
    for stream in &mut streams {
        assert_eq!(stream.next().await, None);
    }
}
