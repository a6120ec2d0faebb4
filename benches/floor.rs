//! What bare SQL does on the same server, by `pgbench` where that can do it: every speed goal is a ratio to one of these.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use sqlx::postgres::PgListener;
use tokio::process::Command;

use crate::http::{Latencies, latencies, micros, pace};
use crate::process::folder;
use crate::server::{Database, Server};

const TABLE: &str = "
    create table job(id bigint generated always as identity primary key, queue text not null, kind text not null,
      payload jsonb not null, state smallint not null default 0, priority smallint not null default 0,
      attempt smallint not null default 0, max_attempts smallint not null default 25,
      run_at timestamptz not null default now(), created_at timestamptz not null default now(), finished_at timestamptz);
    create index on job(queue, priority, run_at, id) where state = 0;";
const ROW: &str = r#"'bench','noop','{"seq":1,"to":"someone@example.com","kind":"welcome"}'"#;
/// Rows of one bulk statement, and of one claim.
const BULK: u64 = 1000;
const CYCLE_ROWS: u64 = 400_000;

/// Single-row INSERTs of 32 clients, each a transaction: per second.
pub async fn insert(server: &Server, seconds: u64) -> Result<f64> {
    let database = prepared(server).await?;
    let script = format!("insert into job(queue, kind, payload) values ({ROW});\n");
    let done = pgbench(server, &database, 32, seconds, &script).await?;
    server.remove(database).await?;
    Ok(done.per_second)
}

/// INSERTs of 1,000 rows by 4 clients: rows per second.
pub async fn bulk(server: &Server, seconds: u64) -> Result<f64> {
    let database = prepared(server).await?;
    let script = format!("insert into job(queue, kind, payload) select {ROW} from generate_series(1, {BULK});\n");
    let done = pgbench(server, &database, 4, seconds, &script).await?;
    server.remove(database).await?;
    Ok(done.per_second * BULK as f64)
}

/// Claims of 100 and finishes of 100 by 4 clients: rows finished per second.
pub async fn cycle(server: &Server, seconds: u64) -> Result<f64> {
    let database = prepared(server).await?;
    database.execute("create index on job(id) where state = 1").await?;
    let rows = format!("insert into job(queue, kind, payload) select {ROW} from generate_series(1, {CYCLE_ROWS})");
    database.execute(&rows).await?;
    database.execute("vacuum analyze job").await?;
    server.checkpoint().await?;
    let script = "with taken as (select id from job where queue = 'bench' and state = 0 and run_at <= now() \
                  order by priority, run_at, id limit 100 for update skip locked) \
                  update job set state = 1, attempt = attempt + 1 from taken where job.id = taken.id;\n\
                  with taken as (select id from job where state = 1 order by id limit 100 for update skip locked) \
                  update job set state = 2, finished_at = now() from taken where job.id = taken.id;\n";
    let done = pgbench(server, &database, 4, seconds, script).await?;
    let finished = database.number("select count(*) from job where state = 2").await?;
    if u64::try_from(finished)? == CYCLE_ROWS {
        bail!("the bare cycle ran out of rows: it needs less than {seconds} s");
    }
    server.remove(database).await?;
    Ok(finished as f64 * done.per_second / done.transactions)
}

/// From the commit of a row to its claim by who listens, so many times a second: the least that this machine needs. It is no work for
/// `pgbench`, which can't listen. Needs `track_commit_timestamp`.
pub async fn pickup(server: &Server, rate: f64, length: Duration) -> Result<Latencies> {
    let database = server.bare("floor").await?;
    let table =
        "create table job(id bigint generated always as identity primary key, state smallint not null default 0,
                                  inserted xid not null default pg_current_xact_id()::xid);
                 create index on job(id) where state = 0";
    database.execute(table).await?;
    let count = (rate * length.as_secs_f64()) as u64;
    let mut listener = PgListener::connect_with(&database.sql).await?;
    listener.listen("job").await?;
    let insert = async {
        let (mut connection, mut due) = (database.sql.acquire().await?, pace(rate, count));
        while due.recv().await.is_some() {
            let row = "with inserted as (insert into job default values) select pg_notify('job', '')";
            sqlx::query(row).execute(&mut *connection).await?;
        }
        anyhow::Ok(())
    };
    let claim = async {
        let (mut connection, mut claimed) = (database.sql.acquire().await?, HashMap::new());
        while (claimed.len() as u64) < count {
            listener.recv().await?;
            let rows = "with due as (select id from job where state = 0 order by id limit 100 for update skip locked)
                        update job set state = 1 from due where job.id = due.id returning job.id::text";
            let ids: Vec<String> = sqlx::query_scalar(rows).fetch_all(&mut *connection).await?;
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
            claimed.extend(ids.into_iter().map(|id| (id, now)));
        }
        anyhow::Ok(claimed)
    };
    let ((), claimed) = tokio::try_join!(insert, claim)?;
    // The database can't be removed as long as somebody listens.
    drop(listener);
    let committed =
        "select id::text, (extract(epoch from pg_xact_commit_timestamp(inserted)) * 1000000)::bigint from job";
    let mut all = latencies()?;
    for (id, committed) in database.numbers(committed).await? {
        let at = claimed.get(&id).with_context(|| format!("row {id} was never claimed"))?;
        all.saturating_record(micros(*at).saturating_sub(u64::try_from(committed)?));
    }
    server.remove(database).await?;
    Ok(all)
}

async fn prepared(server: &Server) -> Result<Database> {
    let database = server.bare("floor").await?;
    database.execute(TABLE).await?;
    server.checkpoint().await?;
    Ok(database)
}

struct Done {
    transactions: f64,
    per_second: f64,
}

async fn pgbench(server: &Server, database: &Database, clients: u32, seconds: u64, script: &str) -> Result<Done> {
    let file = folder()?.join("floor.sql");
    std::fs::write(&file, script)?;
    let output = Command::new(program(&server.bin)?)
        .args(["-n", "-M", "prepared", "-h", "127.0.0.1", "-U", "singletrack", "-j", "2", "-f"])
        .arg(&file)
        .args(["-p", &server.port.to_string(), "-c", &clients.to_string(), "-T", &seconds.to_string(), &database.name])
        .env("PGPASSWORD", &server.password)
        .env("LC_ALL", "C")
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("pgbench failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let number = |after: &str| {
        let rest = text.split_once(after).map(|(_, rest)| rest).unwrap_or_default();
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        rest[..end].parse().with_context(|| format!("no `{after}` in what pgbench printed: {text}"))
    };
    Ok(Done { transactions: number("transactions actually processed: ")?, per_second: number("\ntps = ")? })
}

/// `pgbench` of the server's own folder; some packages have it elsewhere.
fn program(bin: &Path) -> Result<PathBuf> {
    let own = bin.join("pgbench");
    if own.exists() {
        return Ok(own);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join("pgbench")).find(|program| program.exists()).context(
        "pgbench is missing, with which the floors are measured: install it (Debian: apt install postgresql-contrib)",
    )
}
