//! Keys: when they are asked for, how long they are good, what they leave behind.

use std::process::Output;
use std::time::Duration;

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use singletrack::config::Settings;
use singletrack::domain::{Scope, Status};
use uuid::Uuid;

use crate::support::access::{id_of, key};
use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::process::{Process, singletrack};
use crate::support::replica::{Answer, Client, Replica, short_lease};
use crate::support::sse::Stream;

/// An address that is not loopback and that this machine can listen on.
const EVERYWHERE: &str = "0.0.0.0:0";

async fn make(client: &Client, name: &str, scopes: &[&str]) -> String {
    let made = client.post("/api/v1/keys", json!({"name": name, "scopes": scopes})).await;
    assert_eq!((made.status, &made.headers["cache-control"]), (201, &"no-store".parse().unwrap()), "{made:?}");
    made.body["token"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_key_closes_every_replica_and_revoking_all_opens_none() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let (here, there) = (Replica::api_only(&test).await, Replica::api_only(&test).await);
    assert_eq!(there.client.enqueue("w").await.status, 202);
    let token = make(&here.client, "boss", &["admin"]).await;
    let refused = here.client.enqueue("w").await;
    assert_eq!((refused.status, refused.cause()), (401, "not-authenticated"), "at once where it was made");
    assert_eq!(refused.headers["www-authenticate"], "Bearer");
    let refuses = async |client: &Client| client.get("/api/v1/runs").await.status == 401;
    eventually("the other replica asks for keys", LIMIT, async || refuses(&there.client).await.then_some(())).await;
    let (boss, boss_there) = (here.client.having(&token), there.client.having(&token));
    assert_eq!(boss.get("/api/v1/runs").await.status, 200);
    assert_eq!(boss_there.get("/api/v1/runs").await.status, 200);
    // One that was made elsewhere a moment ago is good at once, or a second later.
    let second = make(&boss, "second", &["read"]).await;
    let second_there = there.client.having(&second);
    let good = async || (second_there.get("/api/v1/runs").await.status == 200).then_some(());
    eventually("a new key is good on the other replica", Duration::from_secs(3), good).await;
    let list = boss.get("/api/v1/keys").await;
    assert_eq!(list.body["items"].as_array().unwrap().len(), 2);
    assert!(!list.body.to_string().contains(&token[16..]) && !list.body.to_string().contains("hash"), "{list:?}");
    for token in [&second, &token] {
        let path = format!("/api/v1/keys/{}", id_of(token));
        let revoked = Answer::of(boss.request(Method::DELETE, &path)).await.unwrap();
        assert_eq!(revoked.status, 204, "{revoked:?}");
    }
    assert!(refuses(&boss).await && refuses(&here.client).await, "at once where it was revoked");
    eventually("the other replica refuses it", Duration::from_secs(8), async || {
        refuses(&boss_there).await.then_some(())
    })
    .await;
    assert!(refuses(&there.client).await && refuses(&Replica::api_only(&test).await.client).await);
    let deleted = sqlx::query("delete from api_keys").execute(&test.sql).await.unwrap_err().to_string();
    assert!(deleted.contains("rows of api_keys are not deleted"), "{deleted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_the_document_need_no_key_and_what_is_not_there_is_not_hidden() {
    let test = TestDb::new().await;
    key(&test, "boss", &[Scope::Admin], None).await;
    let replica = Replica::api_only(&test).await;
    for path in ["/livez", "/readyz", "/openapi.json"] {
        assert_eq!(replica.client.get(path).await.status, 200, "{path}");
    }
    assert_eq!(replica.client.get("/api/v1/no-such-thing").await.status, 404);
    assert_eq!(replica.client.put("/api/v1/runs", json!({})).await.status, 405);
    assert_eq!(replica.client.get("/api/v1/runs").await.status, 401);
    let head = replica.client.request(Method::HEAD, "/api/v1/runs").send().await.unwrap();
    assert_eq!(head.status().as_u16(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_is_refused_although_nobody_read_the_keys_anew() {
    let test = TestDb::new().await;
    let boss = key(&test, "boss", &[Scope::Admin], None).await;
    let replica = Replica::api_only(&test).await;
    let boss = replica.client.having(&boss);
    let made = boss.post("/api/v1/keys", json!({"name": "x", "scopes": ["read"], "expires_in_seconds": 1})).await;
    assert!(made.body["expires_at"].is_string(), "{made:?}");
    let short = replica.client.having(made.body["token"].as_str().unwrap());
    let refused = async || (short.get("/api/v1/runs").await.status == 401).then_some(());
    eventually("it has expired", Duration::from_secs(4), refused).await;
    for (wrong, place) in [
        (json!({"name": "", "scopes": ["read"]}), "pointer /name"),
        (json!({"name": "y", "scopes": []}), "pointer /scopes"),
        (json!({"name": "y", "scopes": ["write"]}), "pointer /scopes/0"),
        (json!({"name": "y", "scopes": ["read"], "workflows": []}), "pointer /workflows"),
        (json!({"name": "y", "scopes": ["read"], "workflows": ["a|b"]}), "pointer /workflows"),
        (json!({"name": "y", "scopes": ["read"], "expires_in_seconds": 0}), "pointer /expires_in_seconds"),
    ] {
        assert_eq!(boss.post("/api/v1/keys", wrong).await.mistakes(), [place]);
    }
    let taken = boss.post("/api/v1/keys", json!({"name": "boss", "scopes": ["read"]})).await;
    assert_eq!((taken.status, taken.cause()), (409, "key-name-taken"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_keys_name_is_the_actor_of_events_and_of_the_audit_log() {
    let test = TestDb::new().await;
    let token = key(&test, "boss", &[Scope::Admin], None).await;
    let replica = Replica::api_only(&test).await;
    let boss = replica.client.having(&token);
    let post = async |path: &str, body: Value| {
        // Somebody with a key can't call itself something else.
        let request = boss.request(Method::POST, path).header("Singletrack-Actor", "mallory").json(&body);
        let answer = Answer::of(request).await.unwrap();
        assert!((200..300).contains(&answer.status), "{path}: {answer:?}");
        answer
    };
    boss.define("w", "true").await;
    boss.define("w", "true").await; // says the same: no change
    let run = post("/api/v1/workflows/w/runs", json!({})).await.run_id();
    post(&format!("/api/v1/runs/{run}/cancel"), json!({})).await;
    for path in ["workflows/w/pause", "workflows/w/resume", "workflows/w/resume", "queues/q/pause", "queues/q/resume"] {
        post(&format!("/api/v1/{path}"), json!({})).await;
    }
    let made = post("/api/v1/keys", json!({"name": "ci", "scopes": ["read"]})).await;
    let id = made.body["id"].as_str().unwrap();
    for path in [format!("keys/{id}"), format!("keys/{id}"), "workflows/w".into()] {
        let done = Answer::of(boss.request(Method::DELETE, &format!("/api/v1/{path}"))).await.unwrap();
        assert_eq!(done.status, 204, "{path}: {done:?}");
    }
    let actors: Vec<String> =
        sqlx::query_scalar("select actor from run_events order by seq").fetch_all(&test.sql).await.unwrap();
    assert_eq!(actors, ["boss", "boss"]);
    let log: Vec<(String, String, String)> =
        sqlx::query_as("select actor, action, object from audit_log order by id").fetch_all(&test.sql).await.unwrap();
    let log: Vec<_> = log.iter().map(|(actor, what, to)| format!("{actor} {what} {to}")).collect();
    assert_eq!(log[0], format!("test key-created {}", id_of(&token)));
    let expected = [
        "boss workflow-put w".to_owned(),
        "boss workflow-paused w".into(),
        "boss workflow-resumed w".into(),
        "boss queue-paused q".into(),
        "boss queue-resumed q".into(),
        format!("boss key-created {id}"),
        format!("boss key-revoked {id}"),
        "boss workflow-deleted w".into(),
    ];
    assert_eq!(log[1..], expected);
    for change in ["update audit_log set actor = 'x'", "delete from audit_log", "truncate audit_log"] {
        let refused = sqlx::query(change).execute(&test.sql).await.unwrap_err().to_string();
        assert!(refused.contains("rows of audit_log are not"), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_may_be_called_anything_and_acts_under_the_name_of_its_key() {
    let test = TestDb::new().await;
    let boss = key(&test, "boss", &[Scope::Admin], None).await;
    let [one, other] = [key(&test, "ci", &[Scope::Work], None).await, key(&test, "other", &[Scope::Work], None).await];
    let replica = Replica::api_only(&test).await;
    let [boss, one, other] = [boss, one, other].map(|token| replica.client.having(&token));
    let run = boss.enqueue_pull("w").await;
    let body = json!({"worker": "boss", "claim_id": "same"});
    let given_back = one.claim(body.clone()).await[0]["lease"]["token"].clone();
    assert_eq!(other.claim(body.clone()).await, [] as [Value; 0], "a lease is told to the key that claimed it");
    assert_eq!(one.claim(body).await[0]["lease"]["token"], given_back, "again");
    assert_eq!(one.say_one("release", given_back.as_str().unwrap(), json!({})).await["result"], "ok");
    let claimed = one.claim(json!({"worker": "boss"})).await;
    assert_eq!(claimed[0]["worker"], "boss");
    assert_eq!(one.end(claimed[0]["lease"]["token"].as_str().unwrap(), "succeeded").await.0, "ok");
    let actors: Vec<(String, String)> =
        sqlx::query_as("select to_status, actor from run_events order by seq").fetch_all(&test.sql).await.unwrap();
    let actors: Vec<_> = actors.iter().map(|(to, actor)| format!("{to} by {actor}")).collect();
    assert_eq!(actors, ["queued by boss", "running by ci", "queued by ci", "running by ci", "succeeded by ci"]);
    assert_eq!(boss.get(&format!("/api/v1/runs/{run}")).await.body["worker"], "boss");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_one_lease_is_finished_at_a_time() {
    let test = TestDb::new().await;
    let boss = key(&test, "boss", &[Scope::Admin], None).await;
    let replica = Replica::api_only(&test).await;
    let boss = replica.client.having(&boss);
    let mut ends = Vec::new();
    for id in ["a", "b"] {
        ends.push(json!({"token": boss.working(id).await.1, "outcome": "succeeded"}));
    }
    let refused = replica.client.say("finish", json!(ends)).await;
    assert_eq!((refused.status, refused.cause()), (401, "not-authenticated"), "{refused:?}");
    for end in &ends {
        assert_eq!(replica.client.say("finish", json!([end])).await.body["leases"][0]["result"], "ok");
    }
    assert_eq!(boss.say("finish", json!(ends)).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bound_key_is_told_of_no_worker_queue_or_workflow_that_is_not_for_it() {
    let test = TestDb::new().await;
    let bound = key(&test, "bound", &[Scope::Read], Some(&["own*"])).await;
    let boss = key(&test, "boss", &[Scope::Admin], None).await;
    plant::run(&test, "own", Status::Queued).await;
    for (name, queues, workflows) in [
        ("any", None, None),
        ("foreign", None, Some(vec!["foreign"])),
        ("foreign queue", Some(vec!["foreign"]), None),
        ("mine", Some(vec!["default", "foreign"]), Some(vec!["foreign", "own@a"])),
    ] {
        sqlx::query("insert into workers (name, executor_types, queues, workflows, seen_at) values ($1, '{pull}', $2, $3, now())")
            .bind(name)
            .bind(queues)
            .bind(workflows)
            .execute(&test.sql)
            .await
            .unwrap();
    }
    let replica = Replica::api_only(&test).await;
    let told = async |token: &str| {
        let page = replica.client.having(token).get("/api/v1/workers").await;
        let told = |worker: &Value| {
            format!("{} {} {}", worker["name"], worker["queues"], worker["workflows"]).replace('"', "")
        };
        page.body["items"].as_array().unwrap().iter().map(told).collect::<Vec<_>>()
    };
    assert_eq!(told(&bound).await, ["any null null", "mine [default] [own@a]"]);
    assert_eq!(told(&boss).await.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_is_told_page_by_page_newest_first_and_by_who_and_what() {
    let test = TestDb::new().await;
    let token = key(&test, "boss", &[Scope::Admin], None).await;
    let replica = Replica::api_only(&test).await;
    let boss = replica.client.having(&token);
    for id in ["a", "b"] {
        boss.define(id, "true").await;
    }
    boss.post("/api/v1/workflows/a/pause", json!({"reason": "broken"})).await;
    let page = async |query: &str| {
        let answer = boss.get(&format!("/api/v1/audit?{query}")).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let told =
            |entry: &Value| format!("{} {} {}", entry["actor"], entry["action"], entry["object"]).replace('"', "");
        let entries: Vec<String> = answer.body["items"].as_array().unwrap().iter().map(told).collect();
        (entries, answer.body["next_cursor"].as_str().map(str::to_owned))
    };
    let all = [
        "boss workflow-paused a".to_owned(),
        "boss workflow-put b".into(),
        "boss workflow-put a".into(),
        format!("test key-created {}", id_of(&token)),
    ];
    let (first, next) = page("limit=3").await;
    assert_eq!(first, all[..3]);
    // What comes meanwhile shifts nothing.
    boss.define("c", "true").await;
    assert_eq!(page(&format!("limit=3&cursor={}", next.as_ref().unwrap())).await, (all[3..].to_vec(), None));
    assert_eq!(page("object=a").await, (vec![all[0].clone(), all[2].clone()], None));
    assert_eq!(page("actor=test").await.0, all[3..]);
    assert_eq!(page("actor=test&object=a").await.0, [""; 0]);
    let paused = &boss.get("/api/v1/audit?limit=2").await.body["items"][1];
    assert!(paused["id"].is_i64() && paused["at"].is_string() && paused["detail"]["reason"] == "broken", "{paused}");
    let other = boss.get(&format!("/api/v1/audit?actor=test&cursor={}", next.unwrap())).await;
    assert_eq!((other.status, other.cause()), (400, "invalid-cursor"), "a cursor of another list");
    assert_eq!(boss.get("/api/v1/audit?action=x").await.mistakes(), ["parameter action"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_is_one_of_its_api_key() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let tokens = [key(&test, "a", &[Scope::Enqueue], None).await, key(&test, "b", &[Scope::Enqueue], None).await];
    let replica = Replica::api_only(&test).await;
    let mut answers = Vec::new();
    for token in [&tokens[0], &tokens[0], &tokens[1]] {
        let request = replica.client.having(token).request(Method::POST, "/api/v1/workflows/w/runs");
        answers.push(Answer::of(request.header("Idempotency-Key", "k").json(&json!({}))).await.unwrap());
    }
    assert_eq!((answers[0].status, answers[1].status, answers[2].status), (202, 202, 409), "{answers:?}");
    assert_eq!(answers[0].run_id(), answers[1].run_id());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_finished_by_its_token_alone_and_a_made_up_one_is_told_nothing() {
    let test = TestDb::new().await;
    let boss = key(&test, "boss", &[Scope::Admin], None).await;
    let replica = Replica::api_only(&test).await;
    let boss = replica.client.having(&boss);
    let (run, token) = boss.working("w").await;
    let other = plant::run(&test, "v", Status::Running).await;
    let made_up = singletrack::domain::Lease { secret: Some(Uuid::new_v4()), ..other }.token().unwrap();
    let lost = replica.client.say_one("finish", &made_up, json!({"outcome": "succeeded"})).await;
    assert_eq!((&lost["result"], &lost["run"]), (&json!("lost"), &Value::Null), "it shows nobody's run");
    let told = boss.say_one("finish", &made_up, json!({"outcome": "succeeded"})).await;
    assert_eq!((&told["result"], &told["run"]["workflow_id"]), (&json!("lost"), &json!("v")));
    let finished = replica.client.say_one("finish", &token, json!({"outcome": "succeeded"})).await;
    assert_eq!((&finished["result"], &finished["run"]["id"]), (&json!("ok"), &json!(run)));
    let refused = replica.client.say("heartbeat", json!([{"token": token}])).await;
    assert_eq!((refused.status, refused.cause()), (401, "not-authenticated"), "only the end");
}

fn keys(test: &TestDb, arguments: &[&str]) -> Output {
    singletrack(&[&["keys"], arguments].concat()).env("DATABASE_URL", &test.url).output().unwrap()
}

fn text(output: &[u8]) -> String {
    String::from_utf8(output.to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_makes_lists_and_revokes_keys_and_nothing_but_the_making_shows_one() {
    let test = TestDb::new().await;
    let made = keys(&test, &["create", "ci", "--scope", "enqueue", "-s", "read", "--workflow", "w*"]);
    assert!(made.status.success() && text(&made.stderr).contains("shown this once"), "{made:?}");
    let token = text(&made.stdout).trim_end().to_owned();
    let secret = token.rsplit('_').next().unwrap();
    assert_eq!(secret.len(), 64);
    let mut command = singletrack(&["serve"]);
    command.env("DATABASE_URL", &test.url).env("SINGLETRACK_LISTEN", "127.0.0.1:0").env("RUST_LOG", "trace");
    let mut replica = Process::start(command);
    let client = replica.client.having(&token);
    assert_eq!(client.get("/api/v1/runs").await.status, 200);
    assert_eq!(client.enqueue("w").await.status, 404);
    let wrong = format!("{}0", &token[..token.len() - 1]);
    let wrong = if wrong == token { format!("{}1", &token[..token.len() - 1]) } else { wrong };
    assert_eq!(replica.client.having(&wrong).get("/api/v1/runs").await.status, 401);
    replica.signal(Signal::TERM);
    assert_eq!(replica.ended(LIMIT).await, 0);
    let said = replica.rest();
    assert!(said.contains("/api/v1/runs"), "{said}");
    assert!(!said.contains(secret) && !said.contains(wrong.rsplit('_').next().unwrap()));
    let used: bool =
        sqlx::query_scalar("select last_used_at is not null from api_keys").fetch_one(&test.sql).await.unwrap();
    assert!(used, "written at the latest when the replica stops");
    let listed = keys(&test, &["ls"]);
    let line = text(&listed.stdout);
    for part in [id_of(&token), "ci", "enqueue,read", "w*", "good", "used"] {
        assert!(line.contains(part), "{line}");
    }
    let as_json = text(&keys(&test, &["ls", "--json"]).stdout);
    let row: String =
        sqlx::query_scalar("select to_jsonb(k)::text from api_keys k").fetch_one(&test.sql).await.unwrap();
    let audit: String =
        sqlx::query_scalar("select jsonb_agg(a)::text from audit_log a").fetch_one(&test.sql).await.unwrap();
    for shown in [&line, &as_json, &row, &audit] {
        assert!(!shown.contains(secret), "{shown}");
    }
    let printed = singletrack(&["serve", "--print-config"]).env("SINGLETRACK_API_KEY", &token).output().unwrap();
    assert!(!text(&printed.stdout).contains(secret));
    let revoked = keys(&test, &["revoke", id_of(&token), "--json"]);
    let document: Value = serde_json::from_slice(&revoked.stdout).unwrap();
    assert_eq!(document, json!({"id": id_of(&token), "revoked": true}));
    assert!(text(&keys(&test, &["ls"]).stdout).contains("revoked"));
    for (arguments, code, says) in [
        (&["create", "x"][..], 2, "--scope"),
        (&["create", "x", "-s", "write"], 2, "`write` is no scope"),
        (&["create", "x", "-s", "read", "-w", "a b"], 64, "--workflow: `a b`"),
        (&["revoke", "000000000000"], 1, "no key has the id 000000000000"),
    ] {
        let refused = keys(&test, arguments);
        assert_ne!(refused.status.code(), Some(0), "{refused:?}");
        assert!(text(&refused.stderr).contains(says), "{code} {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn serve_listens_beyond_loopback_only_with_a_key_or_when_told_so_in_so_many_words() {
    let test = TestDb::new().await;
    let serve = |more: &[(&str, &str)]| {
        let mut command = singletrack(&["serve"]);
        command.env("DATABASE_URL", &test.url).env("SINGLETRACK_LISTEN", EVERYWHERE).envs(more.iter().copied());
        command
    };
    let mut refused = Process::spawn(serve(&[]));
    assert_eq!(refused.ended(LIMIT).await, 1);
    let why = refused.rest();
    assert!(why.contains("singletrack keys create") && why.contains("SINGLETRACK_ALLOW_PUBLIC=on"), "{why}");
    let local = |client: &Client| Client::new(client.base.replace("0.0.0.0", "127.0.0.1"));
    let public = Process::start(serve(&[("SINGLETRACK_ALLOW_PUBLIC", "on")]));
    assert_eq!(local(&public.client).get("/api/v1/runs").await.status, 200);
    let token = key(&test, "ci", &[Scope::Read], None).await;
    let closed = async || (local(&public.client).get("/api/v1/runs").await.status == 401).then_some(());
    eventually("a key is never ignored", Duration::from_secs(8), closed).await;
    let replica = Process::start(serve(&[]));
    let client = local(&replica.client);
    assert_eq!(client.get("/api/v1/runs").await.status, 401);
    // Others come by names that this machine does not know of: a probe, and whoever has a key.
    let by_name = |client: &Client, path| Answer::of(client.request(Method::GET, path).header("Host", "st.internal"));
    assert_eq!(by_name(&client, "/livez").await.unwrap().status, 200);
    assert_eq!(by_name(&client.having(&token), "/api/v1/runs").await.unwrap().status, 200);
    assert_eq!(by_name(&client, "/api/v1/runs").await.unwrap().status, 403);
    sqlx::query("update api_keys set revoked_at = now(), revoked_by = 'test'").execute(&test.sql).await.unwrap();
    assert_eq!(Process::spawn(serve(&[])).ended(LIMIT).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_over_its_rate_is_told_when_to_come_back_and_no_other_key_and_no_lease_is() {
    let test = TestDb::new().await;
    let [one, other] =
        [key(&test, "one", &[Scope::Admin], None).await, key(&test, "other", &[Scope::Admin], None).await];
    let settings = Settings { workers: Some("0".into()), key_rate: Some("5".into()), ..short_lease() };
    let replica = Replica::with(&test, settings).await;
    let (one, other) = (replica.client.having(&one), replica.client.having(&other));
    let mut answers = Vec::new();
    for _ in 0..200 {
        answers.push(one.get("/api/v1/queues").await);
        if answers.last().unwrap().status == 429 {
            break;
        }
    }
    assert!(answers.len() > 5 && answers[..5].iter().all(|answer| answer.status == 200), "{answers:?}");
    let refused = answers.last().unwrap();
    assert_eq!(
        (refused.status, refused.cause(), &refused.headers["retry-after"]),
        (429, "too-many-requests", &"1".parse().unwrap())
    );
    assert_eq!(other.get("/api/v1/queues").await.status, 200);
    for _ in 0..20 {
        assert_eq!(one.say("heartbeat", json!([])).await.status, 422, "it is read");
    }
    assert_eq!(one.get("/livez").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_leads_here_gets_in_by_no_made_up_key_while_none_is_asked_for() {
    let test = TestDb::new().await;
    let replica = Replica::with(&test, Settings { workers: Some("0".into()), ..short_lease() }).await;
    let key = format!("st_{}_{}", "0".repeat(12), "0".repeat(64));
    let request = replica.client.having(&key).request(Method::GET, "/api/v1/runs").header("Host", "evil.example");
    let refused = Answer::of(request).await.unwrap();
    assert_eq!((refused.status, refused.cause()), (403, "host-not-allowed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_tells_a_bound_key_of_its_own_workflows_and_ends_with_the_key() {
    let test = TestDb::new().await;
    let boss = key(&test, "boss", &[Scope::Admin], None).await;
    let bound = key(&test, "bound", &[Scope::Read], Some(&["own*"])).await;
    let replica = Replica::api_only(&test).await;
    let mut stream = Stream::begun(&replica.client.having(&bound), "/api/v1/events").await;
    plant::run(&test, "foreign", Status::Queued).await;
    let own = plant::run(&test, "own@a", Status::Queued).await;
    let told = stream.next().await.unwrap();
    assert_eq!(told.data["run_id"], json!(own.run_id), "{told:?}");
    sqlx::query("update api_keys set revoked_at = now(), revoked_by = 'test' where name = 'bound'")
        .execute(&test.sql)
        .await
        .unwrap();
    assert_eq!(stream.next().await, None, "whoever is not let in any more is told nothing more");
    drop(boss);
}
