//! Every route of the document, asked by everybody: each scope, no key, keys that are no good; about one's own workflow and another's.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};
use singletrack::domain::{Scope, Status};
use uuid::Uuid;

use crate::support::access::key;
use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Answer, Client, Replica};

/// What a call is about, where a key is bound to the workflows `own*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum About {
    /// One workflow, or one of its runs: another's is not there.
    One,
    /// Many, of which those of others are left out.
    Many,
    /// What belongs to all: a bound key may not.
    All,
    /// A lease, which is its own proof; or nothing.
    Nothing,
}

use About::{All, Many, Nothing, One};
use Scope::{Admin, Enqueue, Read, Work};

/// The scope of each operation, written down a second time: it changes on purpose only.
const TABLE: &[(&str, Option<Scope>, About)] = &[
    ("get /livez", None, Nothing),
    ("get /readyz", None, Nothing),
    ("get /openapi.json", None, Nothing),
    ("get /metrics", Some(Read), All),
    ("post /api/v1/leases/finish", None, Nothing),
    ("get /api/v1/workflows", Some(Read), Many),
    ("get /api/v1/workflows/{id}", Some(Read), One),
    ("put /api/v1/workflows/{id}", Some(Admin), One),
    ("delete /api/v1/workflows/{id}", Some(Admin), One),
    ("get /api/v1/workflows/{id}/revisions", Some(Read), One),
    ("get /api/v1/schedules/{workflow_id}/next", Some(Read), One),
    ("post /api/v1/workflows/{id}/runs", Some(Enqueue), One),
    ("post /api/v1/runs/batch", Some(Enqueue), Many),
    ("post /api/v1/runs/{id}/cancel", Some(Enqueue), One),
    ("post /api/v1/runs/{id}/rerun", Some(Enqueue), One),
    ("post /api/v1/runs/cancel", Some(Enqueue), Many),
    ("post /api/v1/runs/rerun", Some(Enqueue), Many),
    ("post /api/v1/workflows/{id}/pause", Some(Admin), One),
    ("post /api/v1/workflows/{id}/resume", Some(Admin), One),
    ("get /api/v1/queues", Some(Read), Many),
    ("post /api/v1/queues/{id}/pause", Some(Admin), All),
    ("post /api/v1/queues/{id}/resume", Some(Admin), All),
    ("get /api/v1/runs", Some(Read), Many),
    ("get /api/v1/runs/counts", Some(Read), Many),
    ("get /api/v1/runs/{id}", Some(Read), One),
    ("get /api/v1/runs/{id}/attempts", Some(Read), One),
    ("get /api/v1/runs/{id}/events", Some(Read), One),
    ("get /api/v1/runs/{id}/refusals", Some(Read), One),
    ("get /api/v1/runs/{id}/logs", Some(Read), One),
    ("get /api/v1/events", Some(Read), Nothing),
    ("get /api/v1/slots", Some(Read), Many),
    ("get /api/v1/workers", Some(Read), Nothing),
    ("post /api/v1/claims", Some(Work), Many),
    ("post /api/v1/leases/heartbeat", Some(Work), Nothing),
    ("post /api/v1/leases/release", Some(Work), Nothing),
    ("post /api/v1/leases/logs", Some(Work), Nothing),
    ("post /api/workflow/test-run", Some(Enqueue), One),
    ("get /api/script-run/{id}", Some(Read), One),
    ("get /api/v1/keys", Some(Admin), All),
    ("post /api/v1/keys", Some(Admin), All),
    ("delete /api/v1/keys/{id}", Some(Admin), All),
    ("get /api/v1/audit", Some(Admin), All),
    ("get /api/v1/system", Some(Admin), All),
];

/// Every operation of the document, with the scope that it names.
fn documented() -> BTreeMap<String, Option<String>> {
    let document = serde_json::to_value(singletrack::api::document()).unwrap();
    let mut found = BTreeMap::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let named = operation["security"].as_array().unwrap().iter().find_map(|one| one["api_key"][0].as_str());
            found.insert(format!("{method} {path}"), named.map(str::to_owned));
        }
    }
    found
}

#[test]
fn the_document_names_the_scope_of_every_route() {
    let table = TABLE.iter().map(|(call, scope, _)| ((*call).to_owned(), scope.map(|scope| scope.as_str().to_owned())));
    assert_eq!(documented(), table.collect());
}

/// A run that is queued and one that is over, of a workflow with a schedule.
struct Planted {
    workflow: &'static str,
    queued: Uuid,
    over: Uuid,
}

async fn planted(test: &TestDb, workflow: &'static str) -> Planted {
    let over = plant::run(test, workflow, Status::Succeeded).await.run_id;
    let queued = plant::run(test, workflow, Status::Queued).await.run_id;
    let schedule = json!({"cron": "0 0 1 1 *", "time_zone": "UTC", "missed": "skip"});
    sqlx::query("update workflow_revisions set schedule = $1").bind(schedule).execute(&test.sql).await.unwrap();
    sqlx::query("update test_runs set executor_type = 'pull' where status = 'queued'")
        .execute(&test.sql)
        .await
        .unwrap();
    Planted { workflow, queued, over }
}

/// Sends a call about what was planted, with a body that can be carried out.
async fn ask(client: &Client, call: &str, about: &Planted) -> Answer {
    let (method, path) = call.split_once(' ').unwrap();
    let run = if call.ends_with("rerun") { about.over } else { about.queued };
    let id = match path {
        _ if path.contains("/workflows/") || path.contains("/schedules/") => about.workflow.to_owned(),
        _ if path.contains("/queues/") => "some".to_owned(),
        _ if path.contains("/keys/") => "000000000000".to_owned(),
        _ => run.to_string(),
    };
    let path = path.replace("{id}", &id).replace("{workflow_id}", &id);
    let workflow = about.workflow;
    let token = singletrack::domain::Lease { run_id: Uuid::new_v4(), fence: 1, secret: Some(Uuid::new_v4()) }.token();
    let body = match call {
        _ if method == "get" || method == "delete" => None,
        "put /api/v1/workflows/{id}" => Some(json!({"executor": {"type": "pull"}, "schedule": {"cron": "0 0 1 1 *"}})),
        "post /api/v1/runs/batch" => Some(json!({"runs": [{"workflow_id": workflow}]})),
        "post /api/v1/runs/cancel" | "post /api/v1/runs/rerun" => {
            Some(json!({"workflow_id": workflow, "dry_run": true}))
        }
        "post /api/v1/claims" => Some(json!({"worker": "w", "claim_id": workflow, "workflows": [workflow]})),
        "post /api/v1/leases/finish" => Some(json!({"leases": [{"token": token, "outcome": "failed"}]})),
        "post /api/v1/leases/logs" => Some(json!({"token": token, "stream": "stdout", "seq": 1, "text": "x"})),
        _ if call.contains("/leases/") => Some(json!({"leases": [{"token": token}]})),
        "post /api/workflow/test-run" => Some(json!({"workflow_id": workflow})),
        "post /api/v1/keys" => Some(json!({"name": Uuid::new_v4(), "scopes": ["read"]})),
        _ => Some(json!({})),
    };
    // A stream would never end: the id of no event is refused, of those who are let in.
    let path = if path == "/api/v1/events" { "/api/v1/events?last_event_id=x".to_owned() } else { path };
    let request = client.request(method.to_uppercase().parse::<Method>().unwrap(), &path);
    Answer::of(match body {
        Some(body) => request.json(&body),
        None => request,
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_lets_in_those_with_its_scope_and_nobody_else() {
    let test = TestDb::new().await;
    let own = planted(&test, "own").await;
    let mut bearers = vec![("no key", None), ("no key at all", Some("Bearer".to_owned()))];
    for (name, state) in [
        ("expired", "expires_at = now()"),
        ("revoked", "revoked_at = now(), revoked_by = 'test'"),
        ("changed", "secret_hash = sha256('x')"),
    ] {
        bearers.push((name, Some(key(&test, name, &[Admin], None).await)));
        let change = match state {
            "expires_at = now()" => "update api_keys set expires_at = now() where name = $1",
            "secret_hash = sha256('x')" => "update api_keys set secret_hash = sha256('x') where name = $1",
            _ => "update api_keys set revoked_at = now(), revoked_by = 'test' where name = $1",
        };
        sqlx::query(change).bind(name).execute(&test.sql).await.unwrap();
    }
    let mut scoped = Vec::new();
    for scope in Scope::ALL {
        scoped.push((scope, key(&test, scope.as_str(), &[scope], None).await));
    }
    let good = scoped[0].1.clone();
    bearers.push(("another's secret", Some(format!("{}{}", &good[..16], &scoped[1].1[16..]))));
    let replica = Replica::api_only(&test).await;
    for (call, needed, _) in TABLE {
        for (name, bearer) in &bearers {
            let client = bearer.as_ref().map_or(replica.client.clone(), |bearer| replica.client.having(bearer));
            let answer = ask(&client, call, &own).await;
            match needed {
                None => assert_ne!(answer.status, 401, "{call}, {name}"),
                Some(_) => assert_eq!((answer.status, answer.cause()), (401, "not-authenticated"), "{call}, {name}"),
            }
        }
        for (scope, token) in &scoped {
            let answer = ask(&replica.client.having(token), call, &own).await;
            match needed {
                Some(needed) if needed != scope && *scope != Admin => {
                    assert_eq!((answer.status, answer.cause()), (403, "not-allowed"), "{call}, {scope:?}");
                    let detail = answer.body["detail"].as_str().unwrap();
                    assert!(detail.contains(&format!("scope `{}`", needed.as_str())), "{call}, {scope:?}: {detail}");
                }
                _ => assert!(!matches!(answer.status, 401 | 403 | 500..), "{call}, {scope:?}: {answer:?}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn for_a_bound_key_nothing_of_other_workflows_is_there() {
    let test = TestDb::new().await;
    let (own, foreign) = (planted(&test, "own").await, planted(&test, "foreign").await);
    let free = key(&test, "free", &[Admin], None).await;
    let bound = key(&test, "bound", &[Admin], Some(&["own*"])).await;
    let replica = Replica::api_only(&test).await;
    let (free, bound) = (replica.client.having(&free), replica.client.having(&bound));
    // Somebody else's claim under the same names, which a repetition gets again.
    assert_eq!(ask(&free, "post /api/v1/claims", &foreign).await.body["runs"][0]["workflow_id"], "foreign");
    for (call, _, about) in TABLE {
        let (mine, theirs) = (ask(&bound, call, &own).await, ask(&bound, call, &foreign).await);
        let (mine_is, theirs_is) = (mine.body.to_string(), theirs.body.to_string());
        match about {
            One => {
                assert!(!matches!(mine.status, 401 | 403 | 404), "{call}: {mine:?}");
                assert_eq!(theirs.status, 404, "{call}: {theirs:?}");
                let missing = Planted { workflow: "missing", queued: Uuid::new_v4(), over: Uuid::new_v4() };
                // It can't be told from what is not there, but that this is named.
                if *call != "put /api/v1/workflows/{id}" {
                    let missing_is = ask(&free, call, &missing).await;
                    let id = |answer: &Answer| answer.headers["x-request-id"].to_str().unwrap().to_owned();
                    let missing_is = missing_is.body.to_string().replace(&id(&missing_is), &id(&theirs));
                    let named = missing_is.replace("missing", "foreign");
                    let named = named.replace(&missing.queued.to_string(), &foreign.queued.to_string());
                    assert_eq!(
                        theirs_is,
                        named.replace(&missing.over.to_string(), &foreign.over.to_string()),
                        "{call}"
                    );
                }
            }
            Many => {
                assert_eq!((mine.status, theirs.status), (200, 200), "{call}: {mine:?} {theirs:?}");
                let seen = match *call {
                    "post /api/v1/runs/batch" => {
                        assert_eq!(theirs.body["results"][0]["status"], 404, "{theirs:?}");
                        assert_eq!(theirs.body["results"][0]["problem"]["holder"], Value::Null);
                        continue;
                    }
                    "post /api/v1/claims" => theirs.body["runs"].as_array().unwrap().is_empty(),
                    "post /api/v1/runs/cancel" | "post /api/v1/runs/rerun" => theirs.body["matched"] == 0,
                    "get /api/v1/runs/counts" => {
                        (theirs.body["queued"].as_i64().unwrap() + theirs.body["running"].as_i64().unwrap()) <= 1
                    }
                    "get /api/v1/queues" => theirs.body["items"][0]["runs"].to_string().matches('1').count() <= 1,
                    _ => !mine_is.contains("foreign") && mine_is.contains("own"),
                };
                assert!(seen, "{call}: {theirs:?}");
            }
            All => assert_eq!((mine.status, mine.cause()), (403, "not-allowed"), "{call}"),
            Nothing => assert_eq!(mine.status, theirs.status, "{call}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bound_worker_claims_only_what_its_key_is_for_and_one_bulk_request_touches_nothing_else() {
    let test = TestDb::new().await;
    let boss = key(&test, "boss", &[Admin], None).await;
    let worker = key(&test, "worker", &[Work], Some(&["own@*", "too"])).await;
    let starter = key(&test, "starter", &[Enqueue, Read], Some(&["own@*"])).await;
    let replica = Replica::api_only(&test).await;
    let (boss, worker) = (replica.client.having(&boss), replica.client.having(&worker));
    let starter = replica.client.having(&starter);
    for id in ["own", "too", "foreign"] {
        boss.define_pull(id, json!({})).await;
    }
    for id in ["own", "own@a", "own@b", "too", "foreign"] {
        assert_eq!(boss.enqueue(id).await.status, 202);
    }
    let mut claimed: Vec<Value> = worker.claim(json!({"max": 10})).await;
    claimed.sort_by_key(|run| run["workflow_id"].as_str().unwrap().to_owned());
    let names: Vec<_> = claimed.iter().map(|run| run["workflow_id"].as_str().unwrap()).collect();
    assert_eq!(names, ["own@a", "own@b", "too"]);
    let left: Vec<String> = sqlx::query_scalar("select workflow_id from test_runs where status = 'queued' order by 1")
        .fetch_all(&test.sql)
        .await
        .unwrap();
    assert_eq!(left, ["foreign", "own"], "not even taken and kept from it");
    let listed = starter.get("/api/v1/runs?definition=own").await;
    assert_eq!(listed.body["items"].as_array().unwrap().len(), 2, "{listed:?}");
    assert_eq!(starter.get("/api/v1/runs/counts").await.body["running"], 2);
    let asked = starter.post("/api/v1/runs/cancel", json!({"queue": "default"})).await;
    assert_eq!((asked.status, &asked.body["matched"]), (200, &json!(2)), "{asked:?}");
    let untouched: Vec<String> = sqlx::query_scalar(
        "select workflow_id from test_runs where cancel_requested_at is null and finished_at is null order by 1",
    )
    .fetch_all(&test.sql)
    .await
    .unwrap();
    assert_eq!(untouched, ["foreign", "own", "too"]);
}
