//! Definitions: what they may say, their revisions, and what runs keep of them.

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::domain::Status;

use crate::support::calls::until_blocked;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::replica::{Answer, Client, Replica};

const PATH: &str = "/api/v1/workflows/w";

/// A definition that runs `argv`.
fn running(argv: &[&str]) -> Value {
    json!({"executor": {"type": "command", "argv": argv}})
}

/// A definition that says everything there is to say.
fn full() -> Value {
    json!({
        "executor": {"type": "command", "argv": ["sh", "-c", "true"], "cwd": "/tmp", "env": {"A": "b"}},
        "timeout_seconds": 900, "heartbeat_timeout_seconds": 30, "start_within_seconds": 60,
        "priority": -5, "queue": "fast", "labels": {"team": "core"},
    })
}

async fn api() -> (TestDb, Replica) {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    (test, replica)
}

async fn delete(client: &Client, path: &str) -> Answer {
    Answer::of(client.request(reqwest::Method::DELETE, path)).await.unwrap()
}

/// The revisions of `w`, as their numbers.
async fn revisions(client: &Client) -> Vec<i64> {
    let page = client.get(&format!("{PATH}/revisions")).await;
    page.body["items"].as_array().unwrap().iter().map(|revision| revision["revision"].as_i64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_is_created_changed_and_left_alone_when_it_says_the_same() {
    let (_test, replica) = api().await;
    let client = &replica.client;
    let created = client.put(PATH, running(&["true"])).await;
    assert_eq!((created.status, &created.body["revision"]), (201, &json!(1)), "{created:?}");
    let again = client.put(PATH, running(&["true"])).await;
    assert_eq!((again.status, &again.body), (200, &created.body), "nothing new");
    let spelled_out = json!({"executor": {"type": "command", "argv": ["true"], "env": {}}, "priority": 0,
                             "queue": "default", "labels": {}, "timeout_seconds": null});
    assert_eq!(client.put(PATH, spelled_out).await.body, created.body, "defaults say the same");
    let changed = client.put(PATH, running(&["false"])).await;
    assert_eq!((changed.status, &changed.body["revision"]), (200, &json!(2)));
    let mut current = client.get(PATH).await.body;
    current.as_object_mut().unwrap().remove("pause");
    assert_eq!(current, changed.body);
    let back = client.put(PATH, running(&["true"])).await;
    assert_eq!(back.body["revision"], 3, "revisions are never taken back");
    assert_eq!(revisions(client).await, [3, 2, 1]);
    let first = client.get(&format!("{PATH}/revisions?limit=2")).await.body;
    let rest =
        client.get(&format!("{PATH}/revisions?limit=2&cursor={}", first["next_cursor"].as_str().unwrap())).await.body;
    assert_eq!((&rest["items"], &rest["next_cursor"]), (&json!([created.body]), &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_can_be_put_again() {
    let (_test, replica) = api().await;
    let client = &replica.client;
    for (id, definition) in [("a", full()), ("b", running(&["true"]))] {
        let path = format!("/api/v1/workflows/{id}");
        let created = client.put(&path, definition.clone()).await;
        assert_eq!(created.status, 201, "{created:?}");
        let mut read = client.get(&path).await.body;
        assert_eq!(read.as_object_mut().unwrap().remove("pause"), Some(Value::Null));
        assert_eq!(read, created.body);
        for (name, value) in definition.as_object().unwrap() {
            assert_eq!(read[name], *value, "{name}");
        }
        let mut fields = read.as_object().unwrap().clone();
        fields.retain(|name, _| !["id", "revision", "created_at", "created_by", "pause"].contains(&name.as_str()));
        let again = client.put(&path, Value::Object(fields)).await;
        assert_eq!((again.status, &again.body), (200, &read));
    }
    let every = client.get("/api/v1/workflows").await.body;
    let names: Vec<_> = every["items"].as_array().unwrap().iter().map(|workflow| &workflow["id"]).collect();
    assert_eq!(names, ["b", "a"], "newest first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_workflow_is_gone_until_its_id_comes_back_as_a_next_revision() {
    let (test, replica) = api().await;
    let client = &replica.client;
    assert_eq!((delete(client, PATH).await.status, client.get(PATH).await.status), (404, 404));
    assert_eq!(client.get(&format!("{PATH}/revisions")).await.cause(), "not-found");
    client.put(PATH, running(&["true"])).await;
    let run = plant::run(&test, "w", Status::Succeeded).await.run_id;
    let gone = delete(client, PATH).await;
    assert_eq!((gone.status, &gone.body), (204, &json!("")));
    for answer in
        [delete(client, PATH).await, client.get(PATH).await, client.enqueue("w").await, client.enqueue("w@x").await]
    {
        assert_eq!((answer.status, answer.cause()), (404, "not-found"), "{answer:?}");
    }
    assert_eq!(client.get("/api/v1/workflows").await.body["items"], json!([]));
    assert_eq!(client.get(&format!("/api/v1/runs/{run}")).await.status, 200, "its history stays");
    assert_eq!(revisions(client).await, [1]);
    let back = client.put(PATH, running(&["true"])).await;
    assert_eq!((back.status, &back.body["revision"]), (201, &json!(2)), "though it says what revision 1 said");
    assert_eq!(client.enqueue("w").await.body["revision"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workflow_in_use_cannot_be_deleted() {
    let (test, replica) = api().await;
    let client = &replica.client;
    for status in Status::ALL {
        let id = format!("w-{}", status.as_str());
        let run = plant::run(&test, &id, status).await.run_id;
        let answer = delete(client, &format!("/api/v1/workflows/{id}")).await;
        if status.is_final() {
            assert_eq!(answer.status, 204, "{status:?}: {answer:?}");
        } else {
            assert_eq!((answer.status, answer.cause(), answer.run_id()), (409, "workflow-in-use", run), "{answer:?}");
        }
    }
    client.put(PATH, running(&["true"])).await;
    let instance = client.enqueue("w@prod").await.run_id();
    assert_eq!(delete(client, PATH).await.run_id(), instance, "runs of instances count");
    assert_eq!(delete(client, &format!("{PATH}@prod")).await.status, 404, "it has no definition of its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_uses_the_definition_before_its_at_sign_unless_it_has_its_own() {
    let (_test, replica) = api().await;
    let client = &replica.client;
    client.put(PATH, json!({"executor": {"type": "command", "argv": ["true"]}, "queue": "of-w"})).await;
    let before = client.enqueue("w@prod").await.body;
    assert_eq!((&before["definition"], &before["queue"]), (&json!("w"), &json!("of-w")));
    assert_eq!(client.get(&format!("{PATH}@prod")).await.status, 404, "only what was defined is shown");
    let own = client.put(&format!("{PATH}@stage"), running(&["false"])).await;
    assert_eq!((own.status, &own.body["id"]), (201, &json!("w@stage")));
    let run = client.enqueue("w@stage").await.body;
    assert_eq!((&run["definition"], &run["queue"]), (&json!("w@stage"), &json!("default")));
    for id in ["w@-a", "w@a@b", "a b", "%40prod", ".a"] {
        let answer = client.put(&format!("/api/v1/workflows/{}", id.replace(' ', "%20")), running(&["true"])).await;
        assert_eq!(answer.mistakes(), ["parameter id"], "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_keeps_the_revision_it_was_enqueued_with() {
    let (test, idle) = api().await;
    idle.client.define("w", "echo one").await;
    let id = idle.client.enqueue("w").await.run_id();
    idle.client.define("w", "echo two").await;
    let read = idle.client.get(&format!("/api/v1/runs/{id}")).await.body;
    assert_eq!((&read["status"], &read["revision"]), (&json!("queued"), &json!(1)));
    idle.finish().await;

    let replica = Replica::start(&test).await;
    let client = &replica.client;
    assert_eq!(client.finished(id).await["revision"], 1);
    assert_eq!(client.log(id).await, "one\n");
    let next = client.enqueue("w").await.run_id();
    assert_eq!(client.finished(next).await["revision"], 2);
    assert_eq!(client.log(next).await, "two\n");
    replica.finish().await;
    test.check().await;
}

/// The full definition with another value at `pointer`.
fn with(pointer: &str, value: Value) -> Value {
    let mut body = full();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    body.pointer_mut(parent).unwrap()[name] = value;
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_field_is_named_by_its_pointer() {
    let (_test, replica) = api().await;
    let out_of_range = |name: &str, values: &[Value]| -> Vec<(String, Value)> {
        values.iter().map(|value| (format!("/{name}"), value.clone())).collect()
    };
    let mut cases = Vec::new();
    cases.extend(out_of_range("timeout_seconds", &[json!(0), json!(-1), json!(31_536_001), json!("1m"), json!(1.5)]));
    cases.extend(out_of_range("heartbeat_timeout_seconds", &[json!(0), json!(1), json!(86401), json!(true)]));
    cases.extend(out_of_range("start_within_seconds", &[json!(0), json!(31_536_001), json!(1e12)]));
    cases.extend(out_of_range("priority", &[json!(101), json!(-101), json!(null), json!(40000)]));
    cases.extend(out_of_range("queue", &[json!(""), json!("a b"), json!("x".repeat(129)), json!(1)]));
    cases.extend(out_of_range("labels", &[json!([]), json!({"": "a"}), json!({"a": "x".repeat(256)})]));
    cases.extend(out_of_range("executor", &[json!("true"), json!(null), json!({}), json!({"argv": ["true"]})]));
    cases.extend(out_of_range("executor/argv", &[json!([]), json!([""]), json!("true")]));
    cases.extend(out_of_range("executor/cwd", &[json!("here"), json!(""), json!(1)]));
    cases.extend(out_of_range(
        "executor/env",
        &[json!({"": ""}), json!({"A=B": ""}), json!({"SINGLETRACK_X": ""}), json!(["A"])],
    ));
    for (pointer, value) in cases {
        let answer = replica.client.put(PATH, with(&pointer, value.clone())).await;
        assert_eq!(answer.mistakes(), [format!("pointer {pointer}")], "{pointer} = {value}: {answer:?}");
    }
    let inside = [
        ("/labels/a", json!(1)),
        ("/executor/argv/1", json!(1)),
        ("/executor/env/A", json!(1)),
        ("/executor/argv/1", json!("\0")),
    ];
    for (pointer, value) in inside {
        let mut body = with("/labels/a", json!("b"));
        *body.pointer_mut(pointer).unwrap() = value;
        assert_eq!(replica.client.put(PATH, body).await.mistakes(), [format!("pointer {pointer}")]);
    }
    let every = json!({"executor": {"type": "command", "argv": [], "cwd": "x", "env": {"": ""}}, "timeout_seconds": 0,
                       "heartbeat_timeout_seconds": 0, "start_within_seconds": 0, "priority": 200, "queue": "", "labels": {"": ""}});
    let mut found = replica.client.put(PATH, every).await.mistakes();
    found.dedup();
    assert_eq!(found.len(), 9, "all at once: {found:?}");
    assert_eq!(replica.client.get(PATH).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_this_version_does_not_know_is_refused_by_name() {
    let (_test, replica) = api().await;
    let names = ["timeout", "retries", "paused", "id", "revision"];
    for name in names {
        let answer = replica.client.put(PATH, with(&format!("/{name}"), json!(1))).await;
        assert_eq!(answer.mistakes(), [format!("pointer /{name}")]);
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(detail.contains(&format!("unknown field `{name}`")) && detail.contains("timeout_seconds"), "{detail}");
    }
    for name in ["shell", "image", "url"] {
        let answer = replica.client.put(PATH, with(&format!("/executor/{name}"), json!(1))).await;
        assert_eq!(answer.mistakes(), [format!("pointer /executor/{name}")]);
        assert!(answer.body["detail"].as_str().unwrap().contains(name), "{answer:?}");
    }
    for kind in ["docker", "Command", ""] {
        let answer = replica.client.put(PATH, with("/executor/type", json!(kind))).await;
        assert_eq!(answer.mistakes(), ["pointer /executor/type"]);
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(detail.contains(&format!("`{kind}`")), "{detail}");
        for known in ["command", "http", "pull", "handler"] {
            assert!(detail.contains(&format!("`{known}`")), "{detail}");
        }
    }
    assert_eq!(replica.client.put(PATH, json!({})).await.mistakes(), ["pointer "]);
    assert_eq!(replica.client.get(PATH).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_waited_for_another_one_is_no_creation() {
    let (test, replica) = api().await;
    replica.client.put(PATH, running(&["one"])).await;
    let mut other = test.sql.begin().await.unwrap();
    for statement in [
        "update workflows set revision = 2 where id = 'w'",
        "insert into workflow_revisions (workflow_id, revision, executor_type, executor, created_by)
         values ('w', 2, 'command', '{\"type\": \"command\", \"argv\": [\"two\"]}', 'other')",
    ] {
        sqlx::query(statement).execute(&mut *other).await.unwrap();
    }
    let client = replica.client.clone();
    let waiting = tokio::spawn(async move { client.put(PATH, running(&["three"])).await });
    let blocked = "select exists (select from pg_locks l join pg_database d on d.oid = l.database
                   where not l.granted and d.datname = current_database())
                   or exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')";
    eventually("it waits for the other", std::time::Duration::from_secs(10), async || {
        sqlx::query_scalar::<_, bool>(blocked).fetch_one(&test.sql).await.unwrap().then_some(())
    })
    .await;
    other.commit().await.unwrap();
    let answer = waiting.await.unwrap();
    assert_eq!((answer.status, &answer.body["revision"]), (200, &json!(3)), "{answer:?}");
    assert_eq!(revisions(&replica.client).await, [3, 2, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_first_definitions_at_once_one_creates_and_all_become_revisions() {
    let (_test, replica) = api().await;
    let mut editors = tokio::task::JoinSet::new();
    for n in 0..8 {
        let client = replica.client.clone();
        editors.spawn(async move { client.put(PATH, running(&[&n.to_string()])).await.status });
    }
    let mut statuses = editors.join_all().await;
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 200, 200, 200, 200, 200, 201]);
    assert_eq!(revisions(&replica.client).await, [8, 7, 6, 5, 4, 3, 2, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_takes_place_only_on_what_its_author_has_read() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let send = async |method: Method, headers: &[(&str, &str)], words: &str| {
        let request = client
            .request(method, "/api/v1/workflows/w")
            .json(&json!({"executor": {"type": "command", "argv": [words]}}));
        Answer::of(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))).await.unwrap()
    };
    let tag = |answer: &Answer| answer.headers["etag"].to_str().unwrap().to_owned();
    let refused = |answer: Answer| assert_eq!((answer.status, answer.cause()), (412, "precondition-failed"));

    refused(send(Method::PUT, &[("If-Match", "*")], "a").await);
    let made = send(Method::PUT, &[("If-None-Match", "*")], "a").await;
    assert_eq!((made.status, tag(&made)), (201, "\"1\"".to_owned()));
    refused(send(Method::PUT, &[("If-None-Match", "*")], "b").await);
    let first = client.get("/api/v1/workflows/w").await;
    assert_eq!(tag(&first), tag(&made));
    let same = Answer::of(client.request(Method::GET, "/api/v1/workflows/w").header("If-None-Match", tag(&first)))
        .await
        .unwrap();
    assert_eq!((same.status, tag(&same), same.body), (304, tag(&first), json!("")));

    // A pause changes what is read, and is no edit.
    client.post("/api/v1/workflows/w/pause", json!({})).await;
    let paused = client.get("/api/v1/workflows/w").await;
    assert_ne!(tag(&paused), tag(&first));
    let second = send(Method::PUT, &[("If-Match", &tag(&paused))], "b").await;
    assert_eq!((second.status, tag(&second)), (200, "\"2\"".to_owned()));
    refused(send(Method::PUT, &[("If-Match", &tag(&first))], "c").await);
    refused(send(Method::DELETE, &[("If-Match", &tag(&first))], "").await);
    assert_eq!(client.get("/api/v1/workflows/w").await.body["revision"], 2);

    // One that is not committed yet is waited for.
    let mut open = test.sql.begin().await.unwrap();
    sqlx::query("update workflows set revision = 1 where id = 'w'").execute(&mut *open).await.unwrap();
    let late = send(Method::PUT, &[("If-Match", "\"2\"")], "c");
    let (late, ()) = tokio::join!(late, async {
        until_blocked(&test, 1).await;
        open.commit().await.unwrap();
    });
    refused(late);
    assert_eq!(send(Method::PUT, &[("If-None-Match", "\"2\"")], "c").await.mistakes(), ["header If-None-Match"]);
    assert_eq!(send(Method::DELETE, &[("If-Match", "\"7\", \"1\"")], "").await.status, 204);
}
