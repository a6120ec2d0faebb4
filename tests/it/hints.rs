//! What replicas tell each other, so that nobody has to look all the time.

use std::time::Duration;

use serde_json::json;
use singletrack::store::notify::{Hint, Hints};
use singletrack::store::{Db, LIMIT, Servers};
use tokio::time::timeout;

use crate::support::calls::LIMIT as PATIENCE;
use crate::support::database::TestDb;
use crate::support::replica::Replica;

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_hears_of_what_another_enqueued_and_not_of_its_own() {
    let test = TestDb::new().await;
    let servers = Servers::from(test.options());
    let mine = Db::new(servers.clone(), 1, LIMIT);
    let mut hints = Hints::listen(&servers, mine.replica()).await.unwrap();
    let another = Replica::api_only(&test).await;
    another.client.define("w", "true").await;
    another.client.define_pull("pulled", json!({})).await;

    // What it tells itself was told first, and would be heard of first.
    let own = "select pg_notify('singletrack_queued', 'worker ' || current_setting('singletrack.replica'))";
    mine.with(async |connection| sqlx::query(own).execute(connection).await).await.unwrap();

    let next = async |hints: &mut Hints| timeout(PATIENCE, hints.next()).await.unwrap().unwrap();
    another.client.enqueue("w").await.run_id();
    assert_eq!(next(&mut hints).await, Hint::Queued);
    another.client.enqueue("pulled").await.run_id();
    assert_eq!(next(&mut hints).await, Hint::QueuedForPull);
    // A refusal is no news.
    assert_eq!(another.client.enqueue("w").await.status, 409);
    let run_id = another.client.enqueue("w@other").await.run_id();
    assert_eq!(next(&mut hints).await, Hint::Queued);
    sqlx::query("select pg_notify('singletrack_cancel', $1)")
        .bind(run_id.to_string())
        .execute(&test.sql)
        .await
        .unwrap();
    assert_eq!(next(&mut hints).await, Hint::Cancel(run_id));
    assert!(timeout(Duration::from_millis(1), hints.next()).await.is_err());
    another.finish().await;
}
