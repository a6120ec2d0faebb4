//! What `singletrack doctor` reads: facts, found in a live database without writing to it. What they mean is judged where they are
//! asked for.

pub mod promise;
pub mod schema;
pub mod server;

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::time::timeout;

use super::{Error, Servers};

/// How long the database has to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// One statement, one snapshot: a transaction around them all would be what [`server::sessions`] warns of. Compilation is not
/// worth its time for statements that are asked once.
const SESSION: &str = "
    select set_config('default_transaction_read_only', 'on', false),
           set_config('statement_timeout', $1, false),
           set_config('lock_timeout', '2s', false),
           set_config('TimeZone', 'UTC', false),
           set_config('jit', 'off', false),
           set_config('application_name', 'singletrack doctor', false),
           set_config('tcp_user_timeout', '30s', false)";

/// A connection to the primary that can't write. `limit` is for each statement; `None` for no limit.
///
/// # Errors
/// [`Error::Unreachable`] when no server lets us in, and [`Error::TimedOut`] when none does within 10 seconds.
pub async fn connect(servers: impl Into<Servers>, limit: Option<Duration>) -> Result<PgConnection, Error> {
    let limit = limit.map_or("0".to_owned(), |limit| format!("{}ms", limit.as_millis()));
    let servers = servers.into();
    let connecting = async {
        let mut connection = servers.connect().await.map_err(Error::Unreachable)?;
        sqlx::query(SESSION).bind(limit).execute(&mut connection).await.map_err(Error::of_statement)?;
        Ok(connection)
    };
    timeout(CONNECT, connecting).await.map_err(|_| Error::TimedOut)?
}

/// Ends it in order; a server that is gone does not matter any more.
pub async fn close(connection: PgConnection) {
    let _ = timeout(CONNECT, connection.close()).await;
}

/// Where the connection leads.
#[derive(Clone, Debug)]
pub struct Place {
    /// The database.
    pub database: String,
    /// The account.
    pub account: String,
    /// The server's version, as it says it: `15.18`.
    pub version: String,
    /// The same as a number: 150018.
    pub version_number: i32,
    /// The database's clock.
    pub now: DateTime<Utc>,
    /// It is a standby.
    pub in_recovery: bool,
    /// The account may see what others do: superusers, and members of `pg_read_all_stats`.
    pub sees_others: bool,
    /// The schema of the tables, quoted where it must be; `None` where there are none.
    pub schema: Option<String>,
}

/// Looks where it is.
pub async fn place(connection: &mut PgConnection) -> sqlx::Result<Place> {
    sqlx::query_as!(
        Place,
        r#"
        select current_database()::text as "database!", current_user::text as "account!",
               current_setting('server_version') as "version!",
               current_setting('server_version_num')::integer as "version_number!",
               clock_timestamp() as "now!",
               pg_is_in_recovery() as "in_recovery!",
               pg_has_role(current_user, 'pg_read_all_stats', 'usage') as "sees_others!",
               (select quote_ident(n.nspname)
                from pg_class c
                join pg_namespace n on n.oid = c.relnamespace
                where c.oid = to_regclass('test_runs')) as schema
        "#
    )
    .fetch_one(connection)
    .await
}
