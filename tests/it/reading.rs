//! Reading runs: one, held until its end, in lists, and what happened to it.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::Method;
use serde_json::{Value, json};
use singletrack::domain::{Lease, LogChunk, Status, Stream};
use singletrack::store::claim::{Claim, claim, release};
use singletrack::store::logs::{self, Printed};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::plant;
use crate::support::replica::{Answer, Client, Replica};

const NOBODY: &str = "0198c5a0-5a1e-7c5e-9d3c-3f6d2a1b4c5d";

/// The ids on a page.
fn ids(answer: &Answer) -> Vec<String> {
    assert_eq!(answer.status, 200, "{answer:?}");
    let items = answer.body["items"].as_array().unwrap();
    items.iter().map(|run| run["id"].as_str().unwrap().to_owned()).collect()
}

/// A list read to its end in pages of `limit`; `meanwhile` happens after each page.
async fn pages(client: &Client, path: &str, limit: usize, mut meanwhile: impl AsyncFnMut()) -> Vec<Value> {
    let separator = if path.contains('?') { '&' } else { '?' };
    let first = format!("{path}{separator}limit={limit}");
    let (mut entries, mut next) = (Vec::new(), first);
    loop {
        let page = client.get(&next).await;
        assert_eq!((page.status, page.names()), (200, vec!["items", "next_cursor"]), "{page:?}");
        let items = page.body["items"].as_array().unwrap();
        entries.extend(items.iter().cloned());
        let Some(cursor) = page.body["next_cursor"].as_str() else {
            assert!(items.len() <= limit && !page.headers.contains_key("link"));
            return entries;
        };
        assert_eq!(items.len(), limit, "only the last page may be short");
        let link = page.headers["link"].to_str().unwrap();
        let query = link.strip_prefix("<?").and_then(|link| link.strip_suffix(">; rel=\"next\"")).unwrap();
        assert!(query.contains(&format!("limit={limit}")) && query.ends_with(&format!("cursor={cursor}")), "{link}");
        next = format!("{}?{query}", path.split('?').next().unwrap());
        meanwhile().await;
    }
}

async fn held(client: &Client, id: Uuid, prefer: &str) -> Answer {
    let request = client.request(Method::GET, &format!("/api/v1/runs/{id}")).header("Prefer", prefer);
    Answer::of(request).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_404_and_what_cannot_be_an_id_is_422() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    for part in ["", "/attempts", "/events", "/logs"] {
        let answer = replica.client.get(&format!("/api/v1/runs/{NOBODY}{part}")).await;
        assert_eq!((answer.status, answer.cause()), (404, "not-found"), "{part}: {answer:?}");
        assert!(answer.body["detail"].as_str().unwrap().contains(NOBODY));
        let answer = replica.client.get(&format!("/api/v1/runs/17{part}")).await;
        assert_eq!(answer.mistakes(), ["parameter id"], "{part}");
    }
    let held = held(&replica.client, NOBODY.parse().unwrap(), "wait=30").await;
    assert_eq!(held.status, 404, "nobody waits for what is not there");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_held_until_the_run_is_final_or_the_time_is_over() {
    let test = TestDb::new().await;
    let replica = Replica::start(&test).await;
    let client = &replica.client;
    let gate = tempfile::tempdir().unwrap();
    let open = gate.path().join("open");
    client.define("w", &format!("while [ ! -e {} ]; do sleep 0.05; done", open.display())).await;
    let id = client.enqueue("w").await.run_id();

    let since = Instant::now();
    let answer = held(client, id, "respond-async, wait=1").await;
    assert!(since.elapsed() >= Duration::from_secs(1), "{:?}", since.elapsed());
    assert_eq!((answer.status, &answer.body["status"]), (200, &json!("running")));
    assert_eq!(answer.headers["preference-applied"], "wait=1");

    let waiting = tokio::spawn({
        let client = client.clone();
        async move { held(&client, id, "wait=60").await }
    });
    // By now the other is being held: it was sent before this one, which was answered.
    assert_eq!(held(client, id, "wait=0").await.body["status"], "running");
    assert!(!waiting.is_finished());
    std::fs::write(open, "").unwrap();
    let since = Instant::now();
    let answer = waiting.await.unwrap();
    assert_eq!((answer.status, &answer.body["status"]), (200, &json!("succeeded")));
    assert!(since.elapsed() < Duration::from_secs(30), "told when it ended, not when the time was over");
    replica.finish().await;
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preference_is_applied_as_far_as_it_goes_and_refused_when_it_says_nothing() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let id = plant::run(&test, "w", Status::Succeeded).await.run_id;
    for (prefer, applied) in [("wait=5", Some("wait=5")), ("wait=1000", Some("wait=60")), ("return=minimal", None)] {
        let answer = held(&replica.client, id, prefer).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers.get("preference-applied").map(|value| value.to_str().unwrap()), applied);
    }
    for prefer in ["wait=soon", "wait=-1", "wait=1.5", "wait="] {
        assert_eq!(held(&replica.client, id, prefer).await.mistakes(), ["header Prefer"], "{prefer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_and_counts_are_narrowed_by_every_filter() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    let body = json!({"executor": {"type": "command", "argv": ["true"]}, "queue": "fast", "labels": {"team": "a"}});
    client.put("/api/v1/workflows/deploy", body).await;
    let label = json!({"labels": {"team": "b", "x": "y=z"}});
    let prod = client.post("/api/v1/workflows/deploy@prod/runs", label).await.body;
    let stage = client.enqueue("deploy@stage").await.body;
    let failed = plant::run(&test, "old", Status::Failed).await.run_id.to_string();
    let done = plant::run(&test, "old", Status::Succeeded).await.run_id.to_string();
    let id = |run: &Value| run["id"].as_str().unwrap().to_owned();
    let (prod_id, stage_id) = (id(&prod), id(&stage));
    let all = [&done, &failed, &stage_id, &prod_id];
    let at = |run: &Value| run["created_at"].as_str().unwrap().replace('+', "%2B");
    let cases: Vec<(String, Vec<&String>)> = vec![
        (String::new(), all.to_vec()),
        ("workflow_id=deploy".into(), vec![]),
        ("workflow_id=deploy@prod".into(), vec![&prod_id]),
        ("definition=deploy".into(), vec![&stage_id, &prod_id]),
        ("status=queued".into(), vec![&stage_id, &prod_id]),
        ("status=failed,succeeded".into(), vec![&done, &failed]),
        ("status=failed&status=queued".into(), vec![&failed, &stage_id, &prod_id]),
        ("queue=fast".into(), vec![&stage_id, &prod_id]),
        ("queue=default".into(), vec![&done, &failed]),
        ("label=team=a".into(), vec![&stage_id]),
        ("label=team=b&label=x=y=z".into(), vec![&prod_id]),
        ("label=team=b&label=x=y".into(), vec![]),
        (format!("since={}", at(&stage)), vec![&done, &failed, &stage_id]),
        (format!("until={}", at(&stage)), vec![&prod_id]),
        (format!("since={}&until={}", at(&prod), at(&stage)), vec![&prod_id]),
        ("definition=deploy&status=queued&label=team=a&queue=fast".into(), vec![&stage_id]),
    ];
    for (query, expected) in cases {
        let listed = ids(&client.get(&format!("/api/v1/runs?{query}")).await);
        assert_eq!(listed.iter().collect::<Vec<_>>(), expected, "{query}");
        let counts = client.get(&format!("/api/v1/runs/counts?{query}")).await;
        assert_eq!(counts.names().len(), Status::ALL.len(), "every status is there: {counts:?}");
        let total: i64 = counts.body.as_object().unwrap().values().map(|count| count.as_i64().unwrap()).sum();
        assert_eq!(total, expected.len() as i64, "{query}");
    }
    let counts = client.get("/api/v1/runs/counts").await.body;
    assert_eq!((&counts["queued"], &counts["failed"], &counts["running"]), (&json!(2), &json!(1), &json!(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn paging_shows_every_run_once_while_new_ones_arrive() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    // In one statement, so that all have the same time and only the id tells them apart; and some with a time of their own.
    skipped(&test.sql, 17).await;
    for _ in 0..8 {
        skipped(&test.sql, 1).await;
    }
    let order = "select id::text from test_runs order by created_at desc, id desc";
    for limit in [1, 2, 7, 24, 25, 26, 200] {
        let expected: Vec<String> = sqlx::query_scalar(order).fetch_all(&test.sql).await.unwrap();
        let read = pages(&replica.client, "/api/v1/runs", limit, async || skipped(&test.sql, 1).await).await;
        let read: Vec<&str> = read.iter().map(|run| run["id"].as_str().unwrap()).collect();
        assert_eq!(read, expected, "limit {limit}");
    }
    assert_eq!(ids(&replica.client.get("/api/v1/runs").await).len(), 50, "without a limit");
    test.check().await;
}

/// Plants runs that were skipped.
async fn skipped(sql: &PgPool, count: i32) {
    sqlx::query(
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, finished_at)
         select gen_random_uuid(), 'w', 'w', 1, 'skipped', 'command', now() from generate_series(1, $1)",
    )
    .bind(count)
    .execute(sql)
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_is_good_for_the_list_it_came_from_only() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    skipped(&test.sql, 3).await;
    let page = client.get("/api/v1/runs?limit=1&status=skipped").await;
    let cursor = page.body["next_cursor"].as_str().unwrap();
    let good = client.get(&format!("/api/v1/runs?limit=2&status=skipped&cursor={cursor}")).await;
    assert_eq!((ids(&good).len(), &good.body["next_cursor"]), (2, &Value::Null), "another limit is no other list");
    let flipped =
        if cursor.starts_with('A') { cursor.replacen('A', "B", 1) } else { cursor.replacen(&cursor[..1], "A", 1) };
    let id = ids(&good)[0].clone();
    let wrong = [
        format!("/api/v1/runs?cursor={cursor}"),
        format!("/api/v1/runs?status=queued&cursor={cursor}"),
        format!("/api/v1/runs?status=skipped&cursor={}", &cursor[..cursor.len() - 2]),
        format!("/api/v1/runs?status=skipped&cursor={flipped}"),
        "/api/v1/runs?cursor=%00".to_owned(),
        "/api/v1/runs?cursor=bnVsbA".to_owned(),
        "/api/v1/runs?cursor=".to_owned(),
        format!("/api/v1/workflows?cursor={cursor}"),
        format!("/api/v1/runs/{id}/events?cursor={cursor}"),
        format!("/api/v1/runs/{id}/logs?cursor={cursor}"),
    ];
    for path in wrong {
        let answer = client.get(&path).await;
        if path.ends_with("%00") {
            assert_eq!(answer.mistakes(), ["parameter cursor"]);
            continue;
        }
        assert_eq!((answer.status, answer.cause()), (400, "invalid-cursor"), "{path}: {answer:?}");
    }
}

/// The cursor with another place in it, and the mark of its list.
fn moved(cursor: &str, place: Value) -> String {
    let cursor: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(cursor).unwrap()).unwrap();
    URL_SAFE_NO_PAD.encode(json!([cursor[0], place]).to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_that_somebody_has_changed_is_refused() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let client = &replica.client;
    skipped(&test.sql, 3).await;
    for workflow in ["w", "other"] {
        plant::workflow(&test.sql, workflow, &["true"]).await;
    }
    let cursor = async |path: &str| {
        let page = client.get(&format!("{path}?limit=1")).await;
        page.body["next_cursor"].as_str().unwrap_or_else(|| panic!("{page:?}")).to_owned()
    };
    let (runs, workflows) = (cursor("/api/v1/runs").await, cursor("/api/v1/workflows").await);
    for at in [
        "2026-01-31T08:00:00Z",
        "-5000-01-01T00:00:00Z",
        "-262142-01-01T00:00:00Z",
        "+262142-12-31T23:59:59Z",
        "yesterday",
    ] {
        for path in [
            format!("/api/v1/runs?limit=1&cursor={}", moved(&runs, json!([at, NOBODY]))),
            format!("/api/v1/workflows?limit=1&cursor={}", moved(&workflows, json!([at, "w"]))),
        ] {
            let answer = client.get(&path).await;
            assert_eq!((answer.status, answer.cause()), (400, "invalid-cursor"), "{at}: {answer:?}");
        }
    }
    let nul = moved(&workflows, json!(["2026-01-31T08:00:00Z", "w\0"]));
    let answer = client.get(&format!("/api/v1/workflows?cursor={nul}")).await;
    assert_eq!((answer.status, answer.cause()), (400, "invalid-cursor"), "{answer:?}");
    assert_eq!(client.get(&format!("/api/v1/runs?limit=1&cursor={runs}")).await.status, 200, "as it was it is taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_and_unknown_parameters_are_named() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let id = plant::run(&test, "w", Status::Queued).await.run_id;
    for list in ["workflows".to_owned(), "runs".into(), format!("runs/{id}/events"), format!("runs/{id}/logs")] {
        for limit in ["0", "201", "-1", "ten", "", "1&limit=2", "99999999999999999999"] {
            let answer = replica.client.get(&format!("/api/v1/{list}?limit={limit}")).await;
            assert_eq!(answer.mistakes(), ["parameter limit"], "{list} {limit}");
            let detail = answer.body["detail"].as_str().unwrap();
            assert!(detail.contains("1 to 200") || limit.contains('&'), "it says what would be right: {detail}");
        }
        let answer = replica.client.get(&format!("/api/v1/{list}?offset=3")).await;
        assert_eq!(answer.mistakes(), ["parameter offset"]);
        assert!(answer.body["detail"].as_str().unwrap().contains("limit, cursor"), "{answer:?}");
    }
    let wrong = [
        "status=done",
        "status=",
        "since=yesterday",
        "until=2026-01-01",
        // Postgres has no such years, or RFC 3339 has not.
        "since=-5000-01-01T00:00:00Z",
        "until=%2B262142-01-01T00:00:00Z",
        "since=0000-12-31T23:59:59Z",
        "until=%2B10000-01-01T00:00:00Z",
        "label=team",
        "workflow_id=a%20b",
        "definition=@",
        "queue=%00",
        "workflow=w",
    ];
    for query in wrong {
        let name = query.split('=').next().unwrap();
        for list in ["runs", "runs/counts"] {
            let answer = replica.client.get(&format!("/api/v1/{list}?{query}")).await;
            assert_eq!(answer.mistakes(), [format!("parameter {name}")], "{query}");
        }
    }
    let answer = replica.client.get("/api/v1/runs?since=2026-01-31T08:00:00+00:00").await;
    assert!(answer.body["detail"].as_str().unwrap().contains("%2B"), "the commonest slip is explained: {answer:?}");
    assert_eq!(replica.client.get("/api/v1/runs/counts?limit=1").await.mistakes(), ["parameter limit"]);
    for path in
        ["/api/v1/workflows/w/runs", "/api/v1/runs/batch", &format!("/api/v1/runs/{id}/cancel"), "/api/v1/claims"]
    {
        let answer = replica.client.post(&format!("{path}?on_conflict=wait"), json!({})).await;
        assert_eq!(answer.mistakes(), ["parameter on_conflict"], "{path}");
    }
    assert_eq!(replica.client.get(&format!("/api/v1/runs/{id}?pretty")).await.mistakes(), ["parameter pretty"]);
    assert_eq!(replica.client.get("/api/v1/schedules/%21/next").await.mistakes(), ["parameter workflow_id"]);
    for path in ["/livez?x=1".to_owned(), format!("/api/script-run/{id}?x=1"), format!("/api/v1/runs/{id}?")] {
        assert_eq!(replica.client.get(&path).await.status, 200, "{path}");
    }
    assert_eq!(
        replica.client.get(&format!("/api/v1/runs/{id}/logs?attempt=x")).await.mistakes(),
        ["parameter attempt"]
    );
}

/// Claims the one run that is due.
async fn take(test: &TestDb) -> Lease {
    let types = ["command".to_owned()];
    let request = Claim {
        worker: "tester",
        actor: None,
        queues: None,
        executor_types: &types,
        workflows: None,
        bound: None,
        claim_id: None,
        recent: None,
        limit: 1,
        timeout_seconds: 600,
        heartbeat_timeout_seconds: 60,
    };
    let claimed = test.db.with(async |connection| claim(connection, &request).await).await.unwrap();
    claimed[0].lease
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_are_listed_oldest_first_with_the_open_one_last_and_events_tell_how() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let id = plant::run(&test, "w", Status::Queued).await.run_id;
    let path = format!("/api/v1/runs/{id}");
    assert_eq!(replica.client.get(&format!("{path}/attempts")).await.body, json!({"items": []}));
    let first = take(&test).await;
    test.db.with(async |connection| release(connection, &[first], "tester", None).await).await.unwrap();
    let second = take(&test).await;

    let attempts = replica.client.get(&format!("{path}/attempts")).await.body;
    let told = |name: &str| -> Vec<Value> {
        attempts["items"].as_array().unwrap().iter().map(|attempt| attempt[name].clone()).collect()
    };
    assert_eq!(told("status"), ["released", "running"]);
    assert_eq!(told("fence"), [first.fence, second.fence]);
    assert_eq!(told("attempt"), [1, 1], "one that was given back does not count");
    assert_eq!(told("finished_at").iter().map(Value::is_null).collect::<Vec<_>>(), [false, true]);
    assert!(!attempts.to_string().contains(&second.secret.unwrap().to_string()), "the lease is its holder's alone");

    for limit in [1, 2, 3, 4, 5] {
        let events = pages(&replica.client, &format!("{path}/events"), limit, async || {}).await;
        let statuses: Vec<_> = events.iter().map(|event| (&event["from_status"], &event["to_status"])).collect();
        let (queued, running) = (&json!("queued"), &json!("running"));
        let expected = [(&Value::Null, queued), (queued, running), (running, queued), (queued, running)];
        assert_eq!(statuses, expected, "limit {limit}");
        assert_eq!(events[2]["actor"], "tester");
    }
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_read_in_the_order_of_its_making_whole_or_by_attempt() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    // An attempt before the one under way.
    let earlier: i64 = sqlx::query_scalar("select nextval('run_fence')").fetch_one(&test.sql).await.unwrap();
    let lease = plant::run(&test, "w", Status::Running).await;
    for statement in [
        "insert into run_attempts (run_id, fence, attempt, status, worker, started_at, finished_at)
         values ($1, $2, 1, 'failed', 'tester', now(), now())",
        "update test_runs set attempt = 2, max_attempts = 2, version = version + 1 where id = $1 and $2 < fence",
        "with run as (select $1) insert into run_logs (fence, stream, seq, text)
         select $2, 'stdout', n, 'first ' || n || e'\\n' from run, generate_series(3, 1, -1) n",
    ] {
        sqlx::query(statement).bind(lease.run_id).bind(earlier).execute(&test.sql).await.unwrap();
    }
    let chunk = |stream, text: &str| LogChunk { stream, text: text.to_owned() };
    let chunks = [chunk(Stream::Stderr, "a"), chunk(Stream::Stdout, "b"), chunk(Stream::System, "c")];
    let printed = [Printed { lease, first_seq: 1, chunks: chunks.into() }];
    test.db.with(async |connection| logs::append(connection, &printed).await).await.unwrap();

    let path = format!("/api/v1/runs/{}/logs", lease.run_id);
    let texts = |entries: &[Value]| -> String { entries.iter().map(|entry| entry["text"].as_str().unwrap()).collect() };
    for limit in [1, 2, 3, 4, 5, 6, 7] {
        for (query, expected) in [
            ("", "first 1\nfirst 2\nfirst 3\nabc"),
            ("?attempt=1", "first 1\nfirst 2\nfirst 3\n"),
            ("?attempt=2", "abc"),
        ] {
            let entries = pages(&replica.client, &format!("{path}{query}"), limit, async || {}).await;
            assert_eq!(texts(&entries), expected, "limit {limit} {query}");
        }
    }
    let entries = replica.client.get(&format!("{path}?attempt=2")).await.body;
    let streams: Vec<&str> =
        entries["items"].as_array().unwrap().iter().map(|e| e["stream"].as_str().unwrap()).collect();
    assert_eq!(streams, ["stderr", "stdout", "system"]);
    assert_eq!(replica.client.get(&format!("{path}?attempt=3")).await.body, json!({"items": [], "next_cursor": null}));
}
