//! Old snapshots, as a replica notices them while it serves.

use singletrack::engine::pins::Watch;

use crate::support::database::TestDb;

#[tokio::test]
async fn an_old_snapshot_is_warned_of_with_who_holds_it() {
    let test = TestDb::new().await;
    let mut reader = test.sql.acquire().await.unwrap();
    sqlx::raw_sql("set application_name = 'a long dump'").execute(&mut *reader).await.unwrap();
    sqlx::raw_sql("begin isolation level repeatable read; select count(*) from test_runs")
        .execute(&mut *reader)
        .await
        .unwrap();
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *reader).await.unwrap();
    let none: [String; 0] = [];
    assert_eq!(Watch::new(test.db.clone()).pass().await.unwrap(), none, "it is not old yet");
    let lines = Watch::of_age(test.db.clone(), 0).pass().await.unwrap();
    let said = format!("process {pid}: singletrack by a long dump, idle in transaction, open for ");
    assert!(lines.len() == 1 && lines[0].starts_with(&said), "{lines:?}");
    // Open, and in nobody's way.
    sqlx::raw_sql("rollback; begin").execute(&mut *reader).await.unwrap();
    assert_eq!(Watch::of_age(test.db.clone(), 0).pass().await.unwrap(), none);
    sqlx::raw_sql("rollback").execute(&mut *reader).await.unwrap();
}
