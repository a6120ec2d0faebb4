//! What is wrong around the tables: settings, and who keeps the server from its work.

use std::time::Duration;

use singletrack::app::doctor::{Report, Terms};
use singletrack::domain::Status;
use sqlx::PgPool;

use super::{TERMS, check, clean, look, only, plant, report};
use crate::support::database::{TestDb, new_postgres, own_postgres};
use crate::support::{eventually, plant as planted};

/// What is said of a check, by what is wrong.
fn whats(report: &Report, name: &str) -> Vec<String> {
    check(report, name).findings.iter().map(|finding| finding.what.clone()).collect()
}

/// Statements that want no transaction around them, one by one.
async fn each(sql: &PgPool, statements: &[&'static str]) {
    for statement in statements {
        sqlx::raw_sql(*statement).execute(sql).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

#[tokio::test]
async fn settings_that_lose_what_was_acknowledged_are_found() {
    let postgres = own_postgres("doctor-settings");
    let test = TestDb::on(&postgres).await;
    // The server is shared with no other test. It is started with three of them, which a reload can't change.
    each(
        &test.sql,
        &[
            "alter system set zero_damaged_pages = on",
            "alter system set ignore_checksum_failure = on",
            "alter system set autovacuum = off",
            "alter system set track_counts = off",
            "alter system set default_transaction_isolation = 'serializable'",
            "select pg_reload_conf()",
        ],
    )
    .await;
    let wrong = [
        "autovacuum is off",
        "default_transaction_isolation is serializable",
        "ignore_checksum_failure is on",
        "track_counts is off",
        "zero_damaged_pages is on",
    ];
    let found = eventually("the settings are in force", Duration::from_secs(10), async || {
        let report = report(&test).await;
        let mut found = whats(&report, "settings");
        found.sort();
        (found.len() == wrong.len()).then_some((found, report))
    })
    .await;
    assert_eq!(found.0, wrong);
    // Each remedy is what mends it.
    for finding in &check(&found.1, "settings").findings {
        let remedy: &'static str = finding.remedy.split(';').next().unwrap().to_owned().leak();
        each(&test.sql, &[remedy]).await;
    }
    each(&test.sql, &["select pg_reload_conf()"]).await;
    eventually("the settings are mended", Duration::from_secs(10), async || {
        whats(&report(&test).await, "settings").is_empty().then_some(())
    })
    .await;
    each(&test.sql, &["alter system reset all", "select pg_reload_conf()"]).await;
}

#[tokio::test]
async fn settings_of_a_database_or_an_account_are_found_with_whom_they_are_for() {
    let test = TestDb::new().await;
    plant(
        &test,
        "create role doctors_careless;
         do $$ begin
             execute format('alter database %I set synchronous_commit = off', current_database());
             execute format('alter database %I set session_replication_role = replica', current_database());
             execute format('alter role doctors_careless in database %I set default_transaction_isolation = ''repeatable read''', current_database());
             execute format('alter role doctors_careless in database %I set default_transaction_read_only = on', current_database());
         end $$",
    )
    .await;
    let database: String = sqlx::query_scalar("select current_database()").fetch_one(&test.sql).await.unwrap();
    let report = report(&test).await;
    let mut found = whats(&report, "settings");
    found.sort();
    let careless = format!("role doctors_careless in database {database}");
    let expected = [
        format!("default_transaction_isolation is repeatable read for {careless}"),
        format!("default_transaction_read_only is on for {careless}"),
        format!("session_replication_role is replica for database {database}"),
        format!("synchronous_commit is off for database {database}"),
    ];
    assert_eq!(found, expected);
    for finding in &check(&report, "settings").findings {
        let remedy: &'static str = finding.remedy.clone().leak();
        each(&test.sql, &[remedy]).await;
    }
    clean(&super::report(&test).await);
    plant(&test, "drop role doctors_careless").await;
}

#[tokio::test]
async fn a_connection_that_brings_its_own_settings_is_found() {
    let test = TestDb::new().await;
    let options = test.options().options([("synchronous_commit", "off")]);
    let finding = only(&look(&options, &TERMS).await, "settings");
    assert_eq!(finding.what, "synchronous_commit is off for this connection");
}

#[tokio::test]
async fn a_table_that_is_not_vacuumed_is_found() {
    let test = TestDb::new().await;
    plant(&test, "alter table test_runs set (autovacuum_enabled = off, autovacuum_vacuum_scale_factor = 0.01)").await;
    let finding = only(&report(&test).await, "autovacuum");
    assert_eq!(finding.rows, ["test_runs"]);
    plant(&test, "alter table test_runs reset (autovacuum_enabled)").await;
    clean(&report(&test).await); // how often it is vacuumed is the operator's
}

#[tokio::test]
async fn an_old_snapshot_is_found_with_its_session() {
    let test = TestDb::new().await;
    let at_once = Terms { snapshot_age: Duration::ZERO, ..TERMS };
    let mut reader = test.sql.acquire().await.unwrap();
    sqlx::raw_sql("set application_name = 'a long dump'").execute(&mut *reader).await.unwrap();
    sqlx::raw_sql("begin isolation level repeatable read; select count(*) from test_runs")
        .execute(&mut *reader)
        .await
        .unwrap();
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *reader).await.unwrap();
    clean(&report(&test).await); // it is not old yet
    let finding = only(&look(&test.options(), &at_once).await, "snapshots");
    assert!(
        finding.rows[0].starts_with(&format!("{pid}: singletrack by a long dump, idle in transaction, for ")),
        "{finding:?}"
    );
    // Who has only read keeps nobody from writing; who has written has locks.
    sqlx::raw_sql("rollback; begin; insert into pauses (kind, name, paused_by) values ('queue', 'q', 'me')")
        .execute(&mut *reader)
        .await
        .unwrap();
    let report = look(&test.options(), &at_once).await;
    let finding = &check(&report, "idle-locks").findings[0];
    assert!(
        finding.rows[0].starts_with(&format!("{pid}: singletrack by a long dump, locks on pauses, for ")),
        "{finding:?}"
    );
    assert_eq!(check(&report, "snapshots").findings.len(), 1, "{report:#?}");
    sqlx::raw_sql("rollback; begin").execute(&mut *reader).await.unwrap();
    clean(&look(&test.options(), &at_once).await); // open, and in nobody's way
    sqlx::raw_sql("rollback").execute(&mut *reader).await.unwrap();
}

#[tokio::test]
async fn what_a_restart_does_not_end_is_found() {
    let mut postgres = new_postgres("doctor-prepared");
    let test = TestDb::on(&postgres).await;
    each(&test.sql, &["alter system set max_prepared_transactions = 2"]).await;
    test.sql.close().await;
    postgres.restart().unwrap();
    let test = TestDb::on(&postgres).await;
    planted::run(&test, "w", Status::Queued).await;
    plant(&test, "insert into workers (name, executor_types) values ('w', '{command}')").await;
    let sql = PgPool::connect(&test.url).await.unwrap();
    sqlx::raw_sql(
        "begin; update pauses set reason = 'x'; select pg_current_xact_id(); prepare transaction 'half done'",
    )
    .execute(&sql)
    .await
    .unwrap();
    sql.close().await;
    postgres.stop_immediate();
    postgres.restart().unwrap();
    clean(&report(&test).await);
    let at_once = Terms { snapshot_age: Duration::ZERO, ..TERMS };
    let finding = only(&look(&test.options(), &at_once).await, "prepared-transactions");
    assert!(finding.rows[0].starts_with("half done: singletrack, for "), "{finding:?}");
    let sql = PgPool::connect(&test.url).await.unwrap();
    each(&sql, &["rollback prepared 'half done'"]).await;
    clean(&look(&test.options(), &at_once).await);
    // A slot that nobody reads from, with what a standby would have left there.
    each(&sql, &["select pg_create_physical_replication_slot('left', true)"]).await;
    clean(&report(&test).await); // it keeps little
    each(&sql, &["select pg_drop_replication_slot('left')", "alter system reset all"]).await;
}

#[tokio::test]
async fn connections_that_cannot_be_had_are_found() {
    let test = TestDb::new().await;
    plant(&test, "insert into workers (name, executor_types, version) select 'r' || n, '{command}', '0.1.0' from generate_series(1, 16) n").await;
    let finding = only(&report(&test).await, "room");
    assert_eq!(
        finding.what,
        "16 replicas may want 352 connections (SINGLETRACK_POOL_SIZE=10 and 12 each), and there are 297"
    );
    clean(&look(&test.options(), &Terms { pool_size: 5, ..TERMS }).await);
}

#[tokio::test]
async fn a_collation_that_changed_under_its_indexes_is_found() {
    let test = TestDb::new().await;
    let versioned: bool =
        sqlx::query_scalar("select pg_collation_actual_version(100) is not null").fetch_one(&test.sql).await.unwrap();
    if versioned {
        plant(&test, "update pg_database set datcollversion = '0.1' where datname = current_database()").await;
        let finding = only(&report(&test).await, "room");
        assert!(finding.what.contains("was of version 0.1, and is of"), "{finding:?}");
    }
}
