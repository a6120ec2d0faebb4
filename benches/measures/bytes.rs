//! What a run costs in bytes: of WAL, with and without full-page images, and of tables and indexes; and its index entries.

use anyhow::{Context as _, Result};
use serde_json::json;
use tokio::process::Command;

use super::Bench;
use super::enqueue::requests;
use crate::http::{Connection, Next};
use crate::process::{Role, Serve};
use crate::report::What;
use crate::server::{Database, Server};
use crate::workflows::NOOP;

const RUNS: usize = 10_000;
const CONNECTIONS: usize = 32;

pub async fn run(bench: &mut Bench) -> Result<()> {
    eprintln!("bytes");
    let database = bench.server.database("own").await?;
    // Not on pages that are new: those are not written as images.
    cycle(&database).await?;
    database.execute("vacuum analyze").await?;
    bench.server.checkpoint().await?;
    let (from, sizes_before) = (position(&database).await?, sizes(&database).await?);
    cycle(&database).await?;
    let (to, sizes_after) = (position(&database).await?, sizes(&database).await?);

    let per_run = |bytes: i64| bytes as f64 / RUNS as f64;
    let written = database.number(&format!("select pg_wal_lsn_diff('{to}', '{from}')::bigint")).await?;
    bench.report.add(What::new("bytes", "WAL per run", "bytes"), per_run(written));
    if let Some(wal) = read_wal(&bench.server, &database, &from, &to).await? {
        bench.report.add(What::new("bytes", "WAL per run without full-page images", "bytes"), per_run(wal.records));
        bench.report.add(What::new("bytes", "WAL records per run", "records"), per_run(wal.count));
        bench.report.add(What::new("bytes", "index entries per run", "entries"), per_run(wal.entries));
    }
    let grown = |kind: &str| -> i64 {
        let sum = |sizes: &[(String, i64)]| {
            sizes.iter().filter(|(name, _)| name.starts_with(kind)).map(|(_, size)| size).sum::<i64>()
        };
        sum(&sizes_after) - sum(&sizes_before)
    };
    bench.report.add(What::new("bytes", "tables per run", "bytes"), per_run(grown("table")));
    bench.report.add(What::new("bytes", "indexes per run", "bytes"), per_run(grown("index")));
    bench.report.detail("bytes", json!({"sizes after two cycles of 10,000 runs": sizes_after}));
    bench.server.remove(database).await
}

/// Runs that are enqueued one by one, done, and final.
async fn cycle(database: &Database) -> Result<()> {
    let serve = Serve::start(database).await?;
    let next = requests(NOOP);
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..CONNECTIONS {
        let share = RUNS / CONNECTIONS + usize::from(number < RUNS % CONNECTIONS);
        tasks.spawn(enqueue(serve.address.clone(), share, next.clone()));
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Role::start(database, &["worker", &RUNS.to_string()])?.answer().await?;
    serve.stop().await
}

async fn enqueue(address: String, count: usize, next: Next) -> Result<()> {
    let (mut connection, mut request) = (Connection::open(&address).await?, Vec::new());
    for _ in 0..count {
        request.clear();
        next(&mut request);
        let status = connection.call(&request).await?.status;
        anyhow::ensure!(status == 202, "an enqueue was answered with {status}");
    }
    Ok(())
}

async fn position(database: &Database) -> Result<String> {
    Ok(sqlx::query_scalar("select pg_current_wal_flush_lsn()::text").fetch_one(&database.sql).await?)
}

/// Bytes of each table and index: `table test_runs`.
pub async fn sizes(database: &Database) -> Result<Vec<(String, i64)>> {
    let query = "select case when relkind = 'r' then 'table ' else 'index ' end || relname, pg_relation_size(oid) from pg_class \
                 where relkind in ('r', 'i') and relnamespace = 'public'::regnamespace and pg_relation_size(oid) > 0 order by 1";
    database.numbers(query).await
}

/// What was written between two positions.
struct Wal {
    count: i64,
    /// Bytes of records without the images of pages in them.
    records: i64,
    /// Entries put into B-trees, the few of the catalogs included.
    entries: i64,
}

/// Reads it by `pg_waldump`, where the server's folder has that.
async fn read_wal(server: &Server, database: &Database, from: &str, to: &str) -> Result<Option<Wal>> {
    let program = server.bin.join("pg_waldump");
    if !program.exists() {
        eprintln!("    no pg_waldump in {}: WAL is not taken apart", server.bin.display());
        return Ok(None);
    }
    let folder: String =
        sqlx::query_scalar("select current_setting('data_directory') || '/pg_wal'").fetch_one(&database.sql).await?;
    let output = Command::new(program).args(["--stats=record", "-p", &folder, "-s", from, "-e", to]).output().await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut wal = Wal { count: 0, records: 0, entries: 0 };
    for line in text.lines() {
        // Name, then count, bytes of records, bytes of images and both, each with its share in brackets.
        let numbers: Vec<i64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        let [count, bytes, ..] = numbers[..] else { continue };
        let name = line.split_whitespace().next().unwrap_or_default();
        if name == "Total" || !name.contains('/') {
            continue;
        }
        wal.count += count;
        wal.records += bytes;
        // A page that is split takes one as well.
        if ["Btree/INSERT_LEAF", "Btree/INSERT_POST", "Btree/SPLIT_L", "Btree/SPLIT_R"].contains(&name) {
            wal.entries += count;
        }
    }
    let said = || format!("pg_waldump found nothing: {}", String::from_utf8_lossy(&output.stderr).trim());
    (wal.count > 0).then_some(Some(wal)).with_context(said)
}
