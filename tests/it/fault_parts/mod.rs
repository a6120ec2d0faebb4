//! The parts of the fault suite do to a database what they say: else its account would be of faults that never happened.

#[path = "../../fault/disk.rs"]
mod disk;
#[path = "../../fault/proxy.rs"]
mod proxy;
#[path = "../../fault/statements.rs"]
mod statements;
#[path = "../../fault/wire.rs"]
mod wire;

mod bytes;
mod cuts;
mod disks;
mod known;
mod network;

use std::time::Duration;

use sqlx::Connection as _;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgSslMode};

use self::proxy::{Proxy, Target};
use crate::support::database::TestDb;
use crate::support::eventually;

/// How long a part may take for what it says; no test is slow because of it.
const LIMIT: Duration = Duration::from_secs(30);

/// What connections by way of a proxy are called at the server.
const NAME: &str = "by way of a proxy";

/// A database with an empty table `rows`, by way of a proxy.
struct Behind {
    proxy: Proxy,
    test: TestDb,
}

impl Behind {
    async fn new(seed: u64) -> Self {
        let test = TestDb::new().await;
        sqlx::query("create table rows (n bigint primary key, text text)").execute(&test.sql).await.unwrap();
        let folder = test.options().get_socket().unwrap().clone();
        let proxy = Proxy::start(Target::Unix(folder.join(".s.PGSQL.5432")), seed).unwrap();
        Self { proxy, test }
    }

    fn options(&self) -> PgConnectOptions {
        let direct = self.test.options();
        let database = direct.get_database().unwrap();
        let there = PgConnectOptions::new_without_pgpass().host("127.0.0.1").port(self.proxy.port());
        let there = there.username(direct.get_username()).database(database).ssl_mode(PgSslMode::Disable);
        there.application_name(NAME)
    }

    async fn connect(&self) -> PgConnection {
        PgConnection::connect_with(&self.options()).await.unwrap()
    }

    /// What is in the table, asked directly.
    async fn rows(&self) -> Vec<i64> {
        sqlx::query_scalar("select n from rows order by n").fetch_all(&self.test.sql).await.unwrap()
    }
}

/// Waits until the server has done, or given up, what it was sent by way of a proxy, and has nobody left there.
async fn settled(test: &TestDb) {
    eventually("the server has noticed that its clients are gone", LIMIT, || async {
        let count = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = $1",
        );
        let left: i64 = count.bind(NAME).fetch_one(&test.sql).await.unwrap();
        (left == 0).then_some(())
    })
    .await;
}

async fn insert(connection: &mut PgConnection, n: i64) -> sqlx::Result<()> {
    sqlx::query("insert into rows values ($1)").bind(n).execute(connection).await.map(|_| ())
}
