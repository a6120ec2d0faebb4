//! What Prometheus is told.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::database::TestDb;
use crate::support::replica::Replica;
use crate::support::{eventually, skipped};

/// Runs promtool over `input`; what it has to say, nothing if all is well.
fn promtool(arguments: &[&str], input: &str) -> Option<String> {
    let promtool = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = promtool else {
        skipped("promtool is not installed (Debian: apt install prometheus)");
        return None;
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    Some(format!("{}{}", if output.status.success() { "" } else { "failed: " }, String::from_utf8_lossy(&said)))
}

/// The value of a line.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_can_be_read_as_promtool_wants_it() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    client.define("quick", "true").await;
    client.define("long", "sleep 60").await;
    let quick = client.enqueue("quick").await.run_id();
    assert_eq!(client.finished(quick).await["status"], "succeeded");
    let long = client.enqueue("long").await;
    assert_eq!(client.enqueue("long").await.status, 409);
    let metrics = || async {
        let answer = reqwest::get(format!("{}/metrics", client.base)).await.unwrap();
        assert_eq!(answer.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
        answer.text().await.unwrap()
    };
    // Other tests count in the same process: at least as much as was done here.
    let text = eventually("what the database says is asked for again", std::time::Duration::from_secs(30), || async {
        let text = metrics().await;
        (value(&text, r#"singletrack_runs{status="running"}"#) == Some(1.0)).then_some(text)
    })
    .await;
    for series in [
        r#"singletrack_enqueues_total{answer="accepted"}"#,
        r#"singletrack_enqueues_total{answer="slot_taken"}"#,
        r#"singletrack_attempts_total{outcome="succeeded"}"#,
        r#"singletrack_runs_ended_total{status="succeeded"}"#,
        r#"singletrack_claims_total{executor="command"}"#,
        "singletrack_attempt_duration_seconds_count",
        "singletrack_run_waiting_seconds_count",
        r#"singletrack_statement_entries_count{kind="enqueues"}"#,
        r#"singletrack_statement_entries_count{kind="ends"}"#,
        r#"singletrack_http_request_duration_seconds_count{method="POST",route="/api/v1/workflows/{id}/runs",status="409"}"#,
        "singletrack_database_up",
    ] {
        assert!(value(&text, series) >= Some(1.0), "{series} in {text}");
    }
    assert!(!text.contains("quick"), "no workflow is a label: {text}");
    assert!(client.post(&format!("/api/v1/runs/{}/cancel", long.run_id()), json!({})).await.status < 300);
    replica.finish().await;
    if let Some(said) = promtool(&["check", "metrics"], &text) {
        assert_eq!(said, "");
    }
}

#[test]
fn rules_and_dashboard_speak_of_metrics_that_there_are() {
    let known = include_str!("../../src/metrics.rs");
    let (rules, dashboard) = (include_str!("../../deploy/alerts.yaml"), include_str!("../../deploy/grafana.json"));
    let mut names = BTreeSet::new();
    for text in [rules, dashboard] {
        for (at, _) in text.match_indices("singletrack_") {
            let name: String = text[at + 12..].chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            names.insert(name);
        }
    }
    assert!(names.len() > 10, "{names:?}");
    for name in names {
        let name = name.strip_suffix("_bucket").unwrap_or(&name);
        assert!(known.contains(&format!("\"{name}\"")), "singletrack_{name} is not counted");
    }
    serde_json::from_str::<serde_json::Value>(dashboard).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/alerts.yaml");
    if let Some(said) = promtool(&["check", "rules", path], "") {
        assert!(said.contains("SUCCESS: 7 rules found"), "{said}");
    }
}
