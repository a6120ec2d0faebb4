//! Bringing the schema up to this version.

use std::time::Duration;

use sqlx::Connection as _;
use sqlx::migrate::{Migrate as _, MigrateError, Migrator};
use sqlx::postgres::PgConnection;
use tokio::time::sleep;

use super::{Servers, Unreachable};

/// How often a migration is tried whose table somebody else has locked, or while another replica migrates.
const TRIES: usize = 200;
/// Time between two tries, for those who waited meanwhile.
const PAUSE: Duration = Duration::from_secs(1);

static MIGRATIONS: Migrator = Migrator {
    // We lock ourselves: what is missing has to be looked up under the lock, and a try that failed has to give it back.
    locking: false,
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
    /// A newer version has been here.
    #[error(
        "the database has migration {0}, and this singletrack ({version}) knows none after {newest}: a newer version has migrated \
         it; start that one, or a newer one still",
        version = env!("CARGO_PKG_VERSION"),
        newest = newest()
    )]
    Newer(i64),
    /// What was applied under this number is not what this version has there.
    #[error(
        "migration {0} was applied to the database in another form than this singletrack ({version}) has: one of the two is of a \
         build that was changed; start the version that migrated it, or name another database",
        version = env!("CARGO_PKG_VERSION")
    )]
    Altered(i64),
    /// A migration was refused.
    #[error(transparent)]
    Refused(#[from] MigrateError),
    /// Another statement was.
    #[error(transparent)]
    Failed(#[from] sqlx::Error),
}

/// Applies what is missing; returns how many migrations that were. Replicas that start at once take turns.
///
/// On a connection of its own: the lock is the session's, and a migration whose future is dropped would leave it held on a pooled
/// connection.
///
/// # Errors
/// [`Error::Newer`] and [`Error::Altered`] before anything is changed.
pub async fn migrate(servers: &Servers) -> Result<usize, Error> {
    let mut connection = servers.connect().await?;
    // Else each start says that the table of migrations is there already, as if that were news.
    sqlx::query("set client_min_messages = warning").execute(&mut connection).await?;
    // Without it the server goes on with the migration of a process that was killed, and with its locks, to the end of it. Where
    // the server's system can't tell, that has to do.
    let _ = sqlx::query("set client_connection_check_interval = '1s'").execute(&mut connection).await;
    // Waits no longer for a table than renewals can bear: whoever wants it after a migration that waits has to wait for that one.
    sqlx::query("set lock_timeout = '2s'").execute(&mut connection).await?;
    let mut tries = 0;
    loop {
        match turn(&mut connection).await {
            Err(error) if is_locked(&error) && tries < TRIES => tries += 1,
            done => {
                let _ = connection.close().await;
                return done;
            }
        }
        sleep(PAUSE).await;
    }
}

/// One try, under the lock that all versions share.
async fn turn(connection: &mut PgConnection) -> Result<usize, Error> {
    connection.lock().await?;
    let applied = apply(connection).await;
    // Where the connection broke, why it did is what counts.
    let unlocked = connection.unlock().await;
    let count = applied?;
    unlocked?;
    Ok(count)
}

async fn apply(connection: &mut PgConnection) -> Result<usize, Error> {
    let missing = lacking(connection).await?;
    // Where nothing is, an account that may only read and write rows will do.
    if missing > 0 {
        MIGRATIONS.run(connection).await?;
    }
    Ok(missing)
}

/// Whether it was somebody else's lock.
fn is_locked(error: &Error) -> bool {
    let Error::Refused(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return false;
    };
    error.as_database_error().and_then(|error| error.code()).as_deref() == Some("55P03")
}

/// How many of the migrations that this version knows the database lacks.
///
/// # Errors
/// [`Error::Newer`] and [`Error::Altered`]: what the database has is not what this version knows.
pub async fn missing(servers: &Servers) -> Result<usize, Error> {
    let mut connection = servers.connect().await?;
    let missing = lacking(&mut connection).await;
    let _ = connection.close().await;
    missing
}

async fn lacking(connection: &mut PgConnection) -> Result<usize, Error> {
    if !has_any(connection).await? {
        return Ok(MIGRATIONS.iter().count());
    }
    let applied: Vec<(i64, Vec<u8>)> =
        sqlx::query_as("select version, checksum from _sqlx_migrations where success order by version desc")
            .fetch_all(connection)
            .await?;
    for (version, checksum) in &applied {
        match MIGRATIONS.iter().find(|known| known.version == *version) {
            None => return Err(Error::Newer(*version)),
            Some(known) if known.checksum != checksum.as_slice() => return Err(Error::Altered(*version)),
            Some(_) => {}
        }
    }
    Ok(MIGRATIONS.iter().count() - applied.len())
}

/// The newest migration the database has; `None` when it has none.
pub async fn applied(connection: &mut PgConnection) -> sqlx::Result<Option<i64>> {
    if !has_any(connection).await? {
        return Ok(None);
    }
    sqlx::query_scalar("select max(version) from _sqlx_migrations where success").fetch_one(connection).await
}

async fn has_any(connection: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null").fetch_one(connection).await
}
