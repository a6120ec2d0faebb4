//! What Prometheus is told.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::json;
use singletrack::domain::Status;

use crate::support::database::TestDb;
use crate::support::replica::Replica;
use crate::support::{eventually, plant, skipped};

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

async fn text(replica: &Replica) -> String {
    reqwest::get(format!("{}/metrics", replica.client.base)).await.unwrap().text().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_alerts_look_at_is_there_before_it_happens() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let text = text(&replica).await;
    let ended = Status::ALL.into_iter().filter(|status| status.is_final());
    let ended = ended.map(|status| format!("runs_ended_total{{status=\"{}\"}}", status.as_str()));
    let others = [
        r#"reaped_total{cause="worker_lost"}"#,
        r#"reaped_total{cause="unkillable"}"#,
        r#"promoted_total{kind="stranded"}"#,
        r#"enqueues_total{answer="unavailable"}"#,
        r#"enqueues_total{answer="unknown"}"#,
        concat!(r#"build_info{version=""#, env!("CARGO_PKG_VERSION"), r#""}"#),
    ];
    for series in ended.chain(others.map(str::to_owned)) {
        assert!(value(&text, &format!("singletrack_{series}")).is_some(), "{series} in {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_that_end_before_they_start_are_counted_too() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let ended = async |status: &str| {
        value(&text(&replica).await, &format!("singletrack_runs_ended_total{{status=\"{status}\"}}")).unwrap()
    };
    let before = [ended("cancelled").await, ended("skipped").await];
    let queued = plant::run(&test, "w", Status::Queued).await.run_id;
    let path = "/api/v1/workflows/w/runs";
    let later = client.post(path, json!({"on_conflict": "reject", "delay_seconds": 600})).await.run_id();
    sqlx::query("update test_runs set run_at = now(), version = version + 1 where status = 'scheduled'")
        .execute(&test.sql)
        .await
        .unwrap();
    assert_eq!(client.finished(later).await["status"], "skipped");
    assert_eq!(client.post(&format!("/api/v1/runs/{queued}/cancel"), json!({})).await.body["status"], "cancelled");
    let expired = plant::run(&test, "x", Status::Queued).await.run_id;
    sqlx::query("update test_runs set available_at = now() - interval '1 day', version = version + 1 where id = $1")
        .bind(expired)
        .execute(&test.sql)
        .await
        .unwrap();
    assert_eq!(client.finished(expired).await["status"], "skipped");
    assert!(ended("cancelled").await >= before[0] + 1.0);
    assert!(ended("skipped").await >= before[1] + 2.0);
}

#[test]
fn alerts_see_the_first_incident_and_are_silent_without_one() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/alerts.yaml");
    if let Some(said) = promtool(&["test", "rules", path], "") {
        assert!(said.contains("SUCCESS") && !said.starts_with("failed"), "{said}");
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
