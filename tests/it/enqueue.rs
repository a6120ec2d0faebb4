//! What an enqueue answers, one request at a time. Many at once are in `storms.rs`.

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::domain::Status;
use uuid::Uuid;

use crate::support::database::{TestDb, own_postgres};
use crate::support::plant;
use crate::support::replica::{Answer, Replica};

/// A replica that starts nothing, and the workflow `w` in it.
async fn idle() -> (TestDb, Replica) {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    (test, replica)
}

/// How many runs there are.
async fn runs(test: &TestDb) -> i64 {
    sqlx::query_scalar("select count(*) from test_runs").fetch_one(&test.sql).await.unwrap()
}

async fn send(replica: &Replica, body: impl Into<reqwest::Body>, kind: Option<&str>) -> Answer {
    let request = replica.client.request(Method::POST, "/api/v1/workflows/w/runs").body(body);
    let request = match kind {
        Some(kind) => request.header("Content-Type", kind),
        None => request,
    };
    Answer::of(request).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accepted_run_is_answered_with_202_its_place_and_itself() {
    let (test, replica) = idle().await;
    let body = json!({"input": {"a": [1, null]}, "priority": 7, "labels": {"team": "core"}});
    let request = replica.client.request(Method::POST, "/api/v1/workflows/w@prod/runs");
    let accepted = Answer::of(request.header("Singletrack-Actor", "ci").json(&body)).await.unwrap();

    assert_eq!(accepted.status, 202, "{accepted:?}");
    let id = accepted.run_id();
    assert_eq!(id.get_version_num(), 7);
    assert_eq!(accepted.headers["location"], format!("/api/v1/runs/{id}"));
    assert_eq!(accepted.headers["content-type"], "application/json");
    let run = &accepted.body;
    assert_eq!((&run["workflow_id"], &run["definition"]), (&json!("w@prod"), &json!("w")));
    assert_eq!((&run["status"], &run["attempt"], &run["revision"]), (&json!("queued"), &json!(0), &json!(1)));
    assert_eq!((&run["input"], &run["priority"], &run["labels"]), (&body["input"], &json!(7), &body["labels"]));
    assert_eq!(run["requested_by"], "ci");
    assert_eq!(run["created_at"], run["available_at"]);
    assert_eq!(replica.client.get(&format!("/api/v1/runs/{id}")).await.body, *run, "as a read shows it");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_body_means_a_run_without_input() {
    let (_test, replica) = idle().await;
    let accepted = send(&replica, "", Some("application/json; charset=utf-8")).await;
    assert_eq!((accepted.status, &accepted.body["input"]), (202, &Value::Null), "{accepted:?}");
    assert_eq!(accepted.body["requested_by"], "127.0.0.1", "the peer, where no actor is named");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_what_the_contract_names_is_told_about_a_run() {
    let (_test, replica) = idle().await;
    let accepted = replica.client.enqueue("w").await;
    let expected = "attempt available_at blocked_by cancel_requested_at created_at definition error executor_type exit_code fence \
                    finished_at heartbeat_timeout_seconds id input labels max_attempts on_conflict output priority queue \
                    reason requested_by rerun_of revision run_at started_at status tick_at timeout_seconds traceparent \
                    worker workflow_id";
    assert_eq!(accepted.names(), expected.split_whitespace().collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_slot_is_answered_with_the_run_that_holds_it() {
    let (test, replica) = idle().await;
    plant::workflow(&test.sql, "busy", &["true"]).await;
    let queued = plant::run(&test, "w", Status::Queued).await.run_id;
    let running = plant::run(&test, "busy", Status::Running).await.run_id;
    for (workflow, holder, status) in [("w", queued, "queued"), ("busy", running, "running")] {
        let refused = replica.client.enqueue(workflow).await;
        assert_eq!((refused.status, refused.cause()), (409, "slot-taken"), "{refused:?}");
        assert_eq!(refused.names(), ["detail", "holder", "request_id", "run_id", "status", "title", "type"]);
        assert_eq!(refused.run_id(), holder);
        assert_eq!(refused.headers["location"], format!("/api/v1/runs/{holder}"));
        assert!(refused.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap() > 0);
        let told = &refused.body["holder"];
        let names: Vec<_> = told.as_object().unwrap().keys().collect();
        assert_eq!(
            names,
            [
                "available_at",
                "created_at",
                "expected_end_at",
                "heartbeat_age_seconds",
                "progress",
                "reason",
                "requested_by",
                "started_at",
                "status"
            ],
            "no secret"
        );
        assert_eq!((&told["status"], &told["requested_by"]), (&json!(status), &json!("test")));
        assert_eq!(told["started_at"].is_string(), status == "running");
        match told["heartbeat_age_seconds"].as_f64() {
            Some(age) => assert!(status == "running" && (0.0..30.0).contains(&age), "{age}"),
            None => assert_eq!(status, "queued"),
        }
    }
    assert_eq!(replica.client.enqueue("w@other").await.status, 202, "an instance has a slot of its own");
    assert_eq!(runs(&test).await, 3);
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_run_that_is_not_over_holds_the_slot() {
    let (test, replica) = idle().await;
    // One that waits for a free slot would be given it, by the next sweep.
    for status in Status::ALL.into_iter().filter(|&status| status != Status::Waiting) {
        let workflow = format!("w-{}", status.as_str());
        plant::run(&test, &workflow, status).await;
        let answer = replica.client.enqueue(&workflow).await;
        assert_eq!(answer.status, if status.holds_slot() { 409 } else { 202 }, "{status:?}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_workflow_is_answered_with_404_and_how_to_define_it() {
    let (test, replica) = idle().await;
    for id in ["nobody", "nobody@prod", "W", "w.x"] {
        let unknown = replica.client.enqueue(id).await;
        assert_eq!((unknown.status, unknown.cause()), (404, "not-found"), "{unknown:?}");
        let detail = unknown.body["detail"].as_str().unwrap();
        assert!(detail.contains(&format!("`{id}`")) && detail.contains("PUT /api/v1/workflows/"), "{detail}");
    }
    for id in ["a%20b", "-a", "w@", "w@a@b", "w@%C3%BC", &"x".repeat(129), "w%00"] {
        assert_eq!(replica.client.enqueue(id).await.mistakes(), ["parameter id"], "{id}");
    }
    assert_eq!(runs(&test).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_field_is_named_by_its_pointer() {
    let (test, replica) = idle().await;
    let many: Value = (0..65).map(|n| (format!("l{n}"), json!(""))).collect::<serde_json::Map<_, _>>().into();
    let cases = [
        (json!({"priority": 101}), "pointer /priority"),
        (json!({"priority": -101}), "pointer /priority"),
        (json!({"priority": 1e9}), "pointer /priority"),
        (json!({"priority": 70000}), "pointer /priority"),
        (json!({"priority": "high"}), "pointer /priority"),
        (json!({"max_attempts": 0}), "pointer /max_attempts"),
        (json!({"max_attempts": 1001}), "pointer /max_attempts"),
        (json!({"max_attempts": "x"}), "pointer /max_attempts"),
        (json!({"labels": ["a"]}), "pointer /labels"),
        (json!({"labels": null}), "pointer /labels"),
        (json!({"labels": {"a": 1}}), "pointer /labels/a"),
        (json!({"labels": {"a/b~c": 1}}), "pointer /labels/a~1b~0c"),
        (json!({"labels": {"": "x"}}), "pointer /labels"),
        (json!({"labels": {"x".repeat(64): "x"}}), "pointer /labels"),
        (json!({"labels": {"x": "x".repeat(256)}}), "pointer /labels"),
        (json!({"labels": many}), "pointer /labels"),
        (json!({"on_conflict": "queue"}), "pointer /on_conflict"),
        (json!({"run_at": "tomorrow"}), "pointer /run_at"),
        (json!({"run_at": "1969-12-31T23:59:59Z"}), "pointer /run_at"),
        (json!({"run_at": "9999-12-31T23:59:60Z"}), "pointer /run_at"),
        (json!({"delay_seconds": -1}), "pointer /delay_seconds"),
        (json!({"delay_seconds": 4e8}), "pointer /delay_seconds"),
        (json!({"delay_seconds": 1, "run_at": "2030-01-01T00:00:00Z"}), "pointer /delay_seconds"),
        (json!([]), "pointer "),
        (json!("w"), "pointer "),
        (json!(null), "pointer "),
    ];
    for (body, place) in cases {
        let refused = replica.client.post("/api/v1/workflows/w/runs", body.clone()).await;
        assert_eq!(refused.mistakes(), [place], "{body}");
    }
    let refused = replica
        .client
        .post("/api/v1/workflows/w/runs", json!({"priority": 101, "labels": {"": ""}, "max_attempts": 0}));
    assert_eq!(
        refused.await.mistakes(),
        ["pointer /priority", "pointer /labels", "pointer /max_attempts"],
        "all at once"
    );
    assert_eq!(runs(&test).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_field_that_is_not_known_is_refused_by_name() {
    let (test, replica) = idle().await;
    for name in ["rerun_of", "idempotency_key", "inputs", "workflow_id"] {
        let refused = replica.client.post("/api/v1/workflows/w/runs", json!({name: "x"})).await;
        assert_eq!(refused.mistakes(), [format!("pointer /{name}")]);
        let detail = refused.body["detail"].as_str().unwrap();
        assert!(detail.contains(name) && detail.contains("input"), "what there is instead: {detail}");
    }
    for (header, value) in [("Idempotency-Key", ""), ("Idempotency-Key", &"k".repeat(256)), ("Prefer", "wait=soon")] {
        let request = replica.client.request(Method::POST, "/api/v1/workflows/w/runs").json(&json!({}));
        let refused = Answer::of(request.header(header, value)).await.unwrap();
        assert_eq!(refused.mistakes(), [format!("header {header}")]);
    }
    for actor in ["", &"x".repeat(129)] {
        let request = replica.client.request(Method::POST, "/api/v1/workflows/w/runs").json(&json!({}));
        let refused = Answer::of(request.header("Singletrack-Actor", actor)).await.unwrap();
        assert_eq!(refused.mistakes(), ["header Singletrack-Actor"]);
    }
    assert_eq!(runs(&test).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_postgres_cannot_hold_is_refused_where_it_stands() {
    let (test, replica) = idle().await;
    let nul = [
        (json!({"input": {"a": [0, {"b": "x\0y"}]}}), "pointer /input/a/1/b"),
        (json!({"input": {"a": {"b\0": 1}}}), "pointer /input/a/b\u{fffd}"),
        (json!({"labels": {"a": "\0"}}), "pointer /labels/a"),
    ];
    for (body, place) in nul {
        let refused = replica.client.post("/api/v1/workflows/w/runs", body).await;
        assert_eq!(refused.mistakes(), [place]);
        assert!(refused.body["detail"].as_str().unwrap().contains("NUL"), "{refused:?}");
    }
    let refused = send(&replica, b"{\"input\": \"caf\xe9\"}".to_vec(), Some("application/json")).await;
    assert_eq!(refused.mistakes(), ["pointer "]);
    assert!(refused.body["detail"].as_str().unwrap().contains("not UTF-8 from byte 14"), "{refused:?}");
    assert_eq!(runs(&test).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_cannot_be_read_is_refused_with_400_413_or_415() {
    let (test, replica) = idle().await;
    for body in ["{", "{\"input\": }", "input=1", "{} {}", "{\"input\": \"\\ud800\"}", &"[".repeat(1000)] {
        let refused = send(&replica, body.to_owned(), Some("application/json")).await;
        assert_eq!((refused.status, refused.cause()), (400, "malformed-request"), "{body}: {refused:?}");
    }
    let longest = singletrack::api::BODY_LIMIT;
    let body = |length: usize| format!("{{\"input\": \"{}\"}}", "x".repeat(length - 13));
    let refused = send(&replica, body(longest + 1), Some("application/json")).await;
    assert_eq!((refused.status, refused.cause()), (413, "too-large"), "{refused:?}");
    let kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", ""];
    for kind in kinds.into_iter().map(Some).chain([None]) {
        let refused = send(&replica, "{}", kind).await;
        assert_eq!((refused.status, refused.cause()), (415, "unsupported-media-type"), "{kind:?}: {refused:?}");
        assert!(refused.body["detail"].as_str().unwrap().contains("Content-Type: application/json"));
    }
    assert_eq!(runs(&test).await, 0);
    assert_eq!(send(&replica, body(longest), Some("Application/JSON")).await.status, 202, "just fits");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_is_answered_with_503_and_when_to_come_back() {
    let mut postgres = own_postgres("postgres-away-enqueue");
    let test = TestDb::on(&postgres).await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let accepted = client.enqueue("w").await;
    assert_eq!(accepted.status, 202);

    tokio::task::block_in_place(|| postgres.stop_fast());
    let away = client.enqueue("w@other").await;
    assert_eq!((away.status, away.cause()), (503, "database-unavailable"), "{away:?}");
    assert!(away.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap() > 0);
    assert!(!away.body.to_string().contains("socket"), "what is inside stays in the log: {away:?}");
    for path in ["/api/v1/runs", "/api/v1/workflows", &format!("/api/v1/runs/{}", accepted.run_id())] {
        assert_eq!(client.get(path).await.status, 503, "{path}");
    }
    let ready = client.get("/readyz").await;
    assert_eq!((ready.status, &ready.body["ready"]), (503, &json!(false)));
    assert_eq!(client.get("/livez").await.status, 200, "a restart would not help");

    tokio::task::block_in_place(|| postgres.restart()).unwrap();
    let refused = client.enqueue("w").await;
    assert_eq!((refused.status, refused.run_id()), (409, accepted.run_id()), "as if nothing had been");
    // The run named by an answer of unknown outcome may be there all the same; without one it must not be.
    let expected = client.enqueue("w@other").await;
    match away.body.get("run_id") {
        Some(_) if expected.status == 409 => assert_eq!(expected.run_id(), away.run_id()),
        _ => assert_eq!(expected.status, 202, "{expected:?}"),
    }
    assert_eq!(client.get("/readyz").await.status, 200);
    test.check().await;
    replica.finish().await;
    tokio::task::block_in_place(|| drop(postgres));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_keeps_locked_costs_nobody_else_anything() {
    let (test, replica) = idle().await;
    let mut psql = test.sql.begin().await.unwrap();
    let id: Uuid = sqlx::query_scalar(
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, available_at)
         values (gen_random_uuid(), 'w', 'w', 1, 'queued', 'command', now()) returning id",
    )
    .fetch_one(&mut *psql)
    .await
    .unwrap();
    let (client, since) = (replica.client.clone(), std::time::Instant::now());
    let locked = tokio::spawn(async move { client.enqueue("w").await });
    for n in 0..20 {
        assert_eq!(replica.client.enqueue(&format!("w@{n}")).await.status, 202, "others go on");
    }
    assert!(!locked.is_finished(), "who commits first decides");
    let busy = locked.await.unwrap();
    assert_eq!((busy.status, busy.cause()), (503, "database-busy"), "{busy:?}");
    assert!(busy.headers.contains_key("retry-after") && busy.body.get("run_id").is_none(), "{busy:?}");
    assert!(since.elapsed() < std::time::Duration::from_secs(20));

    psql.commit().await.unwrap();
    let refused = replica.client.enqueue("w").await;
    assert_eq!((refused.status, refused.run_id()), (409, id));
    test.check().await;
}
