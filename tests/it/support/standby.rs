//! A primary and its standby, to be parted.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use singletrack::dev::Postgres;
use tokio::task::block_in_place;

use super::database::{TestDb, new_postgres, options, remove_unused};
use super::eventually;

/// For what two servers do between them.
const LIMIT: Duration = Duration::from_secs(30);

/// A primary with a migrated database, and a standby that follows it.
pub struct Pair {
    pub primary: Postgres,
    pub standby: Postgres,
    /// The database on the primary.
    pub test: TestDb,
    /// The database on the server that is the standby now.
    pub other: TestDb,
    /// The URL that names both, the primary first.
    pub url: String,
}

/// When the primary answers a commit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Replication {
    /// When the standby has it, too.
    Synchronous,
    /// At once.
    Asynchronous,
}

impl Pair {
    /// Two servers in folders of this name.
    pub async fn start(folder: &str, replication: Replication) -> Self {
        let mut primary = block_in_place(|| new_postgres(folder));
        let test = TestDb::on(&primary).await;
        let standby = block_in_place(|| {
            // There is no pg_basebackup in every package of Postgres; a copy of a server that stands still is as good.
            primary.stop_fast();
            let standby = copy(&primary, &format!("{folder}-standby"));
            primary.restart().unwrap();
            Postgres::start(standby).expect("a standby")
        });
        let other = TestDb::at(standby.url("test"));
        let socket = |url: &str| url.split_once("host=").unwrap().1.split_once('&').unwrap().0.to_owned();
        let url = test.url.replace("&sslmode", &format!(",{}&sslmode", socket(&other.url)));
        let pair = Self { primary, standby, test, other, url };
        let state = if replication == Replication::Synchronous {
            run(&pair.test, "alter system set synchronous_standby_names = '*'").await;
            run(&pair.test, "select pg_reload_conf()").await;
            "sync"
        } else {
            "async"
        };
        eventually("the standby follows", LIMIT, || async {
            let states: Vec<String> =
                sqlx::query_scalar("select sync_state from pg_stat_replication where state = 'streaming'")
                    .fetch_all(&pair.test.sql)
                    .await
                    .unwrap();
            (states == [state]).then_some(())
        })
        .await;
        pair
    }

    /// Makes a primary of the standby.
    pub async fn promote(&self) {
        let promoted: bool = sqlx::query_scalar("select pg_promote()").fetch_one(&self.other.sql).await.unwrap();
        assert!(promoted);
    }

    /// From now on the standby hears nothing of the primary. It has what was committed before.
    pub async fn part(&self) {
        let at: String =
            sqlx::query_scalar("select pg_current_wal_flush_lsn()::text").fetch_one(&self.test.sql).await.unwrap();
        let caught_up = "select pg_last_wal_replay_lsn() >= $1::pg_lsn";
        eventually("the standby has caught up", LIMIT, || async {
            let done: bool = sqlx::query_scalar(caught_up).bind(&at).fetch_one(&self.other.sql).await.unwrap();
            done.then_some(())
        })
        .await;
        run(&self.other, "alter system set primary_conninfo = ''").await;
        run(&self.other, "select pg_reload_conf()").await;
        eventually("nobody follows", LIMIT, || async {
            let count: i64 =
                sqlx::query_scalar("select count(*) from pg_stat_replication").fetch_one(&self.test.sql).await.unwrap();
            (count == 0).then_some(())
        })
        .await;
    }
}

async fn run(test: &TestDb, statement: &'static str) {
    sqlx::query(statement).execute(&test.sql).await.unwrap();
}

/// Copies a server that is stopped, as one that will follow it.
fn copy(primary: &Postgres, folder: &str) -> singletrack::dev::Options {
    let options = options(folder);
    let base = options.data_dir.clone();
    remove_unused(&base);
    fs::create_dir_all(&base).unwrap();
    let from = cluster(primary.data_dir());
    let to = base.join(from.file_name().unwrap());
    let copied = Command::new("cp").arg("-a").args([&from, &to]).status().unwrap();
    assert!(copied.success());
    let socket = primary.url("postgres").parse::<sqlx::postgres::PgConnectOptions>().unwrap();
    let socket = socket.get_socket().unwrap().display().to_string();
    // In a file, so that it can be changed: settings of the command line win over those of SQL.
    let follow = format!("primary_conninfo = 'host=''{socket}'' port=5432 user=singletrack'\n");
    let settings = to.join("postgresql.auto.conf");
    fs::write(&settings, fs::read_to_string(&settings).unwrap() + &follow).unwrap();
    let (signal, owner) = (to.join("standby.signal"), fs::metadata(&to).unwrap());
    fs::write(&signal, "").unwrap();
    chown(&signal, Some(owner.uid()), Some(owner.gid())).unwrap();
    options
}

/// The folder of the data in that of a Postgres of ours.
pub fn cluster(base: &Path) -> PathBuf {
    let mut entries = fs::read_dir(base).unwrap().map(|entry| entry.unwrap());
    let found = entries.find(|entry| entry.file_name().to_str().unwrap().starts_with("pg"));
    found.unwrap().path()
}
