//! What finished long ago costs nothing: no statement of the service reads the whole of it, though the planner knows how much there is.

use serde_json::Value;
use singletrack::store::Db;
use sqlx::Row as _;

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

/// Whether some part of it looks for a slot from the end, or a refusal would walk past all that had it since an old snapshot.
fn looks_back(plan: &Value) -> bool {
    plan["Index Name"] == "test_runs_one_slot" && plan["Scan Direction"] == "Backward"
        || plan["Plans"].as_array().is_some_and(|parts| parts.iter().any(looks_back))
}

/// Whether some part of it takes due runs in the order of the queue, and of each priority from a time on, or a claim would walk past
/// what others claimed since.
fn passes_by_what_is_older(plan: &Value) -> bool {
    let parts = || plan["Plans"].as_array().into_iter().flatten();
    let begins = |part: &Value| {
        let condition = part["Index Cond"].as_str().unwrap_or_default();
        part["Index Name"] == "test_runs_claimable"
            && ["priority = ", "available_at >= "].iter().all(|is| condition.contains(is))
    };
    plan["Node Type"] == "LockRows" && parts().any(begins) || parts().any(passes_by_what_is_older)
}

/// The tables of which some part of it reads all rows: there is no index for it, and sessions put such a price on that, that what the other
/// parts cost is lost in it. A sequence is nothing else.
fn scanned(plan: &Value) -> Vec<&str> {
    let parts = plan["Plans"].as_array().into_iter().flatten().flat_map(scanned);
    let this = (plan["Node Type"] == "Seq Scan").then(|| plan["Relation Name"].as_str().unwrap());
    parts.chain(this).filter(|&name| name != "run_fence").collect()
}

/// The plan of a statement in a session of `db`.
async fn plan(db: &Db, query: &str, arguments: &[String]) -> Value {
    let arguments = if arguments.is_empty() { String::new() } else { format!("({})", arguments.join(", ")) };
    let explained = db.with(async |connection| {
        run_sql(&mut *connection, format!("prepare s as {query}")).await?;
        let explained = run_sql(&mut *connection, format!("explain (format json) execute s{arguments}")).await?;
        run_sql(&mut *connection, "deallocate s".to_owned()).await?;
        Ok(explained)
    });
    explained.await.unwrap()[0].get::<Value, _>(0)[0]["Plan"].take()
}

/// All but those of the doctor, with arguments.
fn statements() -> Vec<(String, Vec<String>)> {
    let statements: serde_json::Map<String, Value> = serde_json::from_str(STATEMENTS).unwrap();
    let of_the_doctor = |query: &str| OF_THE_DOCTOR.iter().any(|start| query.starts_with(start));
    let statements = statements.values().filter_map(|statement| {
        let query = statement["query"].as_str()?.trim();
        let kinds = statement["describe"]["parameters"]["Left"].as_array().cloned().unwrap_or_default();
        let arguments = kinds.iter().map(|kind| value(kind.as_str().unwrap())).collect();
        (!of_the_doctor(query)).then(|| (query.to_owned(), arguments))
    });
    statements.collect()
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
         analyze",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    // It would be noticed.
    let all = "select id from test_runs where status = 'queued' order by id limit 100";
    assert_eq!(read_whole(&plan(&test.db, all, &[]).await), ["Index Scan test_runs test_runs_pkey"]);

    let statements = statements();
    for (query, arguments) in &statements {
        assert_eq!(read_whole(&plan(&test.db, query, arguments).await), [""; 0], "{query}");
    }
    assert!(statements.len() > 80, "{} statements", statements.len());
}

/// How many statements find a slot's holder, and how many what to claim, by the index for it, as they are planned where they are sent all
/// the time.
async fn found_by_their_index(test: &TestDb) -> [usize; 2] {
    let flights = test.db.flights(1);
    let mut found = [0; 2];
    let statements = statements();
    let some = |query: &str| query.contains("for update skip locked") || query.contains("holder");
    for (query, arguments) in statements.iter().filter(|(query, _)| some(query)) {
        let plan = plan(&flights, query, arguments).await;
        assert_eq!(scanned(&plan), [""; 0], "{query}");
        found[0] += usize::from(looks_back(&plan));
        found[1] += usize::from(passes_by_what_is_older(&plan));
    }
    found
}

#[tokio::test]
async fn slots_and_the_queue_are_read_by_their_index_whatever_statistics_say() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    // Both ways of an enqueue to say who has the slot, and the claim.
    let all = [2, 1];
    assert_eq!(found_by_their_index(&test).await, all, "before there is anything");
    let fill = "begin;
         set local session_replication_role = replica;
         insert into test_runs (id, workflow_id, definition, revision, status, executor_type, available_at, version)
         select gen_random_uuid(), 'w@' || n, 'w', 1, 'queued', 'command', now(), 1 from generate_series(1, 20000) n;
         update test_runs
         set status = 'succeeded', attempt = 1, fence = 1, settled_fence = 1, worker = 'somebody', started_at = now(), finished_at = now(),
             version = 3
         where substr(workflow_id, 3)::int > 5;
         commit;
         reindex index test_runs_by_workflow";
    sqlx::raw_sql(fill).execute(&test.sql).await.unwrap();
    for history in [20_000, 5_000, 200] {
        run_sql(&test.sql, format!("delete from test_runs where substr(workflow_id, 3)::int > {history}"))
            .await
            .unwrap();
        sqlx::raw_sql("vacuum analyze test_runs").execute(&test.sql).await.unwrap();
        // What vacuum says of an index that was large and has few rows, as after a burst or under an old snapshot: many pages for each.
        for (queue, slots) in [(0, 0), (2, 0), (2, 2), (2, 50), (2, 1000), (50, 2), (50, 1000), (1000, 2), (1000, 50)] {
            let said = format!(
                "update pg_class set reltuples = {queue} where relname = 'test_runs_claimable';
                 update pg_class set reltuples = {slots} where relname = 'test_runs_one_slot'"
            );
            run_sql(&test.sql, said).await.unwrap();
            let found = found_by_their_index(&test).await;
            assert_eq!(found, all, "{history} finished, {queue} and {slots} entries in the indexes");
        }
    }
}
