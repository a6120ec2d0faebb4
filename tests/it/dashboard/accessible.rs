//! What axe-core, the usual checker of accessibility, finds on each screen: nothing that is serious.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

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
