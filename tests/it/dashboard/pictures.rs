//! `make screenshots`: every screen in light and dark, wide and narrow, with no runs, with a few, and with thousands.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use singletrack::domain::Status;

use super::browser::Browser;
use crate::support::database::TestDb;
use crate::support::replica::{Client, Replica};
use crate::support::{eventually, plant};

pub(super) const SCREENS: [(&str, &str); 6] = [
    ("slots", "#/"),
    ("runs", "#/runs"),
    ("run", "#/runs/RUN"),
    ("workflow", "#/workflows/tests"),
    ("workers", "#/workers"),
    ("system", "#/system"),
];

/// The address of a screen; `None` for that of a run where there is none.
pub(super) fn shown(hash: &str, run: Option<&str>) -> Option<String> {
    if hash.contains("RUN") { Some(hash.replace("RUN", run?)) } else { Some(hash.to_owned()) }
}

/// Workflows as people have them, and about `count` runs of them.
pub(super) async fn fill(client: &Client, count: usize) -> Option<String> {
    if count == 0 {
        return None;
    }
    client.define("deploy", "echo going; exec sleep 600").await;
    client.define("tests", "printf '\\033[32mok\\033[0m 41 passed\\n'; echo 'warning: slow' >&2").await;
    client.define("import", "exit 1").await;
    let flaky = json!({"executor": {"type": "command", "argv": ["false"]}, "max_attempts": 3, "backoff": {"initial_seconds": 600}});
    client.put("/api/v1/workflows/flaky", flaky).await;
    let schedule = json!({"cron": "0 3 * * *", "time_zone": "Asia/Tokyo"});
    let report = json!({"executor": {"type": "command", "argv": ["true"]}, "schedule": schedule});
    client.put("/api/v1/workflows/report", report).await;
    client.post("/api/v1/workflows/report/pause", json!({"reason": "the disk is full"})).await;
    client.enqueue("flaky").await;
    for _ in 0..2 {
        client.post("/api/v1/workflows/deploy@prod/runs", json!({"on_conflict": "wait"})).await;
    }
    let mut last = client.enqueue("tests").await.run_id();
    let names: Vec<String> = (0..count.saturating_sub(3)).map(|at| format!("tests@suite-{}", at % 100)).collect();
    for chunk in names.chunks(1000) {
        let runs: Vec<Value> = chunk.iter().map(|id| json!({"workflow_id": id, "on_conflict": "wait"})).collect();
        client.post("/api/v1/runs/batch", json!({"runs": runs})).await;
    }
    client.finished(last).await;
    last = client.enqueue("import").await.run_id();
    client.finished(last).await;
    Some(last.to_string())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes pictures to look at: make screenshots"]
async fn pictures_of_every_screen() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/screenshots");
    std::fs::create_dir_all(&folder).unwrap();
    for count in [0, 3, 5000] {
        let test = TestDb::new().await;
        let replica = Replica::start(&test).await;
        let run = fill(&replica.client, count).await;
        let Some(page) = Browser::open(&replica.client.base).await else { return };
        for theme in ["light", "dark"] {
            page.run(&format!("localStorage.setItem('singletrack.theme', '{theme}'); location.reload()")).await;
            for (size, width, height) in [("wide", 1280, 900), ("narrow", 390, 900)] {
                page.resize(width, height).await;
                for (name, hash) in SCREENS {
                    let Some(hash) = shown(hash, run.as_deref()) else { continue };
                    page.reach(&hash).await;
                    page.picture(&folder.join(format!("{count}-{name}-{theme}-{size}.png"))).await;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes pictures to look at: make screenshots"]
async fn pictures_of_every_state() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/screenshots");
    std::fs::create_dir_all(&folder).unwrap();
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = replica.client.clone();
    fill(&client, 3).await;
    for status in [Status::Scheduled, Status::Cancelled, Status::TimedOut, Status::Stale, Status::Skipped] {
        plant::run(&test, &format!("planted-{}", status.as_str()), status).await;
    }
    let Some(page) = Browser::open(&client.base).await else { return };
    for (theme, size, width) in [("light", "wide", 1280), ("dark", "narrow", 390)] {
        page.run(&format!("localStorage.setItem('singletrack.theme', '{theme}'); location.reload()")).await;
        page.resize(width, 900).await;
        for status in Status::ALL {
            let found = client.get(&format!("/api/v1/runs?limit=1&status={}", status.as_str())).await.body;
            page.reach(&format!("#/runs/{}", found["items"][0]["id"].as_str().unwrap())).await;
            page.until(&format!("document.querySelector('h1 .s-{}')", status.as_str())).await;
            page.picture(&folder.join(format!("state-{}-{theme}-{size}.png", status.as_str()))).await;
        }
        for (name, hash) in [
            ("paused", "#/workflows/report"),
            ("never-ran", "#/workflows/tests@new"),
            ("unknown-workflow", "#/workflows/none"),
            ("unknown-run", "#/runs/00000000-0000-7000-8000-000000000000"),
        ] {
            page.go(&hash.replace("none", "nothing")).await;
            page.until("document.querySelector('main h1, main .trouble') && !document.querySelector('.loading')").await;
            page.picture(&folder.join(format!("state-{name}-{theme}-{size}.png"))).await;
        }
        for (name, id, open) in
            [("taken", "deploy@prod", "[data-name=ask]"), ("refused", "report", "[data-key=report] [data-name=run]")]
        {
            page.reach("#/").await;
            if name == "taken" {
                page.click(&format!("[data-key='{id}'] [data-name=explain]")).await;
            }
            page.click(open).await;
            page.sees("409 ").await;
            page.until("document.querySelector('dialog[open]')").await;
            page.picture(&folder.join(format!("state-409-{name}-{theme}-{size}.png"))).await;
            page.click("dialog footer .button").await;
        }
    }
    client.post("/api/v1/keys", json!({"name": "looker", "scopes": ["read"]})).await;
    page.run("location.reload()").await;
    page.sees("This service asks for a key.").await;
    page.picture(&folder.join("state-signin-dark-narrow.png")).await;
    page.resize(1280, 900).await;
    page.picture(&folder.join("state-signin-dark-wide.png")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes pictures to look at: make screenshots"]
async fn pictures_of_a_dead_server() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/screenshots");
    std::fs::create_dir_all(&folder).unwrap();
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    fill(&replica.client, 3).await;
    let Some(page) = Browser::open(&replica.client.base).await else { return };
    page.reach("#/").await;
    replica.finish().await;
    page.sees("The server does not answer.").await;
    page.picture(&folder.join("state-away.png")).await;
    page.click("[data-name=run]").await;
    page.sees("It is not known").await;
    page.picture(&folder.join("state-away-asked.png")).await;
}

/// Workflows in each state that the first screen can show, with some past.
async fn everyday(client: &Client) {
    client.define("e2e", "sleep 0.$(shuf -i 1-9 -n 1); grep -q fail && exit 1; exit 0").await;
    client.define("import", "sleep 0.$(shuf -i 2-4 -n 1)").await;
    client.define("deploy", "echo going; exec sleep 600").await;
    client.define("migrate", "exec sleep 600").await;
    client.define("nightly-report", "sleep 0.3").await;
    for at in 0..20 {
        for id in ["e2e@shop", "e2e@admin", "import", "nightly-report"] {
            let input = if id == "e2e@admin" && at % 6 == 4 { "fail" } else { "pass" };
            client.post(&format!("/api/v1/workflows/{id}/runs"), json!({"input": input, "on_conflict": "wait"})).await;
        }
    }
    eventually("all of them are over", Duration::from_secs(120), async || {
        let counts = client.get("/api/v1/runs/counts").await.body;
        ["waiting", "queued", "running"].iter().all(|status| counts[status] == 0).then_some(())
    })
    .await;
    for id in ["deploy@prod", "migrate", "migrate", "e2e@shop"] {
        client.post(&format!("/api/v1/workflows/{id}/runs"), json!({"on_conflict": "wait"})).await;
    }
    client.post("/api/v1/workflows/import/pause", json!({"reason": "the disk is full"})).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes the picture of the README: make screenshots"]
async fn pictures_of_the_readme() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    everyday(&replica.client).await;
    let Some(page) = Browser::open(&replica.client.base).await else { return };
    page.resize(1160, 580).await;
    page.until("document.querySelectorAll('[data-key] .s-running').length >= 2").await;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/images/dashboard.png");
    page.picture(&file).await;
    assert!(std::fs::metadata(file).unwrap().len() < 150_000, "too large to be committed");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes pictures to look at: make screenshots"]
async fn pictures_of_the_api() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/screenshots");
    std::fs::create_dir_all(&folder).unwrap();
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let Some(page) = Browser::open(&format!("{}/docs", replica.client.base)).await else { return };
    for (theme, size, width) in [("light", "wide", 1280), ("dark", "wide", 1280), ("dark", "narrow", 390)] {
        page.run(&format!("localStorage.setItem('singletrack.theme', '{theme}'); location.reload()")).await;
        page.resize(width, 1400).await;
        page.sees("Enqueue a run").await;
        page.run("document.getElementById('enqueue_run').scrollIntoView()").await;
        page.picture(&folder.join(format!("docs-{theme}-{size}.png"))).await;
    }
}
