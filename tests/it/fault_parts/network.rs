//! Networks that are slow, gone, or rude.

use std::time::{Duration, Instant};

use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::time::timeout;

use super::proxy::Weather;
use super::{Behind, LIMIT, insert, settled};
use crate::support::eventually;

fn was_reset(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_black_hole_passes_nothing_on_until_it_is_closed() {
    let behind = Behind::new(1).await;
    let mut connection = behind.connect().await;
    behind.proxy.set(Weather { black_hole: true, ..Weather::default() });
    let (connected, inserted) = (behind.connect(), insert(&mut connection, 1));
    tokio::pin!(connected, inserted);
    let nothing = timeout(Duration::from_millis(300), async {
        tokio::select! {
            _ = &mut connected => panic!("a connection through a black hole"),
            _ = &mut inserted => panic!("an answer through a black hole"),
        }
    });
    assert!(nothing.await.is_err());
    eventually("both wait", LIMIT, || async { (behind.proxy.counts().held == 2).then_some(()) }).await;
    assert!(behind.rows().await.is_empty());
    behind.proxy.set(Weather::default());
    timeout(LIMIT, inserted).await.unwrap().unwrap();
    timeout(LIMIT, connected).await.unwrap();
    assert_eq!(behind.rows().await, [1], "what came meanwhile was passed on");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_sent_into_a_black_hole_and_left_behind_still_happens_when_it_is_closed() {
    let behind = Behind::new(2).await;
    let mut connection = behind.connect().await;
    insert(&mut connection, 1).await.unwrap();
    behind.proxy.set(Weather { black_hole: true, ..Weather::default() });
    assert!(timeout(Duration::from_millis(300), insert(&mut connection, 2)).await.is_err());
    drop(connection);
    eventually("it came to the hole", LIMIT, || async { (behind.proxy.counts().held > 0).then_some(()) }).await;
    assert_eq!(behind.rows().await, [1]);
    behind.proxy.set(Weather::default());
    eventually("it is there", LIMIT, || async { (behind.rows().await == [1, 2]).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delay_is_paid_in_each_direction() {
    let behind = Behind::new(3).await;
    let mut connection = behind.connect().await;
    insert(&mut connection, 1).await.unwrap();
    let delay = Duration::from_millis(150);
    behind.proxy.set(Weather { delay: Some(delay), ..Weather::default() });
    let since = Instant::now();
    insert(&mut connection, 2).await.unwrap();
    assert!(since.elapsed() >= 2 * delay, "{:?}", since.elapsed());
    assert!(behind.proxy.counts().delayed >= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_reset_one_by_one_all_at_once_and_before_they_are_made() {
    let behind = Behind::new(4).await;
    let (mut one, mut two) = (behind.connect().await, behind.connect().await);
    behind.proxy.reset_all();
    for connection in [&mut one, &mut two] {
        assert!(was_reset(&insert(connection, 1).await.unwrap_err()));
    }
    assert_eq!(behind.proxy.counts().resets, 2);

    let mut three = behind.connect().await;
    behind.proxy.set(Weather { refuse: true, ..Weather::default() });
    let refused = PgConnection::connect_with(&behind.options()).await.unwrap_err();
    assert!(was_reset(&refused), "{refused:?}");
    assert_eq!(behind.proxy.counts().refused, 1);
    insert(&mut three, 1).await.unwrap();

    behind.proxy.set(Weather { reset_per_mille: 1000, ..Weather::default() });
    let reset = insert(&mut three, 2).await.unwrap_err();
    assert!(was_reset(&reset), "{reset:?}");
    assert_eq!(behind.proxy.counts().resets, 3);
    assert!(!behind.rows().await.contains(&2), "the first batch only prepares");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_is_dropped_takes_its_connections_along() {
    let behind = Behind::new(5).await;
    let mut connection = behind.connect().await;
    let options = behind.options();
    let test = behind.test;
    drop(behind.proxy);
    settled(&test).await;
    assert!(connection.ping().await.is_err());
    assert!(PgConnection::connect_with(&options).await.is_err());
}
