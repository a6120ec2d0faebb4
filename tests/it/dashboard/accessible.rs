//! What axe-core, the usual checker of accessibility, finds on each screen: nothing that is serious.

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use super::browser::Browser;
use super::pictures::{SCREENS, fill, shown};
use crate::support::database::TestDb;
use crate::support::replica::Replica;
use crate::support::skipped;

const VERSION: &str = "4.14.1";

/// The checker's script, fetched once; `None`, said loudly, where it can't be had. It is larger than all of the dashboard, so it is not
/// in the repository.
fn checker() -> Option<String> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("axe-core-{VERSION}"));
    let script = folder.join("package/axe.min.js");
    if !script.exists() {
        std::fs::create_dir_all(&folder).unwrap();
        let fetch = format!("npm pack --silent axe-core@{VERSION} && tar -xzf axe-core-{VERSION}.tgz");
        let fetched = Command::new("sh").args(["-euc", &fetch]).current_dir(&folder).output().unwrap();
        if !fetched.status.success() {
            skipped(&format!("axe-core can't be fetched with npm: {}", String::from_utf8_lossy(&fetched.stderr)));
            return None;
        }
    }
    Some(std::fs::read_to_string(script).unwrap())
}

/// What is wrong with what is in sight.
async fn findings(page: &Browser, checker: &str, place: &str) -> Vec<String> {
    page.run(&format!("if (!window.axe) {{ {checker} }}")).await;
    // Colours in the middle of a transition are nobody's colours.
    page.until("document.getAnimations().every((one) => one.playState !== 'running' || one.effect.getTiming().iterations === Infinity)")
        .await;
    let found = page.run("return axe.run(document, {resultTypes: ['violations']}).then((all) => all.violations)").await;
    let serious =
        found.as_array().unwrap().iter().filter(|one| one["impact"] == "serious" || one["impact"] == "critical");
    let told = |one: &Value| {
        let node = &one["nodes"][0];
        let many = one["nodes"].as_array().unwrap().len();
        format!(
            "{place}: {}, {many} times: {}\n  {}\n  {}",
            one["id"], one["help"], node["html"], node["any"][0]["message"]
        )
    };
    serious.map(told).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_screen_has_a_serious_fault_of_accessibility() {
    let Some(checker) = checker() else { return };
    let mut wrong = Vec::new();
    for count in [0, 30] {
        let test = TestDb::new().await;
        let replica = Replica::start(&test).await;
        let run = fill(&replica.client, count).await;
        let Some(page) = Browser::open(&replica.client.base).await else { return };
        for theme in ["light", "dark"] {
            page.run(&format!("localStorage.setItem('singletrack.theme', '{theme}'); location.reload()")).await;
            for (size, width) in [("wide", 1280), ("narrow", 390)] {
                page.resize(width, 900).await;
                for (name, hash) in SCREENS {
                    if let Some(hash) = shown(hash, run.as_deref()) {
                        page.reach(&hash).await;
                        let place = format!("{name}, {count} runs, {theme}, {size}");
                        wrong.extend(findings(&page, &checker, &place).await);
                    }
                }
            }
            if count > 0 {
                page.reach("#/").await;
                page.click("[data-name=explain]").await;
                page.click("[data-name=ask]").await;
                page.sees("409 slot-taken").await;
                wrong.extend(findings(&page, &checker, &format!("a 409 explained, {theme}")).await);
            }
        }
    }
    assert!(wrong.is_empty(), "{}\n{} in all", wrong.join("\n"), wrong.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_can_be_read_in_any_light_and_without_a_serious_fault() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let Some(page) = Browser::open(&format!("{}/docs", replica.client.base)).await else { return };
    page.sees("Enqueue a run").await;
    let document = serde_json::to_value(singletrack::api::document()).unwrap();
    let items = document["paths"].as_object().unwrap().values();
    let operations = items.flat_map(|item| item.as_object().unwrap().values());
    let ids: Vec<&str> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    let found = "document.querySelector(`#${id} tr`) && document.querySelector(`#contents a[href='#${id}']`)";
    let missing = page.run(&format!("return {}.filter((id) => !({found}))", json!(ids))).await;
    assert_eq!(missing, json!([]), "of {ids:?}");
    let dangling = "return [...document.querySelectorAll('main a[href^=\"#\"]')].map((a) => a.hash.slice(1)).filter((id) => !document.getElementById(id))";
    assert_eq!(page.run(dangling).await, json!([]), "links to what is not there");
    page.run("const find = document.querySelector('#contents input'); find.value = 'resume'; find.oninput()").await;
    page.until("document.querySelectorAll('#contents a').length === 2").await;
    let Some(checker) = checker() else { return };
    let mut wrong = Vec::new();
    for (theme, width) in [("light", 1280), ("dark", 390)] {
        page.run(&format!("localStorage.setItem('singletrack.theme', '{theme}'); location.reload()")).await;
        page.resize(width, 900).await;
        page.sees("Enqueue a run").await;
        assert_eq!(page.run("return document.documentElement.scrollWidth <= innerWidth").await, true, "{width}");
        wrong.extend(findings(&page, &checker, &format!("docs, {theme}, {width}")).await);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_with_faults_is_found_out() {
    let Some(checker) = checker() else { return };
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let Some(page) = Browser::open(&replica.client.base).await else { return };
    page.reach("#/").await;
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x><p id=pale>pale</p>'); document.querySelector('#pale').style.cssText = 'color:#ccc;background:#fff'").await;
    let wrong = findings(&page, &checker, "slots").await.join("\n");
    assert!(wrong.contains("image-alt") && wrong.contains("color-contrast"), "{wrong}");
}
