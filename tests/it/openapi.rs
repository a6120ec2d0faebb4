//! The OpenAPI document: what it says is looked at on every change, and is what the service does.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use reqwest::Method;
use serde_json::Value;

use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Answer, Replica};

fn document() -> Value {
    serde_json::to_value(singletrack::api::document()).unwrap()
}

/// Every operation, as its method, its path and what is said about it.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            found.push((method.to_uppercase(), path.clone(), operation.clone()));
        }
    }
    assert!(found.len() > 10, "{found:?}");
    found
}

#[test]
fn the_document_changes_on_purpose_only() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/openapi.json");
    let current = format!("{}\n", serde_json::to_string_pretty(&document()).unwrap());
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some_and(|value| value == "1") {
        fs::write(&path, &current).unwrap();
    }
    let stored = fs::read_to_string(&path).unwrap_or_default();
    // Not assert_eq: it would print both documents.
    let first = stored.lines().zip(current.lines()).position(|(stored, current)| stored != current);
    let line = first.unwrap_or(stored.lines().count().min(current.lines().count()));
    assert!(
        stored == current,
        "tests/it/openapi.json differs from line {} on: {:?} is now {:?}. If that is meant, UPDATE_SNAPSHOTS=1 writes it anew.",
        line + 1,
        stored.lines().nth(line),
        current.lines().nth(line),
    );
}

#[test]
fn every_operation_says_what_it_is_and_what_it_needs() {
    let document = document();
    let mut names = BTreeSet::new();
    for (method, path, operation) in operations(&document) {
        let text = |name: &str| operation[name].as_str().unwrap_or_default().to_owned();
        assert!(!text("operationId").is_empty() && names.insert(text("operationId")), "{method} {path}: operationId");
        assert!(!text("summary").is_empty() && !text("summary").ends_with('.'), "{method} {path}: summary");
        assert_eq!(operation["tags"].as_array().map(Vec::len), Some(1), "{method} {path}: tag");
        let schemes = operation["security"].as_array().unwrap();
        assert!(!schemes.is_empty(), "{method} {path}: security");
        let open = ["/livez", "/readyz", "/openapi.json", "/api/v1/leases/finish"].contains(&path.as_str());
        let scope = schemes.iter().find_map(|scheme| scheme.get("api_key")).map(|scopes| scopes[0].as_str().unwrap());
        match scope {
            None => assert!(open, "{method} {path}: it needs a scope"),
            Some(scope) => assert!(["read", "enqueue", "work", "admin"].contains(&scope), "{method} {path}: {scope}"),
        }
        for (status, response) in operation["responses"].as_object().unwrap() {
            let meaning = response["description"].as_str().unwrap_or_default(); // OpenAPI asks for one
            assert!(!meaning.is_empty(), "{method} {path} {status}: description");
        }
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            assert!(parameter["description"].is_string(), "{method} {path}: {parameter}");
        }
    }
}

#[test]
fn every_error_is_documented_as_what_is_answered() {
    let document = document();
    for (method, path, operation) in operations(&document) {
        let responses = operation["responses"].as_object().unwrap();
        let documents = |status: &str| assert!(responses.contains_key(status), "{method} {path}: {status}");
        // A refused Host or Origin, a failure inside.
        ["403", "500"].into_iter().for_each(documents);
        assert!(!responses.contains_key("default"), "{method} {path}: it would document any answer");
        for (status, response) in responses {
            let has = |name: &str| assert!(response["headers"].get(name).is_some(), "{method} {path} {status}: {name}");
            has("X-Request-Id");
            if status == "429" || (status == "503" && path.starts_with("/api/v1/")) {
                has("Retry-After");
            }
            if path.ends_with("/runs") || path.ends_with("/rerun") {
                let of_a_run = operation["operationId"] == "enqueue_run" || operation["operationId"] == "rerun_run";
                if of_a_run && ["200", "202", "409", "429"].contains(&status.as_str()) {
                    has("Location");
                }
            }
        }
        if path.starts_with("/api/") {
            ["406", "503"].into_iter().for_each(documents);
        }
        if path == "/metrics" {
            ["401", "429", "503"].into_iter().for_each(documents);
        }
        if !path.starts_with("/api/v1/") {
            continue;
        }
        if path.contains('{') {
            documents("422");
        }
        if operation.get("requestBody").is_some() {
            ["400", "413", "415", "422"].into_iter().for_each(documents);
        }
        for (status, response) in responses.iter().filter(|(status, _)| !status.starts_with('2')) {
            if status == "304" {
                assert!(response.get("content").is_none(), "{method} {path}: 304 has no body");
                continue;
            }
            let content: Vec<_> = response["content"].as_object().unwrap().iter().collect();
            let [(kind, body)] = content[..] else { panic!("{method} {path} {status}: {content:?}") };
            assert_eq!(kind, "application/problem+json", "{method} {path} {status}");
            assert_eq!(body["schema"]["$ref"], "#/components/schemas/Problem", "{method} {path} {status}");
        }
    }
}

#[test]
fn every_body_of_a_request_has_an_example_that_can_be_sent_as_it_is() {
    let document = document();
    let mut bodies = 0;
    for (method, path, operation) in operations(&document) {
        let Some(content) = operation.pointer("/requestBody/content/application~1json") else { continue };
        let mut named = BTreeSet::new();
        references(&content["schema"], &mut named);
        let schema = document.pointer(named.first().unwrap().trim_start_matches('#')).unwrap();
        let example = content.get("example").or_else(|| schema.get("example"));
        let example = example.unwrap_or_else(|| panic!("{method} {path}: no example"));
        let required = schema["required"].as_array().into_iter().flatten();
        for name in required {
            assert!(example.get(name.as_str().unwrap()).is_some(), "{method} {path}: {name} in {example}");
        }
        let known = schema["properties"].as_object().unwrap();
        assert!(example.as_object().unwrap().keys().all(|name| known.contains_key(name)), "{method} {path}: {example}");
        bodies += 1;
    }
    assert!(bodies >= 13, "{bodies}");
}

#[test]
fn every_link_leads_to_an_operation_that_takes_what_it_hands_on() {
    let document = document();
    let all = operations(&document);
    let named = |id: &Value| all.iter().find(|(_, _, operation)| operation["operationId"] == *id);
    let mut links = 0;
    for (method, path, operation) in &all {
        let answers = operation["responses"].as_object().unwrap();
        for link in answers.values().filter_map(|answer| answer["links"].as_object()).flat_map(|links| links.values()) {
            let (_, _, next) = named(&link["operationId"]).unwrap_or_else(|| panic!("{method} {path}: {link}"));
            for name in link["parameters"].as_object().unwrap().keys() {
                let takes = next["parameters"].as_array().unwrap().iter().any(|parameter| parameter["name"] == **name);
                assert!(takes, "{method} {path}: {link}");
            }
            links += 1;
        }
    }
    assert!(links > 30, "{links}");
}

/// Every `$ref` in a document.
fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(members) => {
            found.extend(members.get("$ref").and_then(Value::as_str));
            members.values().for_each(|member| references(member, found));
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, found)),
        _ => {}
    }
}

#[test]
fn every_reference_leads_somewhere() {
    let document = document();
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    assert!(found.len() > 5, "{found:?}");
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_documented_operation_is_there() {
    let test = TestDb::new().await;
    let run = plant::run(&test, "w", singletrack::domain::Status::Queued).await.run_id.to_string();
    let replica = Replica::api_only(&test).await;
    let served = replica.client.get("/openapi.json").await;
    assert_eq!((served.status, &served.body), (200, &document()));
    for (method, path, operation) in operations(&document()) {
        let id = if path.contains("/workflows/") { "w" } else { &run };
        let request = replica.client.request(method.parse::<Method>().unwrap(), &path.replace("{id}", id));
        let request =
            if operation.get("requestBody").is_some() { request.json(&serde_json::json!({})) } else { request };
        if path == "/api/v1/events" {
            // It has no end.
            assert_eq!(request.send().await.unwrap().status(), 200);
            continue;
        }
        let answer = Answer::of(request).await.unwrap();
        let documented = operation["responses"].get(answer.status.to_string()).is_some();
        assert!(documented, "{method} {path} is answered with {}: {answer:?}", answer.status);
        let detail = answer.body["detail"].as_str().unwrap_or_default();
        assert!(answer.status != 405 && !detail.starts_with("No route"), "{method} {path}: {answer:?}");
    }
}
