//! Bringing the schema up to this version.

use std::time::Duration;

use sqlx::Connection as _;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::PgConnection;
use tokio::time::sleep;

use super::{Servers, Unreachable};

/// How often a migration is tried whose table somebody else has locked, or while another replica migrates.
const TRIES: usize = 200;
/// Time between two tries, for those who waited meanwhile.
const PAUSE: Duration = Duration::from_secs(1);

static MIGRATIONS: Migrator = Migrator {
    // A newer version may have added migrations while this one still runs: that is the promise of forward-only ones.
    ignore_missing: true,
    ..sqlx::migrate!("./migrations")
};

/// The newest migration this version knows.
pub fn newest() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default()
}

/// A migration this version knows.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Its number.
    pub version: i64,
    /// What it is called.
    pub name: &'static str,
    /// Its text as a checksum.
    pub checksum: &'static [u8],
    /// Its text.
    pub sql: &'static str,
}

/// The migrations this version knows, in order.
pub fn known() -> impl DoubleEndedIterator<Item = Known> {
    MIGRATIONS.iter().map(|migration| Known {
        version: migration.version,
        name: &migration.description,
        checksum: &migration.checksum,
        sql: migration.sql.as_str(),
    })
}

/// Why the schema could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no connection to be had.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    /// A migration was refused.
    #[error(transparent)]
    Refused(#[from] MigrateError),
    /// Another statement was.
    #[error(transparent)]
    Failed(#[from] sqlx::Error),
}

/// Applies what is missing; returns how many migrations that were. Replicas that start at once take turns.
///
/// On a connection of its own: sqlx holds a session lock while it migrates, and a cancelled migration would leave it held
/// on a pooled connection.
pub async fn migrate(servers: &Servers) -> Result<usize, Error> {
    let mut connection = servers.connect().await?;
    // Else each start says that the table of migrations is there already, as if that were news.
    sqlx::query("set client_min_messages = warning").execute(&mut connection).await?;
    let before = applied(&mut connection).await?.unwrap_or_default();
    let mut tries = 0;
    while let Err(error) = patiently(&mut connection).await {
        tries += 1;
        if tries == TRIES || !is_locked(&error) {
            return Err(error.into());
        }
        sleep(PAUSE).await;
    }
    connection.close().await?;
    Ok(MIGRATIONS.iter().filter(|migration| migration.version > before).count())
}

/// Waits no longer for a table than renewals can bear: whoever wants it after a migration that waits has to wait for that one.
async fn patiently(connection: &mut PgConnection) -> Result<(), MigrateError> {
    sqlx::query("set lock_timeout = '2s'").execute(&mut *connection).await?;
    MIGRATIONS.run(connection).await
}

/// Whether it was somebody else's lock.
fn is_locked(error: &MigrateError) -> bool {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else { return false };
    error.as_database_error().and_then(|error| error.code()).as_deref() == Some("55P03")
}

/// The newest migration the database has; `None` when it has none.
pub async fn applied(connection: &mut PgConnection) -> sqlx::Result<Option<i64>> {
    let there: bool =
        sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null").fetch_one(&mut *connection).await?;
    if !there {
        return Ok(None);
    }
    sqlx::query_scalar("select max(version) from _sqlx_migrations where success").fetch_one(connection).await
}
