//! What a cut connection has done to the row that was written on it.

use std::sync::Arc;

use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::task::JoinSet;

use super::proxy::{Counts, Weather};
use super::{Behind, insert, settled};

/// Writes rows 1, 2 and 3 in the three ways there are, on a connection each; whether somebody said that it was done.
async fn three_ways(behind: &Behind) -> [bool; 3] {
    async fn in_transaction(connection: &mut PgConnection) -> sqlx::Result<()> {
        let mut transaction = connection.begin().await?;
        insert(&mut transaction, 3).await?;
        transaction.commit().await
    }
    let prepared = insert(&mut behind.connect().await, 1).await;
    let simple = sqlx::raw_sql("insert into rows values (2)").execute(&mut behind.connect().await).await;
    let explicit = in_transaction(&mut behind.connect().await).await;
    [prepared.is_ok(), simple.is_ok(), explicit.is_ok()]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_cut_off_before_its_commit_is_not_there() {
    let behind = Behind::new(1).await;
    behind.proxy.set(Weather { cut_before_commit_per_mille: 1000, ..Weather::default() });
    assert_eq!(three_ways(&behind).await, [false; 3]);
    settled(&behind.test).await;
    assert!(behind.rows().await.is_empty());
    let connections = behind.proxy.counts().connections;
    assert_eq!(behind.proxy.counts(), Counts { connections, cuts_before_commit: 3, ..Counts::default() });
    behind.proxy.set(Weather::default());
    assert_eq!(three_ways(&behind).await, [true; 3], "the same in fair weather");
    assert_eq!(behind.rows().await, [1, 2, 3]);
    assert_eq!(behind.proxy.counts().commits, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_answer_is_cut_off_is_there() {
    let behind = Behind::new(2).await;
    behind.proxy.set(Weather { cut_before_answer_per_mille: 1000, ..Weather::default() });
    assert_eq!(three_ways(&behind).await, [false; 3]);
    assert_eq!(behind.rows().await, [1, 2, 3]);
    let connections = behind.proxy.counts().connections;
    assert_eq!(behind.proxy.counts(), Counts { connections, cuts_before_answer: 3, ..Counts::default() });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_commits_no_write_is_never_cut() {
    let behind = Behind::new(3).await;
    let mut connection = behind.connect().await;
    insert(&mut connection, 1).await.unwrap();
    behind.proxy.set(Weather { cut_before_answer_per_mille: 1000, ..Weather::default() });
    // A refusal, and a write that finds nothing to do, are answered; nothing was committed that could be in doubt.
    assert!(matches!(insert(&mut connection, 1).await, Err(sqlx::Error::Database(_))));
    let none = sqlx::query("update rows set text = 'x' where n = $1").bind(7_i64);
    assert_eq!(none.execute(&mut connection).await.unwrap().rows_affected(), 0);
    behind.proxy.set(Weather {
        cut_before_commit_per_mille: 1000,
        cut_before_answer_per_mille: 1000,
        ..Weather::default()
    });
    let mut transaction = connection.begin().await.unwrap();
    insert(&mut transaction, 2).await.unwrap();
    transaction.rollback().await.unwrap();
    let mut transaction = connection.begin().await.unwrap();
    let seen: i64 = sqlx::query_scalar("select count(*) from (select from rows for update) r")
        .fetch_one(&mut *transaction)
        .await
        .unwrap();
    assert_eq!(seen, 1);
    transaction.commit().await.unwrap();
    connection.close().await.unwrap();
    let counts = Counts { connections: 1, commits: 1, ..Counts::default() };
    assert_eq!(behind.proxy.counts(), counts);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_account_of_many_cuts_is_exact() {
    let behind = Arc::new(Behind::new(4).await);
    behind.proxy.set(Weather {
        cut_before_commit_per_mille: 100,
        cut_before_answer_per_mille: 100,
        ..Weather::default()
    });
    let mut clients = JoinSet::new();
    for client in 0..20 {
        let behind = behind.clone();
        clients.spawn(async move {
            let mut answered = Vec::new();
            let mut connection = behind.connect().await;
            for n in client * 50..client * 50 + 50 {
                match insert(&mut connection, n).await {
                    Ok(()) => answered.push(n),
                    Err(_) => connection = behind.connect().await,
                }
            }
            answered
        });
    }
    let answered = clients.join_all().await.concat();
    settled(&behind.test).await;
    let (there, counts) = (behind.rows().await, behind.proxy.counts());
    assert!(answered.iter().all(|n| there.binary_search(n).is_ok()), "answered, and not there");
    assert_eq!(counts.commits, answered.len() as u64);
    assert_eq!(counts.commits + counts.cuts_before_answer, there.len() as u64, "{counts:?}");
    assert_eq!(there.len() as u64 + counts.cuts_before_commit, 1000, "{counts:?}");
    assert!(counts.cuts_before_commit > 20 && counts.cuts_before_answer > 20, "{counts:?}");
}
