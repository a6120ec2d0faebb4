//! Bad definitions of every type of executor, and of what a retry is: each mistake is named where it stands.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::database::TestDb;
use crate::support::replica::Replica;

const PATH: &str = "/api/v1/workflows/w";

/// An executor of each type that says everything there is to say.
fn executor(kind: &str) -> Value {
    match kind {
        "command" => {
            json!({"type": "command", "argv": ["true"], "cwd": "/tmp", "env": {"A": "b"}, "env_pass": ["HTTPS_PROXY"],
                            "user": "nobody",
                            "limits": {"memory_bytes": 1_048_576, "open_files": 16, "processes": 1, "log_bytes": 0,
                                       "output_bytes": 0}})
        }
        "http" => json!({"type": "http", "url": "https://jobs.example.com:8443/a?b=c", "method": "PUT",
                         "headers": {"Authorization": "Bearer x", "X-Empty": ""}, "callback_timeout_seconds": 31_536_000}),
        _ => json!({"type": kind}),
    }
}

const KINDS: [&str; 4] = ["command", "http", "pull", "handler"];

/// Values that must be refused, by pointer.
fn wrong() -> Vec<(&'static str, &'static str, Vec<Value>)> {
    let string = || vec![json!(1), json!([]), json!({}), json!(true)];
    let seconds = || vec![json!(0), json!(-1), json!(31_536_001), json!(1.5), json!("1"), json!(1e12)];
    let count = |least: u64| vec![json!(least - 1), json!(-1), json!(1.5), json!("64"), json!([64]), json!(1e30)];
    vec![
        ("command", "/argv", vec![json!([]), json!([""]), json!("true"), json!({})]),
        ("command", "/cwd", [vec![json!(""), json!("tmp"), json!("~"), json!("./x")], string()].concat()),
        (
            "command",
            "/env",
            vec![json!([]), json!("A=b"), json!({"": "b"}), json!({"A=": "b"}), json!({"SINGLETRACK_A": "b"})],
        ),
        ("command", "/env/A", vec![json!(1), json!(null), json!(["b"])]),
        (
            "command",
            "/env_pass",
            vec![
                json!("A"),
                json!({"A": "b"}),
                json!([""]),
                json!(["A=b"]),
                json!(["DATABASE_URL"]),
                json!(["SINGLETRACK_API_KEY"]),
            ],
        ),
        ("command", "/env_pass/0", vec![json!(1), json!(null)]),
        ("command", "/user", [vec![json!(""), json!("a:b"), json!("../root")], string()].concat()),
        ("command", "/limits", vec![json!([]), json!([1_048_576]), json!(1), json!("none")]),
        ("command", "/limits/memory_bytes", count(1_048_576)),
        ("command", "/limits/open_files", count(16)),
        ("command", "/limits/processes", count(1)),
        ("command", "/limits/log_bytes", vec![json!(-1), json!("1"), json!(1.5), json!((1_u64 << 40) + 1)]),
        ("command", "/limits/output_bytes", vec![json!(-1), json!("1"), json!(1.5), json!((64 << 20) + 1)]),
        ("command", "/limits/cpu", vec![json!(1)]),
        (
            "http",
            "/url",
            [
                vec![
                    json!(""),
                    json!("jobs.example.com"),
                    json!("ftp://jobs.example.com"),
                    json!("file:///etc/passwd"),
                    json!("//jobs.example.com/"),
                    json!("https://"),
                    json!("http://?x"),
                    json!("https://me:secret@jobs.example.com/"),
                    json!("https://me@jobs.example.com/"),
                    json!("https://jobs.example.com/a b"),
                    json!("https://jobs.example.com/\n"),
                    json!("https://jobs .example.com/"),
                ],
                string(),
            ]
            .concat(),
        ),
        ("http", "/method", vec![json!("GET"), json!("post"), json!("DELETE"), json!(""), json!(1)]),
        (
            "http",
            "/headers",
            vec![
                json!([]),
                json!("A: b"),
                json!({"": "b"}),
                json!({"A b": "c"}),
                json!({"A:": "c"}),
                json!({"Ä": "c"}),
                json!({"A": "b\r\nC: d"}),
                json!({"A": "b\u{7f}"}),
                json!({"Host": "x"}),
                json!({"content-length": "1"}),
                json!({"Content-Type": "text/plain"}),
                json!({"Transfer-Encoding": "chunked"}),
                json!({"Connection": "close"}),
                json!({"Idempotency-Key": "1"}),
                json!({"traceparent": "x"}),
                json!({"Singletrack-Run-Id": "x"}),
                json!({"Authorization": "a", "authorization": "b"}),
            ],
        ),
        ("http", "/headers/A", vec![json!(1), json!(null), json!(["b"])]),
        ("http", "/callback_timeout_seconds", seconds()),
    ]
}

fn set(root: &mut Value, pointer: &str, value: Value) {
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let parent = root.pointer_mut(parent).unwrap();
    match parent.as_array_mut() {
        Some(items) => items[name.parse::<usize>().unwrap()] = value,
        None => parent[name] = value,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_definition_of_every_type_is_taken_and_read_as_it_was_given() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    for kind in KINDS {
        let path = format!("/api/v1/workflows/{kind}");
        let backoff = json!({"initial_seconds": 0.5, "factor": 1.5, "max_seconds": 60.0, "jitter": 0.0});
        let body = json!({"executor": executor(kind), "max_attempts": 1000, "retry_on": ["stale"], "backoff": backoff});
        let created = replica.client.put(&path, body.clone()).await;
        assert_eq!(created.status, 201, "{created:?}");
        let read = replica.client.get(&path).await.body;
        for name in ["executor", "max_attempts", "retry_on", "backoff"] {
            assert_eq!(read[name], body[name], "{kind}: {name}");
        }
        let mut again = read.as_object().unwrap().clone();
        again.retain(|name, _| !["id", "revision", "created_at", "created_by", "pause"].contains(&name.as_str()));
        let again = replica.client.put(&path, Value::Object(again)).await;
        assert_eq!(
            (again.status, &again.body["revision"]),
            (200, &json!(1)),
            "what is read can be put again: {again:?}"
        );
        let run = replica.client.enqueue(kind).await.body;
        assert_eq!((&run["executor_type"], &run["max_attempts"]), (&json!(kind), &json!(1000)), "{run}");
    }
    // What is not given, null or empty says the same.
    let short = replica.client.put(PATH, json!({"executor": {"type": "command", "argv": ["true"]}})).await.body;
    let long = json!({"type": "command", "argv": ["true"], "cwd": null, "env": {}, "env_pass": [], "user": null,
                      "limits": {"memory_bytes": null}, "url": null});
    let long = json!({"executor": long, "max_attempts": 1, "retry_on": ["stale", "failed", "timed_out", "failed"],
                      "backoff": {"initial_seconds": 5, "factor": 2}});
    let same = replica.client.put(PATH, long).await;
    assert_eq!((same.status, &same.body), (200, &short));
    assert_eq!((&short["max_attempts"], &short["retry_on"]), (&json!(1), &json!(["failed", "timed_out", "stale"])));
    assert_eq!(short["backoff"], json!({"initial_seconds": 5.0, "factor": 2.0, "max_seconds": 3600.0, "jitter": 0.2}));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_member_of_every_type_is_named_by_its_pointer() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    for (kind, pointer, values) in wrong() {
        for value in values {
            let mut executor = executor(kind);
            if pointer == "/headers/A" {
                executor["headers"] = json!({"A": "b"});
            }
            set(&mut executor, pointer, value.clone());
            let refused = replica.client.put(PATH, json!({"executor": executor})).await;
            assert_eq!(refused.mistakes(), [format!("pointer /executor{pointer}")], "{kind} {value}: {refused:?}");
        }
    }
    let every = json!({"type": "command", "argv": [], "cwd": "x", "env": {"": ""}, "env_pass": [""], "user": "",
                       "limits": {"memory_bytes": 0, "open_files": 0, "processes": 0}});
    let refused = replica.client.put(PATH, json!({"executor": every})).await;
    assert_eq!(refused.mistakes().len(), 8, "all at once: {refused:?}");
    assert_eq!(replica.client.get(PATH).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_another_type_is_refused_by_name_and_a_missing_one_too() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let members: BTreeMap<&str, Value> = ["command", "http"].into_iter().map(|kind| (kind, executor(kind))).collect();
    for kind in KINDS {
        for (of, name, value) in members.iter().flat_map(|(of, executor)| {
            executor.as_object().unwrap().iter().map(move |(name, value)| (*of, name.clone(), value.clone()))
        }) {
            if of == kind || name == "type" {
                continue;
            }
            let mut executor = executor(kind);
            executor[&name] = value;
            let refused = replica.client.put(PATH, json!({"executor": executor})).await;
            assert_eq!(refused.mistakes(), [format!("pointer /executor/{name}")], "{kind}: {refused:?}");
            let detail = refused.body["detail"].as_str().unwrap();
            assert!(detail.contains(&format!("`{name}`")) && detail.contains("another type"), "{detail}");
        }
    }
    for (kind, name) in [("command", "argv"), ("http", "url")] {
        for value in [None, Some(Value::Null)] {
            let mut executor = executor(kind);
            executor.as_object_mut().unwrap().remove(name);
            if let Some(value) = value {
                executor[name] = value;
            }
            let refused = replica.client.put(PATH, json!({"executor": executor})).await;
            assert_eq!(refused.mistakes(), ["pointer /executor"]);
            assert!(refused.body["detail"].as_str().unwrap().contains(&format!("`{name}`")), "{refused:?}");
        }
    }
    // serde would take a list for the members in their order.
    for executor in [json!([]), json!(["pull"]), json!(["command", ["true"]]), json!("pull"), json!(null)] {
        let refused = replica.client.put(PATH, json!({"executor": executor})).await;
        assert_eq!(refused.mistakes(), ["pointer /executor"], "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_word_about_retries_is_named_by_its_pointer() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let number = |low: f64, high: f64| {
        vec![json!(low - 0.1), json!(high + 0.1), json!("1"), json!(null), json!([1]), json!(true)]
    };
    let cases = [
        ("/max_attempts", vec![json!(0), json!(-1), json!(1001), json!(1.5), json!("3"), json!(null), json!(1e12)]),
        ("/retry_on", vec![json!("failed"), json!(null), json!({"failed": true}), json!(1)]),
        (
            "/retry_on/1",
            vec![json!("succeeded"), json!("cancelled"), json!("skipped"), json!("Failed"), json!(1), json!(null)],
        ),
        ("/backoff", vec![json!([]), json!([1, 2, 3, 0.1]), json!(5), json!("5s"), json!(null)]),
        ("/backoff/initial_seconds", number(0.0, 86_400.0)),
        ("/backoff/factor", number(1.0, 100.0)),
        ("/backoff/max_seconds", number(0.0, 604_800.0)),
        ("/backoff/jitter", number(0.0, 1.0)),
        ("/backoff/max", vec![json!(1)]),
    ];
    let body = || {
        json!({"executor": executor("pull"), "retry_on": ["failed", "stale"],
               "backoff": {"initial_seconds": 1, "factor": 1, "max_seconds": 1, "jitter": 0}})
    };
    for (pointer, values) in cases {
        for value in values {
            let mut body = body();
            set(&mut body, pointer, value.clone());
            let refused = replica.client.put(PATH, body).await;
            assert_eq!(refused.mistakes(), [format!("pointer {pointer}")], "{pointer} {value}: {refused:?}");
        }
    }
    let mut every = body();
    every["max_attempts"] = json!(0);
    every["backoff"] = json!({"initial_seconds": -1, "factor": 0, "max_seconds": -1, "jitter": 2});
    assert_eq!(replica.client.put(PATH, every).await.mistakes().len(), 5, "all at once");
    assert_eq!(replica.client.get(PATH).await.status, 404);
    let mut never = body();
    never["retry_on"] = json!([]);
    assert_eq!(replica.client.put(PATH, never).await.body["retry_on"], json!([]), "no end at all is a choice");
}
