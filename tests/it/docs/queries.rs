//! The `sql` blocks, on a database with some history: what reads, as `singletrack_reader`, and it finds something.

use serde_json::json;
use singletrack::domain::Status;
use sqlx::{Connection as _, PgConnection};

use super::blocks::{Block, Page};
use crate::roles::granted;
use crate::support::calls::LIMIT;
use crate::support::database::{TestDb, run_sql};
use crate::support::replica::{Answer, Client, Replica};
use crate::support::{eventually, plant};

/// A week as it may have been: successes, failures, refusals, runs that wait, a lost worker.
async fn history(test: &TestDb, client: &Client) {
    let as_alice = async |path: &str, body| {
        let request = client.request(reqwest::Method::POST, path).header("Singletrack-Actor", "alice");
        Answer::of(request.json(&body)).await.unwrap()
    };
    client.define("e2e", "grep -q fail && exit 1; exit 0").await;
    for (commit, input) in [("4f2c9e1", "pass"), ("4f2c9e1", "fail"), ("77ab012", "pass"), ("9c01d2e", "fail")] {
        let body = json!({"input": input, "labels": {"commit": commit}});
        let run = as_alice("/api/v1/workflows/e2e/runs", body).await.run_id();
        client.finished(run).await;
    }
    client.define_pull("transcode", json!({})).await;
    client.enqueue("transcode").await;
    as_alice("/api/v1/workflows/transcode/pause", json!({"reason": "no room"})).await;
    plant::run(test, "import", Status::Stale).await;
    plant::run(test, "deploy@prod", Status::Running).await;
    as_alice("/api/v1/workflows/deploy@prod/runs", json!({"on_conflict": "wait"})).await;
    assert_eq!(as_alice("/api/v1/workflows/deploy@prod/runs", json!({})).await.status, 409);
    client.post("/api/v1/keys", json!({"name": "ci", "scopes": ["read"]})).await;
    eventually("the refusal is written down", LIMIT, async || {
        let noted = sqlx::query("select from run_refusals").execute(&test.sql).await.unwrap().rows_affected();
        (noted > 0).then_some(())
    })
    .await;
    sqlx::raw_sql("create table orders (id int primary key); create table deploys (target text primary key, fence bigint, version text)")
        .execute(&test.sql)
        .await
        .unwrap();
}

/// What is wrong with the queries of the pages.
pub async fn ask(pages: &[Page]) -> Vec<String> {
    let test = granted().await;
    let replica = Replica::start(&test).await;
    history(&test, &replica.client).await;
    replica.finish().await;
    let mut wrong = Vec::new();
    for block in
        pages.iter().flat_map(Page::blocks).filter(|block| block.language == "sql" && block.not_run().is_none())
    {
        let mut sql = test.sql.acquire().await.unwrap();
        let asked = if block.has("writes") { write(&mut sql, &block).await } else { read(&mut sql, &block).await };
        wrong.extend(asked.err().map(|why| format!("{}: {why}", block.place)));
    }
    wrong
}

/// Each statement finds at least one row, unless its comment says that it is empty.
async fn read(sql: &mut PgConnection, block: &Block) -> Result<(), String> {
    let mut reading = sql.begin().await.unwrap();
    sqlx::raw_sql("set transaction read only; set local role singletrack_reader").execute(&mut *reading).await.unwrap();
    for statement in statements(block) {
        let rows = run_sql(&mut *reading, statement.clone()).await;
        let rows = rows.map_err(|error| format!("{error}\n{statement}"))?.len();
        if (rows == 0) != statement.contains("-- empty") {
            return Err(format!("{rows} rows of\n{statement}"));
        }
    }
    Ok(())
}

/// Nothing of it stays: the next block finds what was there before.
async fn write(sql: &mut PgConnection, block: &Block) -> Result<(), String> {
    let statements = block.text().replace("begin;", "").replace("commit;", "");
    let mut writing = sql.begin().await.unwrap();
    let done = run_sql(&mut *writing, statements).await;
    writing.rollback().await.unwrap();
    done.map(|_| ()).map_err(|error| error.to_string())
}

fn statements(block: &Block) -> Vec<String> {
    let mut statements = vec![String::new()];
    for line in &block.lines {
        let last = statements.last_mut().unwrap();
        last.push_str(line);
        last.push('\n');
        if line.split("--").next().unwrap().trim_end().ends_with(';') {
            statements.push(String::new());
        }
    }
    statements.retain(|statement| !statement.trim().is_empty());
    statements
}
