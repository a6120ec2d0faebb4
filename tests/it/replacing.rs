//! A run that replaces another starts when that one's process is gone, and not before.

use std::time::Duration;

use serde_json::json;

use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::replica::Replica;
use crate::support::scratch::Scratch;

#[tokio::test(flavor = "multi_thread")]
async fn a_replacing_run_starts_when_the_process_of_the_other_is_gone() {
    let (test, scratch) = (TestDb::new().await, Scratch::new());
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    // It takes its time to stop, and a beginning and an end are seen of each.
    let script = "echo begin >> log; trap 'sleep 0.1; echo end >> log; exit 1' TERM; i=0
                  while [ $i -lt 600 ] && [ ! -e done ]; do sleep 0.05; i=$((i+1)); done; echo end >> log";
    scratch.define_with(client, "w", script, json!({"on_conflict": "replace"})).await;
    let log = || std::fs::read_to_string(scratch.path("log")).unwrap_or_default();
    let first = client.enqueue("w").await;
    assert_eq!(first.status, 202);
    eventually("it runs", Duration::from_secs(20), async || log().contains("begin").then_some(())).await;
    let mut last = first.run_id();
    let mut replaced = Vec::new();
    for _ in 0..3 {
        let next = client.enqueue("w").await;
        assert_eq!(next.status, 202, "{next:?}");
        replaced.push(last);
        last = next.run_id();
    }
    eventually("the last one runs", Duration::from_secs(20), async || {
        (client.get(&format!("/api/v1/runs/{last}")).await.body["status"] == "running").then_some(())
    })
    .await;
    std::fs::write(scratch.path("done"), "").unwrap();
    assert_eq!(client.finished(last).await["status"], "succeeded");
    assert_eq!(client.finished(replaced[0]).await["status"], "cancelled");
    for id in &replaced[1..] {
        let run = client.finished(*id).await;
        let ends = [("skipped", "superseded"), ("cancelled", "superseded"), ("cancelled", "requested")];
        assert!(ends.iter().any(|(status, reason)| run["status"] == *status && run["reason"] == *reason), "{run}");
    }
    let seen: Vec<String> = log().lines().map(str::to_owned).collect();
    let in_turn = seen.iter().enumerate().all(|(n, line)| line == ["begin", "end"][n % 2]);
    assert!(seen.len() >= 4 && in_turn, "never two at once: {seen:?}");
    replica.finish().await;
    test.check().await;
}
