//! Which statements write.

use std::collections::BTreeSet;

use super::statements::Kind::{Begin, Commit, Read, Rollback, Write};
use super::statements::{WRITERS, kinds};
use crate::support::database::TestDb;

#[test]
fn a_statement_is_known_by_its_text() {
    let table = [
        ("select 1", Read),
        ("INSERT INTO t VALUES ('select')", Write),
        ("with a as (select 1) select * from a", Read),
        ("with a as (update t set b = 1 returning *) select * from a", Write),
        ("with a as (\n  delete from t) select 1", Write),
        ("select * from t for update skip locked", Read),
        ("with a as (select 1 for no key update of t) select 1", Read),
        ("with a as (select 1 for update) update t set b = 1", Write),
        ("select cancel_run($1, $2)", Write),
        ("select x from y, lateral enqueue_run_as ($1)", Write),
        ("select promote from t", Read),
        ("select 'delete from t' || $1 || $$update$$ || $a$ insert into $a$ || e'\\' update '", Read),
        ("select \"update\" -- update t\n /* delete from t */ from t", Read),
        ("select set_config('a', $1, false)", Read),
        ("(select 1) union (select 2)", Read),
        ("merge into t using u on true when matched then delete", Write),
        ("create table t (a int)", Write),
        ("listen a", Read),
        ("BEGIN ISOLATION LEVEL SERIALIZABLE", Begin),
        ("start transaction", Begin),
        ("commit", Commit),
        ("end", Commit),
        ("rollback", Rollback),
        ("rollback to savepoint a", Read),
        ("abort", Rollback),
    ];
    for (text, kind) in table {
        assert_eq!(kinds(text.as_bytes()), [kind], "{text}");
    }
    assert_eq!(kinds(b" begin; insert into t values (';');; commit; -- done"), [Begin, Write, Commit]);
    assert!(kinds(b" ; /* nothing */").is_empty());
}

#[tokio::test]
async fn every_function_of_the_schema_that_writes_is_known() {
    let test = TestDb::new().await;
    // Those that a statement can call, and that Postgres does not know to leave everything as it is.
    let volatile: Vec<String> = sqlx::query_scalar(
        "select distinct proname::text from pg_proc
         where pronamespace = current_schema()::regnamespace and provolatile = 'v' and prorettype <> 'trigger'::regtype",
    )
    .fetch_all(&test.sql)
    .await
    .unwrap();
    let only_read = ["new_run_id", "waiting_for"];
    let known: BTreeSet<&str> = WRITERS.iter().copied().chain(only_read).collect();
    assert_eq!(volatile.iter().map(String::as_str).collect::<BTreeSet<_>>(), known);
}
