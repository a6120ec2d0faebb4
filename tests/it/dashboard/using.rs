//! What one does with the dashboard, and what it says while nothing happens.

use serde_json::{Value, json};
use singletrack::domain::Status;
use uuid::Uuid;

use super::browser::Browser;
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::Replica;

const ENTER: &str = "\u{e007}";

#[tokio::test(flavor = "multi_thread")]
async fn ages_are_true_while_nothing_happens() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    replica.client.define_pull("w", json!({"heartbeat_timeout_seconds": 3600})).await;
    let (_, token) = replica.client.working_on("w").await;
    replica.client.say_one("heartbeat", &token, json!({})).await;
    let Some(page) = Browser::open(&replica.client.base).await else { return };
    let lease = "document.querySelector('[data-key=w] .lease')";
    page.until(lease).await;
    let first = page.run(&format!("return {lease}.title")).await;
    page.until(&format!("{lease}.title !== {first}")).await;
    let width = page.run(&format!("return {lease}.firstChild.style.width")).await;
    assert_eq!(width, "100%", "of an hour that it may be silent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_does_not_start_says_of_its_slot_what_the_list_of_slots_says() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    replica.client.define("w", "true").await;
    let queued = replica.client.enqueue("w").await.run_id();
    let waiting = replica.client.post("/api/v1/workflows/w/runs", json!({"on_conflict": "wait"})).await.run_id();
    let Some(page) = Browser::open(&format!("{}/#/runs/{queued}", replica.client.base)).await else { return };
    page.sees("No worker takes it.").await;
    page.sees("1 run waits").await;
    page.go(&format!("#/runs/{waiting}")).await;
    page.sees("It waits for the slot.").await;
    page.sees("no worker that would take it has been seen").await;
    page.click(&format!(".why a[href$='{queued}']")).await;
    page.sees("No worker takes it.").await;
    page.go("#/").await;
    page.click("[data-name=explain]").await;
    page.until("document.querySelector('.would').innerText.includes('no worker that would take it has been seen')")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_lead_from_screen_to_screen_and_from_row_to_row() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    for id in ["a", "b", "c"] {
        replica.client.define(id, "true").await;
    }
    let Some(page) = Browser::open(&replica.client.base).await else { return };
    page.until("document.querySelectorAll('[data-row]').length === 3").await;
    for (key, hash) in [("r", "#/runs"), ("w", "#/workers"), ("y", "#/system"), ("s", "#/")] {
        page.press(&format!("g{key}")).await;
        page.until(&format!("location.hash === '{hash}'")).await;
    }
    page.until("document.querySelectorAll('[data-row]').length === 3").await;
    page.press("jjk").await;
    page.until("document.activeElement.innerText === 'a'").await;
    page.press("j").await;
    page.press(ENTER).await;
    page.until("location.hash === '#/workflows/b'").await;
    page.press("gs").await;
    page.until("document.querySelectorAll('[data-row]').length === 3").await;
    page.press("/c").await;
    page.until("document.querySelectorAll('[data-row]').length === 1 && location.hash.endsWith('q=c')").await;
    page.run("document.activeElement.blur()").await;
    page.press("?").await;
    page.until("document.querySelector('dialog[open] .shortcuts')").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_runs_are_cancelled_and_run_again_after_a_look_at_how_many() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    for _ in 0..3 {
        plant::run(&test, "w", Status::Waiting).await;
    }
    plant::run(&test, "other", Status::Queued).await;
    let hash = "/#/runs?workflow_id=w";
    let Some(page) = Browser::open(&format!("{}{hash}", replica.client.base)).await else { return };
    page.until("document.querySelector('[data-name=cancel-all]')?.innerText === 'Cancel 3…'").await;
    page.click("[data-name=cancel-all]").await;
    page.sees("3 runs: all that are not over, workflow w.").await;
    page.click("dialog [data-name=confirm]").await;
    page.sees("3 cancelled").await;
    page.until("document.querySelectorAll('.table .s-cancelled').length === 3").await;
    page.click("[data-name=rerun-all]").await;
    page.sees("Run again (3)").await;
    page.click("dialog footer .button").await;
    let counts = replica.client.get("/api/v1/runs/counts").await.body;
    assert_eq!(
        (&counts["cancelled"], &counts["queued"]),
        (&json!(3), &json!(1)),
        "nothing was run again, nothing else ended"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_workflow_says_who_paused_it_and_why_until_it_is_resumed() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    replica.client.define("w", "true").await;
    let Some(page) = Browser::open(&format!("{}/#/workflows/w", replica.client.base)).await else { return };
    page.click("[data-name=pause]").await;
    page.fill("dialog input", "the disk is full").await;
    page.click("dialog [data-name=confirm]").await;
    page.sees(": the disk is full").await;
    page.click("[data-name=run]").await;
    page.sees("w is paused").await;
    page.click("dialog footer .button").await;
    page.click("[data-name=resume]").await;
    page.until("document.querySelector('[data-name=pause]')").await;
    page.click("[data-name=run]").await;
    page.until("document.querySelector('h1 .s-succeeded')").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_given_an_input_and_its_log_has_the_colours_that_it_prints() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    replica.client.define("w", r"printf '\033[31mred\033[0m plain\n'").await;
    let Some(page) = Browser::open(&format!("{}/#/workflows/w", replica.client.base)).await else { return };
    page.click("[data-name=run-input]").await;
    page.fill("dialog textarea", "{").await;
    page.click("dialog .primary").await;
    page.sees("That is not JSON").await;
    page.fill("dialog textarea", r#"{"ref": "v1"}"#).await;
    page.click("dialog .primary").await;
    page.until("document.querySelector('h1 .s-succeeded')").await;
    page.until("document.querySelector('.line .t-f1')?.innerText === 'red'").await;
    page.until("document.querySelector('.line').innerText.endsWith('red plain')").await;
    let run: Uuid = page.run("return location.hash.split('/').pop()").await.as_str().unwrap().parse().unwrap();
    let input: Value = replica.client.get(&format!("/api/v1/runs/{run}")).await.body["input"].clone();
    assert_eq!(input, json!({"ref": "v1"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_never_ran_uses_its_definition_and_is_paused_by_itself() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    replica.client.define("w", "true").await;
    let Some(page) = Browser::open(&format!("{}/#/workflows/w@one", replica.client.base)).await else { return };
    page.sees("No run yet").await;
    page.click("[data-name=pause]").await;
    page.click("dialog [data-name=confirm]").await;
    page.sees("Paused by").await;
    assert_eq!(replica.client.enqueue("w").await.status, 202, "the definition is not");
    assert_eq!(replica.client.enqueue("w@one").await.status, 409);
    page.click("[data-name=resume]").await;
    page.click("[data-name=first]").await;
    page.until("document.querySelector('h1 .s-succeeded') && document.querySelector('h1').innerText.includes('w@one')")
        .await;
    page.go("#/workflows/nothing").await;
    page.sees("There is no such workflow").await;
}
