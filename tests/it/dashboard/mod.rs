//! The dashboard, as a browser shows it.

mod accessible;
mod browser;
mod pictures;
mod using;

use std::time::Duration;

use serde_json::json;
use singletrack::config::Settings;
use singletrack::domain::Status;

use self::browser::Browser;
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Replica, short_lease};

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_started_watched_and_cancelled_and_a_conflict_is_explained() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    replica.client.define("deploy", "echo going; exec sleep 600").await;
    let Some(page) = Browser::open(&replica.client.base).await else { return };

    page.click("[data-name=run]").await;
    page.until("location.hash.startsWith('#/runs/')").await;
    let first = page.run("return location.hash").await;
    page.until("document.querySelector('h1 .s-running')").await;
    page.until("document.querySelector('.lines').innerText.includes('going')").await;

    // Whoever asks anyway is told who has the slot, and can go there.
    page.go("#/").await;
    page.click("[data-name=explain]").await;
    page.click("[data-name=ask]").await;
    page.sees("409 slot-taken").await;
    page.sees("Running for").await;
    page.click("dialog [data-name=open]").await;
    page.until(&format!("location.hash === {first}")).await;

    page.click("[data-name=cancel]").await;
    page.click("dialog [data-name=confirm]").await;
    page.until("document.querySelector('h1 .s-cancelled')").await;
    // It is free again, and said so without anybody asking.
    page.go("#/").await;
    page.until("document.querySelector('[data-key=deploy] .s-free')").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_elsewhere_is_shown_and_filters_are_in_the_address() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let Some(page) = Browser::open(&replica.client.base).await else { return };
    page.sees("No workflow yet").await;
    for (id, script) in [("good", "true"), ("bad", "exit 1")] {
        replica.client.define(id, script).await;
        let run = replica.client.enqueue(id).await.run_id();
        replica.client.finished(run).await;
    }
    page.until("document.querySelector('[data-key=bad] .bar.s-failed')").await;

    page.go("#/runs").await;
    page.until("document.querySelectorAll('[data-row]').length === 2").await;
    page.run("document.querySelector('.tabs a[href*=failed]').click()").await;
    page.until("location.hash === '#/runs?status=failed' && document.querySelectorAll('[data-row]').length === 1")
        .await;
    page.go("#/runs?workflow_id=good").await;
    page.until("document.querySelectorAll('[data-row]').length === 1 && document.querySelector('.table .s-succeeded')")
        .await;
    page.go("#/runs?workflow_id=good&status=failed").await;
    page.sees("No run is like that.").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_fifty_thousand_lines_does_not_freeze_the_page() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    replica.client.define("talk", "seq 1 50000 | sed 's/^/line /'").await;
    let run = replica.client.enqueue("talk").await.run_id();
    let Some(page) = Browser::open(&format!("{}/#/runs/{run}", replica.client.base)).await else { return };
    // The longest time in which the page could not do anything, in milliseconds.
    page.run("let at = performance.now(); window.stuck = 0; setInterval(() => { const now = performance.now(); stuck = Math.max(stuck, now - at); at = now }, 20)").await;
    page.until("document.querySelector('.lines')?.dataset.lines === '50000'").await;
    page.until("document.querySelector('.lines').innerText.includes('line 50000')").await;
    let elements = page.run("return document.querySelectorAll('.lines .line').length").await.as_u64().unwrap();
    assert!(elements < 300, "{elements} lines are elements");
    page.run("const field = document.querySelector('.log input'); field.value = 'line 31415'; field.dispatchEvent(new Event('input'))").await;
    page.until("document.querySelector('.line.here')?.innerText.includes('line 31415')").await;
    let stuck = page.run("return stuck").await.as_f64().unwrap();
    assert!(stuck < 2000.0, "nothing went on for {stuck} ms");

    page.go(&format!("#/runs/{run}?line=31415")).await;
    page.until("document.querySelector('.line.marked')?.innerText.includes('line 31415')").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_is_shown_as_that_until_it_is_back_and_what_was_read_stays() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    replica.client.define("deploy", "true").await;
    let Some(page) = Browser::open(&replica.client.base).await else { return };
    page.until("document.querySelector('[data-key=deploy]')").await;
    let base = replica.client.base.clone();
    replica.finish().await;
    page.sees("The server does not answer.").await;
    assert_eq!(page.run("return document.querySelector('[data-key=deploy]') !== null").await, true);
    page.click("[data-key=deploy] [data-name=run]").await;
    page.sees("It is not known whether deploy was started").await;
    page.click("dialog .button").await;
    // Changed meanwhile, and seen without anybody reloading the page.
    plant::run(&test, "deploy", Status::Running).await;
    let listen = Some(base.strip_prefix("http://").unwrap().to_owned());
    let _back = Replica::with(&test, Settings { listen, workers: Some("0".into()), ..short_lease() }).await;
    page.until("document.querySelector('[data-key=deploy] .s-running') && !document.querySelector('#banner p')").await;
    page.until("document.querySelector('.liveness.live')").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_keys_are_asked_for_one_signs_in_and_may_what_the_key_may() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    replica.client.define("deploy", "true").await;
    let made = replica.client.post("/api/v1/keys", json!({"name": "looker", "scopes": ["read"]})).await;
    let token = made.body["token"].as_str().unwrap().to_owned();
    // It is read anew within seconds.
    tokio::time::timeout(Duration::from_secs(20), async {
        while replica.client.get("/api/v1/runs").await.status != 401 {}
    })
    .await
    .unwrap();
    let Some(page) = Browser::open(&replica.client.base).await else { return };
    page.sees("This service asks for a key.").await;
    for (key, seen) in [("st_nonsense", "unknown"), (&token, "Run now")] {
        page.fill("dialog input", key).await;
        page.click("dialog .primary").await;
        page.sees(seen).await;
    }
    page.until("document.querySelector('[data-key=deploy] [data-name=run]')?.disabled").await;
    page.go("#/system").await;
    page.sees("does not have the scope admin").await;
}
