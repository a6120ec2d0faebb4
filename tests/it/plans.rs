//! What finished long ago costs nothing: no statement of the service reads the whole of it, though the planner knows how much there is.

use serde_json::Value;
use sqlx::Row as _;
use sqlx::postgres::PgConnection;

use crate::support::database::{TestDb, run_sql};
use crate::support::plant;

/// What each statement was compiled as.
const STATEMENTS: &str = include_str!("../../sqlx-data.json");
/// How those begin that the doctor asks once, on purpose of everything.
const OF_THE_DOCTOR: [&str; 4] =
    ["with violations as", "select greatest(\n            (select max(r.fence)", "with doubled as", "with wrong as"];
/// Indexes that have an entry for each run, attempt or event, of whatever status.
const WHOLE: [&str; 6] = [
    "test_runs_pkey",
    "test_runs_newest",
    "test_runs_by_workflow",
    "run_attempts_pkey",
    "run_events_pkey",
    "run_events_by_run",
];

/// A value for a parameter, narrow where that is a filter.
fn value(kind: &str) -> String {
    let one = |kind: &str| match kind {
        "Int2" | "Int4" | "Int8" | "Float8" => ("100", kind.to_lowercase()),
        "Bool" => ("false", "bool".to_owned()),
        "Interval" => ("10 s", "interval".to_owned()),
        "Jsonb" => ("{}", "jsonb".to_owned()),
        "Timestamptz" => ("2026-01-01T00:00:00Z", "timestamptz".to_owned()),
        "Uuid" => ("0198c5a0-5a1e-7c5e-9d3c-3f6d2a1b4c5d", "uuid".to_owned()),
        // a number too: some are read as one
        "Text" | "Bytea" => ("100", kind.to_lowercase()),
        other => panic!("a parameter of another type: {other}"),
    };
    match kind.strip_suffix("Array") {
        Some(kind) => format!("array['{}']::{}[]", one(kind).0, one(kind).1),
        None => format!("'{}'::{}", one(kind).0, one(kind).1),
    }
}

/// The parts of a plan that read all of a table that has the history in it.
fn readers(plan: &Value, found: &mut Vec<String>) {
    let text = |name: &str| plan[name].as_str().unwrap_or_default();
    let is_big = ["test_runs", "run_attempts", "run_events"].contains(&text("Relation Name"));
    let by_all = WHOLE.contains(&text("Index Name")) && plan["Index Cond"].is_null();
    if by_all || is_big && text("Node Type") == "Seq Scan" {
        found.push(format!("{} {} {}", text("Node Type"), text("Relation Name"), text("Index Name")));
    }
    plan["Plans"].as_array().into_iter().flatten().for_each(|part| readers(part, found));
}

/// Whether some part of it looks for a slot from the end.
fn looks_back(plan: &Value) -> bool {
    plan["Index Name"] == "test_runs_one_slot" && plan["Scan Direction"] == "Backward"
        || plan["Plans"].as_array().is_some_and(|parts| parts.iter().any(looks_back))
}

async fn plan(connection: &mut PgConnection, query: &str, arguments: &[String]) -> Value {
    run_sql(&mut *connection, format!("prepare s as {query}")).await.unwrap();
    let arguments = if arguments.is_empty() { String::new() } else { format!("({})", arguments.join(", ")) };
    let explained = run_sql(&mut *connection, format!("explain (format json) execute s{arguments}")).await.unwrap();
    run_sql(&mut *connection, "deallocate s".to_owned()).await.unwrap();
    explained[0].get::<Value, _>(0)[0]["Plan"].take()
}

fn read_whole(plan: &Value) -> Vec<String> {
    let mut found = Vec::new();
    readers(plan, &mut found);
    found
}

#[tokio::test]
async fn no_statement_reads_the_whole_history() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let mut connection = test.sql.acquire().await.unwrap();
    sqlx::raw_sql(
        "begin;
         set local session_replication_role = replica;
         insert into test_runs (id, workflow_id, definition, revision, status, executor_type, attempt, fence, settled_fence, worker,
                                created_at, available_at, started_at, finished_at, version)
         -- ids in the order of the rows, as those of UUIDv7 are
         select ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'w@' || n % 1000, 'w', 1, 'succeeded', 'command',
                1, n, n, 'somebody', t, t, t, t, 3
         from (select n, now() - make_interval(secs => 200000 - n) as t from generate_series(1, 200000) n) g;
         insert into run_attempts (run_id, fence, attempt, status, worker, started_at, finished_at)
         select id, fence, 1, 'succeeded', worker, started_at, finished_at from test_runs;
         insert into run_events (run_id, to_status, attempt, fence, actor) select id, 'queued', 0, 0, 'somebody' from test_runs;
         insert into test_runs (id, workflow_id, definition, revision, status, executor_type, available_at, version)
         select gen_random_uuid(), 'w@' || n, 'w', 1, 'queued', 'command', now(), 1 from generate_series(1001, 21000) n;
         commit;
         analyze;
         set enable_seqscan = off; set jit = off; set plan_cache_mode = force_custom_plan",
    )
    .execute(&mut *connection)
    .await
    .unwrap();
    // It would be noticed.
    let all = "select id from test_runs where status = 'queued' order by id limit 100";
    assert_eq!(read_whole(&plan(&mut connection, all, &[]).await), ["Index Scan test_runs test_runs_pkey"]);

    let statements: serde_json::Map<String, Value> = serde_json::from_str(STATEMENTS).unwrap();
    let (mut looked_at, mut back) = (0, 0);
    for statement in statements.values().filter(|statement| statement["query"].is_string()) {
        let query = statement["query"].as_str().unwrap().trim();
        if OF_THE_DOCTOR.iter().any(|start| query.starts_with(start)) {
            continue;
        }
        let kinds = statement["describe"]["parameters"]["Left"].as_array().cloned().unwrap_or_default();
        let arguments: Vec<String> = kinds.iter().map(|kind| value(kind.as_str().unwrap())).collect();
        let plan = plan(&mut connection, query, &arguments).await;
        assert_eq!(read_whole(&plan), [""; 0], "{query}");
        (looked_at, back) = (looked_at + 1, back + usize::from(looks_back(&plan)));
    }
    assert!(looked_at > 80, "{looked_at} statements");
    // Or a refusal would walk past all that had the slot since an old snapshot: those of an enqueue, by one and by two statements.
    assert_eq!(back, 2);
}
