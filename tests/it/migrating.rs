//! The schema is brought up to date by several replicas at once, under locks, and met by versions that do not know it.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use singletrack::app::{Stop, embed};
use singletrack::config::Settings;
use singletrack::executor::handler::Handlers;
use singletrack::store::migrate;
use sqlx::Connection as _;
use sqlx::migrate::Migrator;
use sqlx::postgres::PgConnection;
use tokio::task::JoinSet;

use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::process::{Process, SHORT_LEASE, singletrack};
use crate::support::replica::short_lease;

/// For a process that starts, and for one that waits for its turn, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Holds every migration that makes an index, in the middle of its transaction, for as long as there is a row.
const HOLD: &str = "
    create schema hold;
    create table hold.on ();
    create function hold.wait() returns event_trigger language plpgsql as $$
    begin
        while exists (select from hold.on) loop perform pg_sleep(0.02); end loop;
    end $$;
    create event trigger hold on ddl_command_start when tag in ('CREATE INDEX') execute function hold.wait();
    insert into hold.on default values";

/// Backends of this database that have the lock of migrations, or wait for it.
async fn lockers(test: &TestDb, granted: bool) -> Vec<i32> {
    sqlx::query_scalar(
        "select pid from pg_locks where locktype = 'advisory' and granted = $1
         and database = (select oid from pg_database where datname = current_database())",
    )
    .bind(granted)
    .fetch_all(&test.sql)
    .await
    .unwrap()
}

/// The one backend that has it, once it is in the middle of a migration.
async fn migrating(test: &TestDb) -> i32 {
    eventually("somebody is in the middle of a migration", LIMIT, || async {
        let held: Vec<i32> = sqlx::query_scalar(
            "select pid from pg_stat_activity
             where datname = current_database() and state = 'active' and wait_event = 'PgSleep'",
        )
        .fetch_all(&test.sql)
        .await
        .unwrap();
        (held.len() == 1 && lockers(test, true).await == held).then(|| held[0])
    })
    .await
}

async fn versions(test: &TestDb) -> Vec<i64> {
    sqlx::query_scalar("select version from _sqlx_migrations where success order by version")
        .fetch_all(&test.sql)
        .await
        .unwrap()
}

fn command(name: &str, test: &TestDb, environment: &[(&str, &str)]) -> Command {
    let mut command = singletrack(&[name]);
    command
        .env("DATABASE_URL", &test.url)
        .env("SINGLETRACK_LISTEN", "127.0.0.1:0")
        .envs(SHORT_LEASE.iter().chain(environment).copied());
    command
}

/// Runs a command to its end.
async fn output(command: Command) -> Output {
    let mut command = tokio::process::Command::from(command);
    let output = tokio::time::timeout(LIMIT, command.kill_on_drop(true).output());
    output.await.expect("it ends by itself").unwrap()
}

/// What a command says that does not start.
async fn refused(command: Command) -> String {
    let output = output(command).await;
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), error.lines().count()), (Some(1), 1), "{error}");
    assert!(output.stdout.is_empty());
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_killed_in_the_middle_of_a_migration_leaves_no_lock_and_another_applies_it() {
    let test = TestDb::bare().await;
    sqlx::raw_sql(HOLD).execute(&test.sql).await.unwrap();
    let mut first = Process::spawn(command("serve", &test, &[]));
    let dead = migrating(&test).await;
    let mut others: Vec<Process> = (0..2).map(|_| Process::spawn(command("serve", &test, &[]))).collect();
    eventually("the others wait for their turn", LIMIT, || async {
        (lockers(&test, false).await.len() == 2).then_some(())
    })
    .await;

    first.kill();
    // Its server process is in the middle of a statement, and would be for as long as the row is there.
    let next = eventually("another one has its turn", LIMIT, || async {
        let pid = migrating(&test).await;
        (pid != dead).then_some(pid)
    })
    .await;
    let nothing: bool =
        sqlx::query_scalar("select to_regclass('test_runs') is null").fetch_one(&test.sql).await.unwrap();
    assert!(nothing, "half a migration can be seen");
    sqlx::query("delete from hold.on").execute(&test.sql).await.unwrap();
    for replica in &mut others {
        replica.ready();
    }

    assert_eq!(versions(&test).await, (1..=migrate::newest()).collect::<Vec<_>>());
    assert_eq!(lockers(&test, true).await, [0_i32; 0]);
    eventually("the connections of migrations are gone", LIMIT, async || {
        let left: i64 = sqlx::query_scalar("select count(*) from pg_stat_activity where pid = any($1)")
            .bind(vec![dead, next])
            .fetch_one(&test.sql)
            .await
            .unwrap();
        (left == 0).then_some(())
    })
    .await;
    others[0].client.define("w", "echo done").await;
    let id = others[1].client.enqueue("w").await.run_id();
    assert_eq!(others[0].client.finished(id).await["status"], "succeeded");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_processes_that_migrate_at_once_one_applies_everything_and_the_others_nothing() {
    let test = TestDb::bare().await;
    let mut all = JoinSet::new();
    for _ in 0..4 {
        all.spawn(output(command("migrate", &test, &[])));
    }
    let mut said: Vec<String> =
        all.join_all().await.into_iter().map(|output| String::from_utf8(output.stdout).unwrap()).collect();
    said.sort();
    let applied = format!("applied {} migrations\n", migrate::newest());
    assert_eq!(said, [applied.as_str(), "up to date already\n", "up to date already\n", "up to date already\n"]);
    assert_eq!(lockers(&test, true).await, [0_i32; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_whose_table_is_locked_lets_others_pass_and_is_tried_again_until_it_is_free() {
    let test = TestDb::bare().await;
    let migrations = Migrator::new(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations"))).await.unwrap();
    migrations.run_to(8, &test.sql).await.unwrap();
    let wants = "lock table test_runs in row exclusive mode";
    let mut long = test.sql.begin().await.unwrap();
    sqlx::query(wants).execute(&mut *long).await.unwrap();

    let migrating = tokio::spawn(output(command("migrate", &test, &[])));
    let waits = async || -> bool {
        sqlx::query_scalar(
            "select exists (select from pg_locks where relation = 'test_runs'::regclass and mode = 'ShareLock' and not granted)",
        )
        .fetch_one(&test.sql)
        .await
        .unwrap()
    };
    // More than once: it was tried again.
    for _ in 0..2 {
        eventually("it waits for the table", LIMIT, || async { waits().await.then_some(()) }).await;
        // Whoever comes after it waits for it, but not for longer than a renewal can bear.
        let mut other = PgConnection::connect(&test.url).await.unwrap();
        sqlx::query("set lock_timeout = '4s'").execute(&mut other).await.unwrap();
        let mut transaction = other.begin().await.unwrap();
        sqlx::query(wants).execute(&mut *transaction).await.expect("others pass");
        transaction.commit().await.unwrap();
        assert!(!migrating.is_finished(), "it gave up");
    }
    long.commit().await.unwrap();

    let output = migrating.await.unwrap();
    let applied = migrate::newest() - 8;
    let said = format!("applied {applied} migration{}\n", if applied == 1 { "" } else { "s" });
    assert_eq!((output.status.code(), String::from_utf8(output.stdout).unwrap()), (Some(0), said));
    assert_eq!(versions(&test).await.len() as i64, migrate::newest());
    assert_eq!(lockers(&test, true).await, [0_i32; 0]);
}

/// Every way to start, with what it says when it refuses.
async fn refusals(test: &TestDb) -> Vec<String> {
    let off = [("SINGLETRACK_MIGRATE", "off")];
    let mut said = vec![refused(command("migrate", test, &[])).await];
    for name in ["serve", "worker"] {
        said.push(refused(command(name, test, &[])).await);
        said.push(refused(command(name, test, &off)).await);
    }
    for when in ["auto", "off"] {
        let settings = Settings { migrate: Some(when.into()), ..short_lease() };
        let config = settings.resolve(Some(test.url.clone())).unwrap();
        let error = embed(config, Handlers::new(), Stop::default()).await.unwrap_err();
        said.push(format!("singletrack: {error}\n"));
    }
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_newer_than_a_version_knows_stops_it_at_start_in_one_line_and_not_while_it_runs() {
    let test = TestDb::new().await;
    let before = Process::serve(&test.url, SHORT_LEASE);
    before.client.define("w", "echo done").await;
    sqlx::raw_sql(
        "alter table test_runs add column added_later text not null default '';
         insert into _sqlx_migrations (version, description, success, checksum, execution_time) values (9000, 'later', true, '', 0)",
    )
    .execute(&test.sql)
    .await
    .unwrap();

    let line = format!(
        "singletrack: the database has migration 9000, and this singletrack ({}) knows none after {}: a newer version has migrated \
         it; start that one, or a newer one still\n",
        env!("CARGO_PKG_VERSION"),
        migrate::newest()
    );
    for said in refusals(&test).await {
        assert_eq!(said, line);
    }
    assert_eq!(lockers(&test, true).await, [0_i32; 0]);

    // Also on connections that it opens from now on.
    sqlx::query(
        "select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and application_name = 'singletrack'",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    eventually("it is ready again", LIMIT, || async {
        (before.client.get("/readyz").await.status == 200).then_some(())
    })
    .await;
    let id = before.client.enqueue("w").await.run_id();
    assert_eq!(before.client.finished(id).await["status"], "succeeded");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_was_applied_in_another_form_stops_a_replica_in_one_line() {
    let test = TestDb::new().await;
    sqlx::query("update _sqlx_migrations set checksum = '\\x00' where version = 3").execute(&test.sql).await.unwrap();
    for said in refusals(&test).await {
        assert!(said.starts_with("singletrack: migration 3 was applied to the database in another form"), "{said}");
        assert!(said.contains("start the version that migrated it"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_may_not_change_the_schema_starts_where_nothing_is_missing_and_else_is_told_who_can() {
    let test = TestDb::new().await;
    sqlx::raw_sql(
        "do $$ begin create role may_use login; exception when duplicate_object then null; end $$;
         revoke create on schema public from public;
         grant select, insert, update, delete on all tables in schema public to may_use;
         grant usage, select on all sequences in schema public to may_use",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let url = test.url.replacen("singletrack@", "may_use@", 1);
    let environment = [("DATABASE_URL", url.as_str())];
    let replica = Process::start(command("serve", &test, &environment));
    replica.client.define("w", "echo done").await;
    let id = replica.client.enqueue("w").await.run_id();
    assert_eq!(replica.client.finished(id).await["status"], "succeeded");

    let newest = migrate::newest();
    sqlx::query("delete from _sqlx_migrations where version = $1").bind(newest).execute(&test.sql).await.unwrap();
    let said = refused(command("serve", &test, &environment)).await;
    assert!(
        said.contains("one that may can run `singletrack migrate`") && said.contains("permission denied"),
        "{said}"
    );
    test.check().await;
}
