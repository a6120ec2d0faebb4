//! What commands print, through the whole service.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use singletrack::config::Settings;
use singletrack::domain::Status;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::process::{Process, SHORT_LEASE};
use crate::support::replica::{Client, Replica, short_lease};

/// Runs `script` once; the run when it is final.
async fn run(client: &Client, script: &str) -> (Uuid, serde_json::Value) {
    client.define("w", script).await;
    let id = client.enqueue("w").await.run_id();
    (id, client.finished(id).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_output_is_cut_and_the_command_goes_on_in_bounded_memory() {
    let test = TestDb::new().await;
    let replica = Process::serve(&test.url, &[SHORT_LEASE, &[("SINGLETRACK_LOG_BYTES", "50000")]].concat());
    // 100 MiB without one newline, then 100 MiB of lines.
    let script =
        "head -c 104857600 /dev/zero | tr '\\0' x; echo; yes flooding | head -c 104857600; echo; echo '{\"done\": 1}'";
    // The program itself, with all that a debug build maps, is not what is measured.
    run(&replica.client, "echo 1; echo '{}'").await;
    let before = replica.peak_memory();
    let (id, run) = run(&replica.client, script).await;
    assert_eq!((&run["status"], &run["output"]), (&json!("succeeded"), &json!({"done": 1})), "{run}");

    let log = replica.client.log(id).await;
    assert!(log.ends_with("log truncated after 50000 bytes\n"), "{}", &log[log.len() - 100..]);
    assert_eq!(log.len(), 50_000 + "log truncated after 50000 bytes\n".len());
    let more = replica.peak_memory() - before;
    eprintln!("memory of the replica: {before} MiB, {more} MiB more for a flood");
    assert!(more < 32, "{before} MiB, and {more} MiB more");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_text_are_replaced_in_log_output_and_error() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let script =
        r#"printf 'nul:\000 bad:\377\376 cut:\303\n'; printf '{"a\\u0000b": "c\\u0000d", "e": "\000f\377"}\n'"#;
    let (id, run) = run(&replica.client, script).await;
    assert_eq!(run["status"], "succeeded", "{run}");
    assert_eq!(run["output"], json!({"a\u{fffd}b": "c\u{fffd}d", "e": "\u{fffd}f\u{fffd}"}));
    let log = replica.client.log(id).await;
    assert!(log.starts_with("nul:\u{fffd} bad:\u{fffd}\u{fffd} cut:\u{fffd}\n"), "{log:?}");
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_object_in_the_last_line_of_standard_output_is_the_output() {
    let test = TestDb::new().await;
    let replica = Replica::with(&test, Settings { output_bytes: Some("40".into()), ..short_lease() }).await;
    let client = &replica.client;
    for (script, output) in [
        (r#"echo '{"a": 1}'; echo '{"b": 2}'"#, json!({"b": 2})),
        (r#"echo '{"a": 1}'; echo; echo '  '"#, json!({"a": 1})),
        (r#"printf '{"a": 1}'"#, json!({"a": 1})),
        (r#"echo '{"a": 1}'; echo done"#, json!(null)),
        (r#"echo '{"a": 1}' >&2"#, json!(null)),
        (r#"echo '[1]'"#, json!(null)),
        (r#"echo '{"a": "0123456789012345678901234567890123456789"}'"#, json!(null)),
    ] {
        let (_, run) = run(client, script).await;
        assert_eq!((&run["status"], &run["output"]), (&json!("succeeded"), &output), "{script}");
    }
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_as_deep_as_it_may_be_is_kept_and_read_again() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    // What is deeper is no JSON to us; as part of a run and of a list it stands a few levels deeper still.
    for depth in [120, 127] {
        let output = format!("{{\"deep\":{}{}}}", "[".repeat(depth - 1), "]".repeat(depth - 1));
        client.define("w", &format!("echo '{output}'")).await;
        let id = client.enqueue("w").await.run_id();
        crate::support::eventually("it has succeeded", Duration::from_secs(30), || async {
            (plant::status(&test.sql, id).await == Status::Succeeded).then_some(())
        })
        .await;
        for path in [format!("/api/v1/runs/{id}"), "/api/v1/runs?limit=1".into()] {
            let answer = client.request(Method::GET, &path).send().await.unwrap();
            let (status, text) = (answer.status(), answer.text().await.unwrap());
            let as_it_was = text.replace(' ', "").contains(&format!("\"output\":{output}"));
            assert!(status == 200 && as_it_was, "{depth}, {path}: {status} {text}");
        }
        let shown = client.get(&format!("/api/script-run/{id}")).await;
        assert_eq!((shown.status, &shown.body["status"]), (200, &json!("succeeded")), "{shown:?}");
        assert_eq!(shown.body["result"].as_str().unwrap().replace(' ', ""), output);
    }
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_keeps_the_order_in_which_both_streams_came() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    // Between the streams only what arrives apart has an order.
    let script = "for i in 1 2 3 4 5; do echo out $i; sleep 0.15; echo err $i >&2; sleep 0.15; done";
    let (id, _) = run(&replica.client, script).await;
    let page = replica.client.get(&format!("/api/v1/runs/{id}/logs")).await.body;
    let entries = page["items"].as_array().unwrap();
    let seen: Vec<_> = entries.iter().map(|e| (e["stream"].as_str().unwrap(), e["text"].as_str().unwrap())).collect();
    let texts: Vec<String> = (1..=5).flat_map(|i| [format!("out {i}\n"), format!("err {i}\n")]).collect();
    let expected: Vec<_> = ["stdout", "stderr"].into_iter().cycle().zip(texts.iter().map(String::as_str)).collect();
    assert_eq!(seen, expected);
    let seqs: Vec<i64> = entries.iter().map(|entry| entry["seq"].as_i64().unwrap()).collect();
    assert_eq!(seqs, (0..10).collect::<Vec<_>>());
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_run_can_be_read_while_it_runs() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let scratch = crate::support::scratch::Scratch::new();
    let script = "echo first; printf unfinished; until [ -e release ]; do sleep 0.05; done; echo last";
    scratch.define(&replica.client, "w", script).await;
    let id = replica.client.enqueue("w").await.run_id();
    crate::support::eventually("its beginning is there", Duration::from_secs(10), || async {
        (replica.client.log(id).await == "first\nunfinished").then_some(())
    })
    .await;
    assert_eq!(replica.client.get(&format!("/api/v1/runs/{id}")).await.body["status"], "running");
    scratch.touch("release");
    replica.client.finished(id).await;
    assert_eq!(replica.client.log(id).await, "first\nunfinishedlast\n");
    replica.finish().await;
    test.check().await;
}
