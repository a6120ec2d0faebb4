//! What is said of standbys, by a real one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use singletrack::app::doctor::{Finding, Outcome, Report};
use singletrack::dev::{Options, Postgres};
use sqlx::postgres::PgConnectOptions;

use super::{TERMS, check, clean, look, only, report};
use crate::support::database::{TestDb, own_postgres};
use crate::support::eventually;

/// A standby of a primary that is stopped meanwhile: its files are copied, and it follows by its socket.
fn standby_of(primary: &mut Postgres) -> Postgres {
    let url: PgConnectOptions = primary.url("postgres").parse().unwrap();
    let socket = url.get_socket().unwrap().display().to_string();
    let base = PathBuf::from(format!("{}-standby", primary.data_dir().display()));
    primary.stop_fast();
    let _ = std::fs::remove_dir_all(&base);
    // With the owner, which is another one where the tests run as root.
    let copied = Command::new("cp").arg("-a").arg(primary.data_dir()).arg(&base).status().unwrap();
    assert!(copied.success());
    File::create(cluster(&base).join("standby.signal")).unwrap();
    primary.restart().unwrap();
    let settings = [
        ("max_connections", "300".to_owned()),
        ("primary_conninfo", format!("host='{socket}' port=5432 user=singletrack application_name=second")),
    ];
    let settings = settings.map(|(name, value)| (name.to_owned(), value)).to_vec();
    let bin_dir = std::env::var_os("SINGLETRACK_PG_BIN").filter(|bin| !bin.is_empty()).map(Into::into);
    Postgres::start(Options { data_dir: base, bin_dir, settings, ..Options::default() }).unwrap()
}

/// The folder of the data themselves.
fn cluster(base: &Path) -> PathBuf {
    let mut entries = std::fs::read_dir(base).unwrap().map(|entry| entry.unwrap().path());
    entries.find(|path| path.join("PG_VERSION").exists()).unwrap()
}

/// The first report that has this many findings about standbys.
async fn until(test: &TestDb, findings: usize) -> Report {
    eventually("the standbys are as expected", Duration::from_secs(30), async || {
        let report = report(test).await;
        (check(&report, "standbys").findings.len() == findings).then_some(report)
    })
    .await
}

#[tokio::test]
async fn a_standby_that_no_commit_waits_for_is_found_and_so_is_one_that_is_waited_for_in_vain() {
    let mut primary = own_postgres("doctor-primary");
    let test = TestDb::on(&primary).await;
    test.sql.close().await;
    let mut standby = standby_of(&mut primary);
    let test = TestDb { sql: sqlx::PgPool::connect(&primary.url("test")).await.unwrap(), ..test };

    let Finding { what, rows, .. } = only(&until(&test, 1).await, "standbys");
    assert_eq!(what, "1 standbys, and none that a commit waits for");
    assert!(rows[0].starts_with("second (asynchronous): ") && rows[0].contains(" bytes behind"), "{rows:?}");

    let on_standby = look(&standby.url("test").parse().unwrap(), &TERMS).await;
    assert_eq!(only(&on_standby, "database").what, "this is a standby");

    for statement in ["alter system set synchronous_standby_names = 'second'", "select pg_reload_conf()"] {
        sqlx::raw_sql(statement).execute(&test.sql).await.unwrap();
    }
    clean(&until(&test, 0).await);
    standby.stop_fast();
    let alone = until(&test, 1).await;
    assert_eq!(only(&alone, "standbys").what, "synchronous_standby_names is second, and no such standby is connected");
    assert_eq!(alone.outcome, Outcome::Findings);
    sqlx::raw_sql("alter system reset all").execute(&test.sql).await.unwrap();
}
