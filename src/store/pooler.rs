//! A pooler between us and the database that gives a server connection to somebody else between two of our transactions.
//!
//! Under such a one settings, LISTEN and prepared statements end up with others; pgbouncer before 1.21 has even been seen to run
//! another client's statement. It can't be asked what it is, but what it does can be seen.

use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::PgConnection;
use tokio::time::timeout;

use super::{Servers, Unreachable};

/// How long all of it may take: two connections and some twenty statements, perhaps to a server far away that has just been promoted.
const LIMIT: Duration = Duration::from_secs(20);

/// Looks at different connections, since a pooler may hand them out in any order; one is enough where it takes the last one used.
const ROUNDS: usize = 3;

/// Marks a session with something that nobody else has. By the simple protocol, as all here: it is safe under any pooler.
const MARK: &str = "select set_config('singletrack.session', gen_random_uuid()::text, false)";
const READ: &str = "select current_setting('singletrack.session', true)";

/// Why the way to the database can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody lets us in.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    /// There is no answer, as from a pooler that has no second connection to give.
    #[error(
        "not looked at within {LIMIT:?}: the database is slow, or a pooler gives no second connection; a session pooler must have more connections to give than SINGLETRACK_POOL_SIZE and 12"
    )]
    Silent,
    /// Sessions are mixed up.
    #[error(
        "DATABASE_URL leads to a pooler that shares connections between transactions, where settings, LISTEN and prepared \
         statements get lost: name the database itself, or a pool in session mode (pgbouncer: pool_mode = session)"
    )]
    Shared,
    /// Something else is wrong.
    #[error(transparent)]
    Failed(#[from] sqlx::Error),
}

/// Makes sure that a connection stays with its session. Two connections that are our own pass at any time, whatever else goes on.
///
/// # Errors
/// [`Error::Shared`] when a session was seen from another connection, or did not keep its setting.
pub async fn refuse_sharing(servers: &Servers) -> Result<(), Error> {
    timeout(LIMIT, try_to_mix_up(servers)).await.unwrap_or(Err(Error::Silent))
}

async fn try_to_mix_up(servers: &Servers) -> Result<(), Error> {
    let (mut one, mut other) = (servers.connect().await?, servers.connect().await?);
    for _ in 0..ROUNDS {
        let mark = ask(&mut one, MARK).await?;
        // What is idle is now taken by the other one, for as long as its transaction is open.
        sqlx::raw_sql("begin").execute(&mut other).await.map_err(refused)?;
        if ask(&mut other, READ).await? == mark || ask(&mut one, READ).await? != mark {
            return Err(Error::Shared);
        }
        sqlx::raw_sql("rollback").execute(&mut other).await?;
        // Those that are handed out in turn show themselves now.
        if ask(&mut one, READ).await? != mark || ask(&mut one, READ).await? != mark {
            return Err(Error::Shared);
        }
        std::mem::swap(&mut one, &mut other);
    }
    Ok(())
}

async fn ask(connection: &mut PgConnection, question: &'static str) -> Result<Option<String>, sqlx::Error> {
    sqlx::raw_sql(question).fetch_one(connection).await?.try_get(0)
}

/// A pooler that shares connections between statements refuses a transaction, which no database does.
fn refused(error: sqlx::Error) -> Error {
    match &error {
        sqlx::Error::Database(database) if database.message().contains("statement pooling") => Error::Shared,
        _ => Error::Failed(error),
    }
}
