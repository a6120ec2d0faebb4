//! What goes wrong is answered in one form, and each type of it is written down.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::database::TestDb;
use crate::support::replica::{Answer, Replica};

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

/// Every cause that the code names, and its status.
fn causes() -> BTreeMap<String, u16> {
    let source = read("src/api/problem.rs") + &read("src/api/problem/access.rs") + &read("src/api/problem/answer.rs");
    let mut causes = BTreeMap::new();
    for made in source.split("Self::new(").chain(source.split("Problem::new(")).skip(1) {
        let Some(made) = made.trim_start().strip_prefix("StatusCode::") else { continue };
        let (status, rest) = made.split_once(',').unwrap();
        let named = (400..600).filter_map(|code| StatusCode::from_u16(code).ok()).find(|code| {
            let name = code.canonical_reason().unwrap_or_default().to_uppercase().replace([' ', '-'], "_");
            name == status || (name == "UNPROCESSABLE_CONTENT" && status == "UNPROCESSABLE_ENTITY")
        });
        let status = named.unwrap_or_else(|| panic!("{status}")).as_u16();
        causes.insert(rest.split('"').nth(1).unwrap().to_owned(), status);
    }
    assert!(causes.len() >= 28, "{causes:?}");
    causes
}

#[test]
fn every_type_of_problem_is_listed_with_its_status_and_what_to_do() {
    let document = serde_json::to_value(singletrack::api::document()).unwrap();
    let listed = document["components"]["schemas"]["Problem"]["properties"]["type"]["description"].as_str().unwrap();
    let page = read("docs/problems.md");
    let rows: BTreeMap<String, u16> = page
        .lines()
        .filter_map(|line| {
            let cells: Vec<_> = line.strip_prefix("| `")?.split('|').map(str::trim).collect();
            let [cause, status, when, what_to_do, ""] = cells[..] else { panic!("{line}") };
            assert!(!when.is_empty() && !what_to_do.is_empty(), "{line}");
            Some((cause.trim_end_matches('`').to_owned(), status.parse().unwrap()))
        })
        .collect();
    assert_eq!(rows, causes());
    for cause in rows.keys() {
        assert!(listed.contains(&format!("`{cause}`")), "{cause} is not in the OpenAPI document");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_accepts_nothing_that_there_is_gets_406_and_everybody_else_an_answer() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let asked = async |kinds: &[&str]| {
        let request = replica.client.request(Method::GET, "/api/v1/workflows");
        Answer::of(kinds.iter().fold(request, |request, kinds| request.header("Accept", *kinds))).await.unwrap()
    };
    for kinds in [&["text/html"][..], &["application/xml;q=0.9, image/*"], &["text/csv", "image/png"], &[""]] {
        let refused = asked(kinds).await;
        assert_eq!((refused.status, refused.cause()), (406, "not-acceptable"), "{kinds:?}");
    }
    for kinds in [
        &[][..],
        &["*/*"],
        &["Application/JSON"],
        &["text/html, application/xhtml+xml, */*;q=0.8"],
        &["text/html", "application/json;q=0.5"],
        &["application/problem+json"],
    ] {
        assert_eq!(asked(kinds).await.status, 200, "{kinds:?}");
    }
}

/// Every operation that takes a body, with the ids that its path wants.
fn with_bodies() -> Vec<(Method, String)> {
    let document = serde_json::to_value(singletrack::api::document()).unwrap();
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if operation["responses"].get("415").is_some() || operation.get("requestBody").is_some() {
                let id = if path.contains("/runs/{id}") { "019dabcd-0000-7000-8000-000000000000" } else { "deep" };
                found.push((method.to_uppercase().parse().unwrap(), path.replace("{id}", id)));
            }
        }
    }
    assert!(found.len() >= 15, "{found:?}");
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_brackets_are_a_mistake_of_the_sender_at_every_route() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    replica.client.define_pull("deep", json!({})).await;
    let nested = |member: &str, depth: usize| {
        format!(r#"{{"{member}": {}1{}}}"#, r#"{"a": ["#.repeat(depth), "]}".repeat(depth))
    };
    for (method, path) in with_bodies() {
        for body in ["[".repeat(10_000), "{\"a\":".repeat(10_000), nested("input", 5_000), nested("runs", 5_000)] {
            let request = replica.client.request(method.clone(), &path).header("Content-Type", "application/json");
            let refused = Answer::of(request.body(body)).await.unwrap();
            assert!(matches!(refused.status, 400 | 422), "{method} {path}: {refused:?}");
            if path.starts_with("/api/v1/") {
                assert!(
                    matches!(refused.cause(), "malformed-request" | "invalid-request"),
                    "{method} {path}: {refused:?}"
                );
            }
        }
    }
    // What may be nested is kept as it is, to the depth that the reader takes: 127 in all.
    let body = nested("input", 60);
    let request =
        replica.client.request(Method::POST, "/api/v1/workflows/deep/runs").header("Content-Type", "application/json");
    let run = Answer::of(request.body(body.clone())).await.unwrap();
    assert_eq!(run.status, 202, "{run:?}");
    assert_eq!(run.body["input"], serde_json::from_str::<Value>(&body).unwrap()["input"]);
}
