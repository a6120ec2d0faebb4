//! One run as it goes on: its events and its log as streams that end with it.

use serde_json::json;
use singletrack::domain::{LogChunk, Status, Stream as Kind};
use singletrack::store::logs::{self, Bound, Piece};

use crate::support::calls::{self, settle_one};
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Answer, Replica};
use crate::support::sse::{Event, Stream};

use reqwest::Method;
use singletrack::domain::Verdict;

fn texts(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.data["text"].as_str().unwrap_or(&event.name)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_events_of_a_run_are_told_from_the_first_to_the_last() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    let gate = tempfile::tempdir().unwrap();
    let open = gate.path().join("open");
    client.define("w", &format!("while [ ! -e {} ]; do sleep 0.05; done", open.display())).await;
    let run_id = client.enqueue("w").await.run_id();
    let path = format!("/api/v1/runs/{run_id}/events");
    let mut stream = Stream::open(client, &format!("{path}?follow=true"), None).await;
    let begun = stream.some(2).await;
    assert_eq!(begun[1].data["to"], "running");
    std::fs::write(&open, "").unwrap();
    let ended = stream.rest().await;
    assert_eq!(ended.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["status", "end"]);
    assert_eq!(ended[0].data["to"], "succeeded");

    // The same as the list, in the same order.
    let listed = client.get(&path).await.body["items"].as_array().unwrap().clone();
    let told: Vec<_> = begun.iter().chain(&ended[..1]).map(|event| event.data["seq"].clone()).collect();
    assert_eq!(told, listed.iter().map(|event| event["seq"].clone()).collect::<Vec<_>>());

    let back = client.request(Method::GET, &path).header("Accept", "text/event-stream");
    let mut again = Stream::open(client, &format!("{path}?follow=true"), Some(&begun[1].id)).await;
    assert_eq!(again.rest().await, ended);
    // What an EventSource does after the end: it is told to stay away.
    let answer = Answer::of(back.header("Last-Event-ID", &ended[0].id)).await.unwrap();
    assert_eq!(answer.status, 204, "{answer:?}");
    let wrong = client.get(&format!("{path}?follow=true&limit=3")).await;
    assert_eq!(wrong.mistakes(), ["parameter limit"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_followed_as_it_is_printed() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    let gate = tempfile::tempdir().unwrap();
    let open = gate.path().join("open");
    client
        .define(
            "w",
            &format!("echo one; while [ ! -e {} ]; do sleep 0.05; done; echo two; echo three >&2", open.display()),
        )
        .await;
    let run_id = client.enqueue("w").await.run_id();
    let path = format!("/api/v1/runs/{run_id}/logs?follow=true");
    let mut stream = Stream::open(client, &path, None).await;
    let begun = stream.some(1).await;
    assert_eq!(texts(&begun), ["one\n"]);
    std::fs::write(&open, "").unwrap();
    let rest = stream.rest().await;
    assert_eq!(rest.last().unwrap().name, "end");
    assert_eq!(texts(&[begun.clone(), rest[..rest.len() - 1].to_vec()].concat()).concat(), client.log(run_id).await);
    let mut again = Stream::open(client, &path, Some(&begun[0].id)).await;
    assert_eq!(again.rest().await, rest);
    let none = Answer::of(client.request(Method::GET, &path).header("Last-Event-ID", &rest[rest.len() - 2].id)).await;
    assert_eq!(none.unwrap().status, 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_numbered_by_themselves_are_followed_without_a_gap() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let lease = plant::run(&test, "w", Status::Running).await;
    let say = async |seq: i64, stream: Kind, text: &str| {
        let chunk = LogChunk { stream, text: text.to_owned() };
        let bound = Bound { bytes: 1000, pieces: 100 };
        let held = test
            .db
            .with(async |c| logs::append_pieces(c, &[Piece { lease, seq, chunk: chunk.clone() }], bound).await)
            .await
            .unwrap()[0];
        assert!(held);
    };
    let path = format!("/api/v1/runs/{}/logs?follow=true&attempt=1", lease.run_id);
    let mut stream = Stream::open(&replica.client, &path, None).await;
    say(1, Kind::Stdout, "out 1").await;
    say(2, Kind::Stdout, "out 2").await;
    let begun = stream.some(2).await;
    assert_eq!(texts(&begun), ["out 1", "out 2"]);
    say(1, Kind::Stderr, "err 1").await;
    assert_eq!(texts(&stream.some(1).await), ["err 1"], "its number comes before those that were told");
    calls::renew(&test.db, &[lease]).await;
    settle_one(&test.db, lease, Verdict::Succeeded).await;
    assert_eq!(texts(&stream.rest().await), ["end"]);
    let mut again = Stream::open(&replica.client, &path, Some(&begun[1].id)).await;
    assert_eq!(texts(&again.rest().await), ["err 1", "end"]);
    let whole = replica.client.get(&path.replace("follow=true", "follow=false")).await;
    assert_eq!(whole.body["items"].as_array().unwrap().len(), 3);
    assert_eq!(whole.body["next_cursor"], json!(null));
}
