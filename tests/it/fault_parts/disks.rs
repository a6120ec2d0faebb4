//! What a server does on a disk that is full, or slow.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use singletrack::dev::Postgres;
use sqlx::postgres::PgConnection;
use sqlx::{Connection as _, PgPool};
use tempfile::TempDir;
use tokio::task::block_in_place;
use tokio::time::timeout;

use super::disk::Disk;
use super::{LIMIT, insert};
use crate::support::database::{TestDb, own_postgres_with};
use crate::support::{eventually, not_allowed};

/// A server on a disk of its own, with an empty table `rows`; nothing where there can be no such disk.
async fn on_disk(name: &str) -> Option<(Postgres, Disk, TestDb, TempDir)> {
    let enterable = Permissions::from_mode(0o755);
    let folder = tempfile::Builder::new().permissions(enterable).tempdir().unwrap();
    let disk = match Disk::build(folder.path()) {
        Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
            not_allowed(&error.to_string());
            return None;
        }
        disk => disk.unwrap(),
    };
    let postgres = block_in_place(|| own_postgres_with(name, disk.env()));
    let test = TestDb::on(&postgres).await;
    sqlx::query("create table rows (n bigint primary key, text text)").execute(&test.sql).await.unwrap();
    let fsync: String = sqlx::query_scalar("show fsync").fetch_one(&test.sql).await.unwrap();
    assert_eq!(fsync, "on");
    assert_eq!(disk.counts().attached, 1);
    Some((postgres, disk, test, folder))
}

/// Makes the table grow by some megabytes.
async fn grow(sql: &PgPool, from: i64) -> sqlx::Result<u64> {
    let many = sqlx::query("insert into rows select n, repeat('x', 1000) from generate_series($1, $1 + 4999) n");
    many.bind(from).execute(sql).await.map(|done| done.rows_affected())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_what_needs_room_and_nothing_else() {
    let Some((_postgres, disk, test, _folder)) = on_disk("full-disk").await else { return };
    assert_eq!(grow(&test.sql, 10_000).await.unwrap(), 5000);
    disk.fill();
    let refused = grow(&test.sql, 20_000).await.unwrap_err();
    let code = refused.as_database_error().and_then(|error| error.code()).map(|code| code.into_owned());
    assert_eq!(code.as_deref(), Some("53100"), "{refused:?}");
    assert!(disk.counts().refused > 0);
    let there: i64 = sqlx::query_scalar("select count(*) from rows").fetch_one(&test.sql).await.unwrap();
    assert_eq!(there, 5000);
    sqlx::query("delete from rows where n < 10010").execute(&test.sql).await.unwrap();
    disk.mend();
    assert_eq!(grow(&test.sql, 20_000).await.unwrap(), 5000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_room_for_its_log_panics_and_comes_back_with_what_it_had_acknowledged() {
    let Some((mut postgres, disk, test, _folder)) = on_disk("full-log").await else { return };
    let mut connection = PgConnection::connect_with(&test.options()).await.unwrap();
    // The page that the others find room in.
    insert(&mut connection, 0).await.unwrap();
    disk.fill();
    let mut acknowledged = 1;
    for n in 1..20 {
        if insert(&mut connection, n).await.is_err() {
            break;
        }
        acknowledged = n + 1;
        // Whoever writes next needs the next segment.
        let _ = sqlx::query("select pg_switch_wal()").execute(&mut connection).await;
    }
    assert!(acknowledged < 20, "the log has found room");
    let log = postgres.data_dir().join("postgres.log");
    eventually("the server says why it goes", LIMIT, || async {
        let text = std::fs::read_to_string(&log).unwrap();
        text.lines().any(|line| line.contains("PANIC") && line.contains("No space left on device")).then_some(())
    })
    .await;
    disk.mend();
    block_in_place(|| postgres.restart()).unwrap();
    test.sql.close().await;
    let mut connection = PgConnection::connect_with(&test.options()).await.unwrap();
    let there: Vec<i64> = sqlx::query_scalar("select n from rows order by n").fetch_all(&mut connection).await.unwrap();
    assert!((0..acknowledged).all(|n| there.contains(&n)), "{acknowledged} acknowledged, there are {there:?}");
    insert(&mut connection, 1000).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_waits_for_a_slow_disk_and_no_longer_than_it_is_slow() {
    let Some((_postgres, disk, test, _folder)) = on_disk("slow-disk").await else { return };
    let mut connection = PgConnection::connect_with(&test.options()).await.unwrap();
    insert(&mut connection, 1).await.unwrap();
    let slow = Duration::from_millis(400);
    disk.slow(slow);
    let since = Instant::now();
    insert(&mut connection, 2).await.unwrap();
    assert!(since.elapsed() >= slow, "{:?}", since.elapsed());
    assert!(disk.counts().slowed > 0);

    // After this commit no sync of before is under way: one that the server began by itself would be the one that is waited for,
    // and is counted already.
    disk.mend();
    insert(&mut connection, 3).await.unwrap();
    let before = disk.counts().slowed;
    disk.slow(Duration::from_secs(3600));
    let waiting = insert(&mut connection, 4);
    tokio::pin!(waiting);
    let sync = eventually("a sync waits", LIMIT, || async { (disk.counts().slowed > before).then_some(()) });
    tokio::select! {
        done = &mut waiting => panic!("a commit without its sync: {done:?}"),
        () = sync => {}
    }
    disk.mend();
    timeout(LIMIT, waiting).await.unwrap().unwrap();
}
