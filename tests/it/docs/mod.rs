//! README.md and docs/*.md say what is so: each of their blocks is run, or says why it is not.
//!
//! The info string of a block has its language, and for these tests:
//!
//! | | |
//! |---|---|
//! | `sh` | runs, in order with the others of its page, against a replica that is put where `localhost:7410` stands |
//! | `sh 409` | one of its requests is refused with that status, and no other is |
//! | `sh endless` | never ends, and prints something |
//! | `console` | commands behind `$ ` and what they print; `UPDATE_SNAPSHOTS=1` records it anew |
//! | `sql` | reads, as `singletrack_reader`, and finds something, unless a comment says `-- empty`; `sql writes` may change things |
//! | `json`, `yaml` | a workflow, or an executor, that the API takes; other JSON is JSON |
//! | `python worker.py` | is that file, for the blocks after it; so with any language |
//! | `rust` | is in `examples/`, which is compiled |
//! | `no-run:REASON` | with any language: is not run |

mod blocks;
mod queries;
mod recorded;
mod terminal;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use self::blocks::{Block, Page, pages, root};
use crate::examples::has;
use crate::support::database::TestDb;
use crate::support::process::{Process, SHORT_LEASE, singletrack};

/// Why blocks are not run, and how many there are at most: each is one that nobody notices when it is wrong.
const NOT_RUN: [(&str, usize); 3] = [
    ("production", 8), // names hosts, files and accounts of somebody's own
    ("minutes", 4),    // takes long, and has a test of its own
    ("form", 8),       // shows a form, with gaps
];

fn fail_if(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{}\n", wrong.join("\n\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_in_the_docs_do_what_is_said_of_them() {
    if !has(&["bash", "curl", "jq", "python3"]) {
        return;
    }
    let mut wrong = Vec::new();
    for page in pages() {
        let (here, text) = terminal::play(&page).await;
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() && text != page.text {
            std::fs::write(&page.path, text).unwrap();
        }
        wrong.extend(here);
    }
    fail_if(wrong);
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_in_the_docs_are_for_a_reader_and_find_something() {
    fail_if(queries::ask(&pages()).await);
}

/// The definition that a block is, where it is one.
fn definition(text: &str) -> Option<Value> {
    let value: Value = serde_json::from_str(text).ok()?;
    match (value.get("executor"), value.get("type").and_then(Value::as_str)) {
        (Some(_), _) => Some(value),
        (None, Some("command" | "http" | "pull" | "handler")) => Some(json!({"executor": value})),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn definitions_in_the_docs_are_taken_and_code_is_that_of_the_examples() {
    let test = TestDb::new().await;
    let replica = Process::serve(&test.url, SHORT_LEASE);
    let examples = std::fs::read_dir(root().join("examples")).unwrap();
    let examples: Vec<String> =
        examples.map(|file| trimmed(&std::fs::read_to_string(file.unwrap().path()).unwrap())).collect();
    let mut wrong = Vec::new();
    for block in pages().iter().flat_map(Page::blocks).filter(|block| block.not_run().is_none()) {
        let said = match block.language.as_str() {
            "json" => match definition(&block.text()) {
                Some(definition) => {
                    let answer = replica.client.put("/api/v1/workflows/of-the-docs", definition).await;
                    (answer.status >= 300).then(|| answer.body.to_string())
                }
                None => serde_json::from_str::<Value>(&block.text()).err().map(|error| error.to_string()),
            },
            "yaml" => apply(&block, &replica.client.base),
            "rust" => {
                let text = trimmed(&block.text());
                (!examples.iter().any(|example| example.contains(&text))).then(|| "is in none of examples/".to_owned())
            }
            "python" => block.file().is_none().then(|| "is no file that a command runs".to_owned()),
            "sh" | "console" | "sql" => None,
            other => Some(format!("nothing runs {other:?}: say no-run and why")),
        };
        wrong.extend(said.map(|why| format!("{}: {why}", block.place)));
    }
    fail_if(wrong);
}

/// Lines without their indentation.
fn trimmed(text: &str) -> String {
    text.lines().map(str::trim).collect::<Vec<_>>().join("\n")
}

/// What `workflows apply` has against a file.
fn apply(block: &Block, url: &str) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("workflows.yaml");
    std::fs::write(&file, block.text()).unwrap();
    let mut command = singletrack(&["workflows", "apply", "--dry-run", "-f"]);
    let output = command.arg(file).env("SINGLETRACK_URL", url).output().unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn blocks_that_are_not_run_say_why_and_are_few() {
    let mut counted: BTreeMap<String, usize> = BTreeMap::new();
    for block in pages().iter().flat_map(Page::blocks) {
        if let Some(why) = block.not_run() {
            assert!(NOT_RUN.iter().any(|(known, _)| *known == why), "{}: {why:?} is no reason", block.place);
            *counted.entry(why.to_owned()).or_default() += 1;
        }
    }
    println!("not run: {counted:?}");
    for (why, most) in NOT_RUN {
        assert!(counted.get(why).is_none_or(|count| *count <= most), "{why}: {counted:?}");
    }
}

#[test]
fn commands_are_in_fenced_blocks_where_they_are_run() {
    for page in pages() {
        let mut before = "";
        for line in page.prose() {
            assert!(!(line.starts_with("    ") && before.is_empty()), "{}: not in a fenced block: {line}", page.name);
            before = line;
        }
    }
}

/// What a heading is called in a link.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn links_in_the_docs_lead_somewhere() {
    for page in pages() {
        let folder = page.path.parent().unwrap();
        for link in page.prose().flat_map(|line| line.split("](").skip(1)).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.path.clone() } else { folder.join(file) };
            assert!(target.exists(), "{}: nothing is at {link}", page.name);
            if !heading.is_empty() {
                let text = std::fs::read_to_string(&target).unwrap();
                let found = text
                    .lines()
                    .filter(|line| line.starts_with('#'))
                    .any(|line| anchor(line.trim_start_matches('#')) == heading);
                assert!(found, "{}: no heading of {link}", page.name);
            }
        }
    }
}
