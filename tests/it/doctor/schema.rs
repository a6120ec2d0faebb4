//! A schema that is not what the migrations make.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use singletrack::app::doctor::{Outcome, examine};
use singletrack::store::doctor::{connect, schema};

use super::{TERMS, check, clean, named, only, plant, report};
use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::eventually;

#[tokio::test]
async fn the_manifest_is_what_the_migrations_make_under_every_version_of_postgres() {
    let test = TestDb::new().await;
    let mut connection = connect(test.options(), None).await.unwrap();
    let mut made: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for object in schema::objects(&mut connection).await.unwrap() {
        assert_eq!(object.state, "", "{object:?}");
        made.entry(object.kind).or_default().insert(object.name, object.definition);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/app/doctor/manifest.json");
    let current = format!("{}\n", serde_json::to_string_pretty(&made).unwrap());
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some_and(|value| value == "1") {
        fs::write(&path, &current).unwrap();
    }
    let stored = fs::read_to_string(&path).unwrap();
    let differing: Vec<_> = stored.lines().zip(current.lines()).filter(|(stored, current)| stored != current).collect();
    assert!(
        stored == current,
        "src/app/doctor/manifest.json differs: {differing:?}. After a new migration UPDATE_SNAPSHOTS=1 writes it anew."
    );
}

/// What is done to the schema, the check that notices, what it says of it, and whether its remedy is SQL that heals it.
const ALTERED: &[(&str, &str, &str, bool)] = &[
    ("drop index test_runs_one_slot", "indexes", "index test_runs.test_runs_one_slot is missing", true),
    (
        "drop index test_runs_one_running;
         create unique index test_runs_one_running on test_runs (workflow_id) where status = 'queued'",
        "indexes",
        "index test_runs.test_runs_one_running was altered: it is `CREATE UNIQUE INDEX test_runs_one_running ON test_runs USING btree \
         (workflow_id) WHERE status = 'queued'::text`",
        true,
    ),
    (
        "update pg_index set indisvalid = false where indexrelid = 'test_runs_one_slot'::regclass",
        "indexes",
        "index test_runs.test_runs_one_slot is invalid",
        true,
    ),
    (
        "create index test_runs_one_slot_ccnew on test_runs (workflow_id) where status in ('queued', 'running');
         update pg_index set indisvalid = false where indexrelid = 'test_runs_one_slot_ccnew'::regclass",
        "indexes",
        "index test_runs.test_runs_one_slot_ccnew is invalid",
        true,
    ),
    (
        "alter table test_runs disable trigger test_runs_refuse_change",
        "triggers",
        "trigger test_runs.test_runs_refuse_change is disabled",
        true,
    ),
    (
        "alter table test_runs enable replica trigger test_runs_hand_on_slot",
        "triggers",
        "trigger test_runs.test_runs_hand_on_slot is disabled but on a replica",
        true,
    ),
    (
        "drop trigger test_runs_refuse_delete on test_runs",
        "triggers",
        "trigger test_runs.test_runs_refuse_delete is missing",
        true,
    ),
    (
        "create or replace trigger test_runs_hand_on_slot after update on test_runs for each row when (false)
         execute function hand_on_slot()",
        "triggers",
        "trigger test_runs.test_runs_hand_on_slot was altered",
        true,
    ),
    (
        "alter table test_runs drop constraint test_runs_sound",
        "constraints",
        "constraint test_runs.test_runs_sound is missing",
        true,
    ),
    (
        "alter table workflow_revisions drop constraint workflow_revisions_priority;
         alter table workflow_revisions add constraint workflow_revisions_priority check (priority between -1000 and 1000)",
        "constraints",
        "constraint workflow_revisions.workflow_revisions_priority was altered: it is `CHECK (priority >= '-1000'::integer AND priority <= 1000)`",
        true,
    ),
    (
        "alter table run_leases drop constraint run_leases_pkey",
        "constraints",
        "constraint run_leases.run_leases_pkey is missing",
        true,
    ),
    (
        "create or replace function hand_on_slot() returns trigger language plpgsql set search_path from current as
         $$ begin return null; end $$",
        "functions",
        "function hand_on_slot() is not what the migrations made",
        false,
    ),
    (
        "alter function force_release_run(uuid, text) security definer",
        "functions",
        "function force_release_run(uuid, text) is not what the migrations made",
        false,
    ),
    (
        "create or replace function invariant_violations_since(since timestamptz)
         returns table (violation text, workflow_id text, run_id uuid, detail text)
         language sql stable begin atomic select ''::text, ''::text, null::uuid, ''::text where false; end",
        "functions",
        "function invariant_violations_since(timestamp with time zone) is not what the migrations made",
        false,
    ),
    (
        "create or replace view run_history as
         select id, workflow_id, definition, revision, status, reason, attempt, exit_code, error, output, worker, requested_by, created_at,
                started_at, finished_at, started_at - created_at as waited, finished_at - started_at as took
         from test_runs where status in ('succeeded')",
        "views",
        "view run_history is not what the migrations made",
        false,
    ),
    ("drop view workflow_stats", "views", "view workflow_stats is missing", false),
    ("alter table workers drop column version", "columns", "column workers.version is missing", false),
    (
        "alter table test_runs alter column fence drop default",
        "columns",
        "column test_runs.fence was altered: it is `bigint not null`, and should be `bigint not null default 0`",
        false,
    ),
    (
        "alter table run_logs set unlogged",
        "tables",
        "table run_logs was altered: it is `unlogged`, and should be `permanent`",
        false,
    ),
    ("drop table run_refusals", "tables", "table run_refusals is missing", false),
    (
        "alter sequence run_fence cache 100",
        "sequences",
        "sequence run_fence was altered: it is `bigint from 1 by 1 cache 100`, and should be `bigint from 1 by 1 cache 1`",
        false,
    ),
    (
        "alter table test_runs enable row level security",
        "interference",
        "1 things that change what statements on these tables mean",
        false,
    ),
    (
        "create rule run_events_append as on delete to run_events do instead nothing",
        "interference",
        "1 things that change what statements on these tables mean",
        false,
    ),
    ("create table more_runs () inherits (test_runs)", "interference", "1 things", false),
];

#[tokio::test]
async fn what_was_done_to_the_schema_is_found_and_its_remedy_heals_it() {
    for (done, name, says, heals) in ALTERED {
        let test = TestDb::new().await;
        plant(&test, done).await;
        let report = report(&test).await;
        let found = &check(&report, name).findings;
        let finding = found.iter().find(|finding| finding.what.starts_with(says));
        let finding = finding.unwrap_or_else(|| panic!("{done}: {report:#?}"));
        // A table takes its parts with it, and what reads it can't be looked at.
        if !done.starts_with("drop table") && !done.contains("invariant_violations") {
            assert_eq!((found.len(), named(&report, Outcome::Findings)), (1, vec![*name]), "{done}: {report:#?}");
        }
        if *heals {
            for statement in finding.remedy.split_inclusive(';') {
                let statement: &'static str = statement.to_owned().leak();
                sqlx::raw_sql(statement)
                    .execute(&test.sql)
                    .await
                    .unwrap_or_else(|error| panic!("{statement}: {error}"));
            }
            clean(&super::report(&test).await);
        } else if *name != "interference" {
            assert!(finding.remedy.contains("migrations/00"), "{done}: {finding:?}");
        }
    }
}

#[tokio::test]
async fn what_somebody_added_is_theirs() {
    let test = TestDb::new().await;
    plant(
        &test,
        "create index theirs on test_runs (requested_by);
         create table theirs_too (id int primary key);
         create view theirs_as_well as select 1 as one;
         alter table test_runs add column their_note text;
         create function theirs() returns trigger language plpgsql as 'begin return new; end';
         create procedure theirs_to_call() language sql as 'select 1';
         create aggregate theirs_to_sum (int) (sfunc = int4pl, stype = int);
         create trigger theirs before insert on test_runs for each row execute function theirs()",
    )
    .await;
    let report = report(&test).await;
    clean(&report);
    assert!(
        check(&report, "triggers").notes[0].starts_with("trigger test_runs.theirs is none of the migrations"),
        "{report:#?}"
    );
}

#[tokio::test]
async fn a_schema_of_another_version_is_told_of_and_not_compared() {
    let newest = singletrack::store::migrate::newest();
    // Numbers may be left out.
    let before: i64 = sqlx::query_scalar("select max(version) from _sqlx_migrations where version < $1")
        .bind(newest)
        .fetch_one(&TestDb::new().await.sql)
        .await
        .unwrap();
    for (done, says, remedy) in [
        (
            "delete from _sqlx_migrations where version = (select max(version) from _sqlx_migrations)",
            format!("the schema is at version {before}"),
            "singletrack migrate",
        ),
        (
            "insert into _sqlx_migrations (version, description, success, checksum, execution_time) values (9999, 'later', true, '', 0)",
            format!("the schema is at version 9999, and this program knows {newest}"),
            "Ask the doctor of the newer version.",
        ),
        (
            "update _sqlx_migrations set success = false where version = (select max(version) from _sqlx_migrations)",
            format!("the schema is at version {before}, and this program at {newest}: missing is {newest}"),
            "singletrack migrate",
        ),
    ] {
        let test = TestDb::new().await;
        plant(&test, done).await;
        plant(&test, "drop index test_runs_newest").await;
        let report = report(&test).await;
        let finding = only(&report, "schema-version");
        assert!(finding.what.starts_with(&says), "{finding:?}");
        assert_eq!(finding.remedy, remedy);
        assert!(!report.checks.iter().any(|check| check.name == "indexes"), "{report:#?}");
    }
}

#[tokio::test]
async fn a_migration_that_was_applied_with_another_text_is_found() {
    let test = TestDb::new().await;
    plant(&test, "update _sqlx_migrations set checksum = 'x' where version = 3").await;
    let finding = only(&report(&test).await, "schema-version");
    assert_eq!(finding.what, "migrations/0003_views.sql was applied with another text");
}

#[tokio::test]
async fn a_database_without_the_schema_is_told_of_in_one_finding() {
    let test = TestDb::new().await;
    plant(&test, "drop schema public cascade; create schema public").await;
    let finding = only(&report(&test).await, "schema-version");
    assert!(finding.what.starts_with("there is no schema in this database"), "{finding:?}");
}

#[tokio::test]
async fn a_schema_of_any_name_is_compared_alike() {
    let test = TestDb::new().await;
    plant(&test, r#"alter schema public rename to "My Runs""#).await;
    let options = test.options().options([("search_path", "\"My Runs\"")]);
    clean(&examine(options, &TERMS).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_being_built_anew_is_no_finding() {
    let test = TestDb::new().await;
    let mut writer = test.sql.begin().await.unwrap();
    sqlx::query(
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, run_at)
                 values (gen_random_uuid(), 'w', 'w', 1, 'scheduled', 'command', now() + interval '1 hour')",
    )
    .execute(&mut *writer)
    .await
    .unwrap();
    let sql = test.sql.clone();
    let reindex = tokio::spawn(async move {
        sqlx::raw_sql("reindex index concurrently test_runs_one_slot").execute(&sql).await.unwrap();
    });
    eventually("it waits for the writer, with a half of an index", LIMIT, async || {
        let half: bool = sqlx::query_scalar("select to_regclass('test_runs_one_slot_ccnew') is not null")
            .fetch_one(&test.sql)
            .await
            .unwrap();
        half.then_some(())
    })
    .await;
    clean(&report(&test).await);
    writer.commit().await.unwrap();
    reindex.await.unwrap();
    clean(&report(&test).await);
}
