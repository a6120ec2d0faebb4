//! A real pgbouncer in front of the tests' Postgres.

use super::database::TestDb;
use super::pgbouncer::Pgbouncer;
use super::skipped;

/// A running pgbouncer, killed when dropped.
pub struct Pooler {
    /// The database by way of it; the test's own statements go there directly.
    pub test: TestDb,
    _process: Pgbouncer,
}

impl Pooler {
    /// One with these settings, when it lets in; `None` where it is not installed.
    pub async fn to(test: &TestDb, settings: &str) -> Option<Self> {
        let Some(process) = Pgbouncer::start(test.options().get_socket().unwrap(), settings) else {
            skipped("pgbouncer is not installed");
            return None;
        };
        let (database, _) = test.url.split_once("host=").unwrap();
        let url = format!("{database}host={}&sslmode=disable", process.folder().display());
        let test = TestDb { sql: test.sql.clone(), ..TestDb::at(url) };
        Some(Self { test, _process: process })
    }
}
