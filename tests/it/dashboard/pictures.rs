//! `make screenshots`: every screen in light and dark, wide and narrow, with no runs, with a few, and with thousands.

use std::path::Path;

use serde_json::{Value, json};

use super::browser::Browser;
use crate::support::database::TestDb;
use crate::support::replica::{Client, Replica};

const SCREENS: [(&str, &str); 6] = [
    ("slots", "#/"),
    ("runs", "#/runs"),
    ("run", "#/runs/RUN"),
    ("workflow", "#/workflows/tests"),
    ("workers", "#/workers"),
    ("system", "#/system"),
];

/// Workflows as people have them, and about `count` runs of them.
async fn fill(client: &Client, count: usize) -> Option<String> {
    if count == 0 {
        return None;
    }
    client.define("deploy", "echo going; exec sleep 600").await;
    client.define("tests", "printf '\\033[32mok\\033[0m 41 passed\\n'; echo 'warning: slow' >&2").await;
    client.define("import", "exit 1").await;
    client.post("/api/v1/workflows/deploy@prod/runs", json!({})).await;
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
                    let Some(hash) =
                        run.as_ref().map(|id| hash.replace("RUN", id)).or((name != "run").then(|| hash.into()))
                    else {
                        continue;
                    };
                    page.go(&hash).await;
                    page.until("document.querySelector('main h1, main .why') && !document.querySelector('.loading')")
                        .await;
                    page.picture(&folder.join(format!("{count}-{name}-{theme}-{size}.png"))).await;
                }
            }
        }
    }
}
