//! All SQL and nothing else: free functions over a connection, one file per concern.
//!
//! Every write is an autocommit statement that takes arrays; an enqueue of many may be several of them, so that a part of it can be
//! there when the rest fails ([`batch`]). Connections come from [`Db::with`], which puts a limit
//! on every statement: sqlx has no timeout of its own towards a server that vanished, and a connection that was given up
//! in the middle of a statement must never be used again.

pub mod audit;
pub mod batch;
pub mod claim;
pub mod control;
pub mod demo;
pub mod depth;
pub mod doctor;
pub mod due;
pub mod enqueue;
pub mod enqueuer;
pub mod events;
pub mod figures;
mod frequent;
mod gather;
pub mod keys;
pub mod logs;
pub mod lookout;
pub mod migrate;
pub mod notify;
pub mod pauses;
pub mod pooler;
pub mod reap;
pub mod refusals;
pub mod reports;
pub mod retention;
pub mod runs;
pub mod schedules;
mod servers;
pub mod settle;
pub mod settler;
pub mod slots;
pub mod system;
pub mod workers;
pub mod workflows;

use std::time::Duration;

use deadpool::managed::{self, Metrics, Object, Pool, PoolError, QueueMode, RecycleError, RecycleResult, Status};
use sqlx::Connection as _;
use sqlx::error::DatabaseError;
use sqlx::postgres::{PgConnection, PgDatabaseError, PgSeverity};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use uuid::Uuid;

pub use self::gather::Flight;
use self::servers::Reached;
pub use self::servers::{Refusal, Servers, Unreachable};

/// How long a caller waits for a free connection.
const ACQUIRE: Duration = Duration::from_secs(5);
/// The part of it in which a server that does not let us in yet is asked again; then its reason is told.
const ASK_AGAIN: Duration = Duration::from_millis(4500);
/// Time an idle connection has to show that it is alive.
const PING: Duration = Duration::from_secs(2);
/// How long a connection is kept that nobody uses, and any connection.
const IDLE: Duration = Duration::from_secs(600);
const LIFETIME: Duration = Duration::from_secs(1800);
/// The client's limit on the work of one `with`: a little over the server's own limit on a statement, so that the server's
/// better message wins.
pub const LIMIT: Duration = Duration::from_secs(7);

/// How long a statement waits for a lock that somebody else has.
const LOCK_TIMEOUT: &str = "2s";

/// Set after connecting and not as start-up options, which poolers refuse.
const SESSION: &str = "
    select set_config('statement_timeout', '5s', false),
           set_config('lock_timeout', $1, false),
           set_config('idle_in_transaction_session_timeout', '10s', false),
           set_config('default_transaction_isolation', 'read committed', false),
           set_config('TimeZone', 'UTC', false),
           -- a client that is frozen, or gone, while it is sent what it claimed: the server commits after the sending, and
           -- statement_timeout does not end that (TCP only)
           set_config('tcp_user_timeout', '6s', false),
           -- an answer is given after the commit: it must survive a crash of the server
           set_config('synchronous_commit',
               case current_setting('synchronous_commit') when 'off' then 'on' else current_setting('synchronous_commit') end,
               false),
           -- A statement is planned once per connection, perhaps while there is next to nothing in the tables, and its plan is kept
           -- while they grow by thousands of rows per second: without an index that would be a scan of all of them, each time.
           set_config('enable_seqscan', 'off', false),
           -- Which index serves it is a matter of how many rows it has to look at. Pages must not count: an index that was large once
           -- and has few rows now, as after a burst or under an old snapshot, seems to have many pages for each, and one over the whole
           -- history, or one without the order of the queue, to be cheaper.
           set_config('random_page_cost', '0', false),
           set_config('seq_page_cost', '0', false),
           set_config('jit', 'off', false),
           -- whose enqueue it was, for those who hear of it
           set_config('singletrack.replica', $2, false),
           set_config('plan_cache_mode', $3, false)";

/// Silence after which a connection is tried before it is used again; before that the other end is taken to be there, unless another
/// connection broke meanwhile.
const QUIET: Duration = Duration::from_secs(1);

/// Why the database did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There was no connection to be had: nothing was done.
    #[error("no connection to the database: {0}")]
    Unreachable(#[source] Unreachable),
    /// None came free in time: nothing was done.
    #[error("no connection to the database came free within {ACQUIRE:?}")]
    Crowded,
    /// Too many wait for the database, or they do for too long: nothing was done.
    #[error("too many requests wait for the database, or it does not get to them in time")]
    Full,
    /// What sends to the database has ended: nothing was done.
    #[error("nothing is sent to the database any more")]
    Ended,
    /// Somebody else holds a lock for too long, or the server has no room: nothing was done.
    #[error("the database is busy: {0}")]
    Busy(#[source] sqlx::Error),
    /// The connection broke: whether the statement was carried out is not known.
    #[error("the connection to the database broke: {0}")]
    Broken(#[source] sqlx::Error),
    /// It gave no answer in time: whether the statement was carried out is not known.
    #[error("the database gave no answer in time")]
    TimedOut,
    /// The connection was to a server that may no longer be the primary.
    #[error("the database moved to another server")]
    Moved,
    /// It refused the statement.
    #[error(transparent)]
    Refused(sqlx::Error),
}

impl Error {
    /// Whether asking again later can help.
    pub fn is_passing(&self) -> bool {
        !matches!(self, Self::Refused(_))
    }

    /// Whether it refused a value that its types can't hold, such as a time before its calendar: class 22, data exception.
    pub fn is_bad_value(&self) -> bool {
        match self {
            Self::Refused(sqlx::Error::Database(database)) => {
                database.code().is_some_and(|code| code.starts_with("22"))
            }
            _ => false,
        }
    }

    /// Whether the statement may have been carried out although it failed.
    pub fn outcome_unknown(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::TimedOut)
    }

    /// What an error of a statement means. The codes are those of appendix A of the PostgreSQL manual.
    fn of_statement(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => {
                Self::Broken(error)
            }
            sqlx::Error::Database(database) if is_last_word(&**database) => Self::Broken(error),
            sqlx::Error::Database(database) => match database.code().as_deref() {
                // lock_not_available, deadlock_detected, query_canceled (statement_timeout), serialization_failure,
                // out_of_memory, disk_full, read_only_sql_transaction (a standby)
                Some("55P03" | "40P01" | "57014" | "40001" | "53200" | "53100" | "25006") => Self::Busy(error),
                _ => Self::Refused(error),
            },
            _ => Self::Refused(error),
        }
    }
}

/// Whether the server closes the connection with this, which can cut off a commit: connection_exception, the shutdowns of 57P0x, and
/// whatever it calls fatal.
fn is_last_word(said: &dyn DatabaseError) -> bool {
    let fatal = said
        .try_downcast_ref::<PgDatabaseError>()
        .is_some_and(|said| matches!(said.severity(), PgSeverity::Fatal | PgSeverity::Panic));
    fatal || said.code().is_some_and(|code| code.starts_with("08") || code.starts_with("57P"))
}

/// The way to the database.
#[derive(Clone, Debug)]
pub struct Db {
    pool: Pool<Connections>,
    limit: Duration,
    replica: Uuid,
}

impl Db {
    /// A pool of at most `connections` to the primary of `servers`; none is opened before it is needed. `limit` is for the work
    /// of one [`Db::with`]: [`LIMIT`] is a good one.
    pub fn new(servers: impl Into<Servers>, connections: u32, limit: Duration) -> Self {
        Self::of(Connections { servers: servers.into(), replica: Uuid::new_v4(), plans: "auto" }, connections, limit)
    }

    /// Another pool to the same servers in the same name, for the statements that are sent all the time, each with as much as there is
    /// to do: they are planned once per connection, which takes longer than most of them. Reading is not for this one: what a list
    /// is narrowed by may be anything, and wants a plan of its own.
    pub fn flights(&self, connections: u32) -> Self {
        let Connections { servers, replica, .. } = self.pool.manager();
        let plans = "force_generic_plan";
        Self::of(Connections { servers: servers.clone(), replica: *replica, plans }, connections, self.limit)
    }

    fn of(manager: Connections, connections: u32, limit: Duration) -> Self {
        let size = usize::try_from(connections).unwrap_or(usize::MAX);
        let replica = manager.replica;
        // The last one used first, so that those which are not needed can be seen to be idle.
        let pool = Pool::builder(manager).max_size(size).queue_mode(QueueMode::Lifo).build();
        Self { pool: pool.unwrap_or_else(|_| unreachable!("only timeouts of its own need a runtime")), limit, replica }
    }

    /// What others hear of an enqueue over this pool bears this name.
    pub fn replica(&self) -> Uuid {
        self.replica
    }

    /// Runs `work` on a connection of the pool, within the limit for statements: `db.with(async |connection|
    /// enqueue(connection, &requests, false).await).await`.
    ///
    /// When the limit is over, or the caller's future is dropped half way, the connection is closed and not given back:
    /// nobody may meet an answer, or a transaction, that somebody else left on it.
    ///
    /// # Errors
    /// What became of `work`, by what the caller can do about it; [`Error::Unreachable`] when the database lets nobody in, and
    /// [`Error::Crowded`] when no connection comes free within 5 seconds.
    pub async fn with<T>(&self, work: impl AsyncFnOnce(&mut PgConnection) -> sqlx::Result<T>) -> Result<T, Error> {
        // Acquired first and by itself: only then is it known that nothing was sent.
        let mut connection = Guarded(Some(self.acquire().await?));
        match timeout(self.limit, work(connection.inner())).await {
            Ok(Ok(value)) => {
                connection.give_back();
                Ok(value)
            }
            Ok(Err(error)) => {
                let error = Error::of_statement(error);
                match &error {
                    // What broke this one may have broken all of them.
                    Error::Broken(_) => self.pool.manager().servers.broke(),
                    Error::Busy(sqlx::Error::Database(said)) | Error::Refused(sqlx::Error::Database(said)) => {
                        match said.code().as_deref() {
                            // The server became a standby, or was fenced off: the next connection may find the primary.
                            Some("25006") => connection.doubt(),
                            _ => connection.give_back(),
                        }
                    }
                    _ => {}
                }
                Err(error)
            }
            Err(_) => Err(Error::TimedOut),
        }
    }

    async fn acquire(&self) -> Result<Object<Connections>, Error> {
        match timeout(ACQUIRE, self.pool.get()).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(PoolError::Backend(error))) => Err(Error::Unreachable(error)),
            Ok(Err(_)) | Err(_) => Err(Error::Crowded),
        }
    }

    /// Closes connections that nobody has used for ten minutes.
    pub fn close_idle(&self) {
        self.pool.retain(|_, metrics| metrics.last_used() < IDLE);
    }

    /// How many connections there are, and who waits for one.
    pub fn status(&self) -> Status {
        self.pool.status()
    }

    /// Closes the pool, waiting at most a moment for connections in use.
    pub async fn close(&self) {
        let over = Instant::now() + Duration::from_secs(2);
        for idle in self.pool.retain(|_, _| false).removed {
            // A black-holed connection would keep `close` waiting for ever.
            let _ = timeout_at(over, idle.connection.close()).await;
        }
        self.pool.close();
        while self.pool.status().size > 0 && Instant::now() < over {
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// How long a statement of this connection waits for a lock, from now on.
async fn set_lock_timeout(connection: &mut PgConnection, timeout: &str) -> sqlx::Result<()> {
    sqlx::query!("select set_config('lock_timeout', $1, false)", timeout).fetch_one(connection).await?;
    Ok(())
}

/// Makes the connections of a pool, and looks at each before it is used again.
#[derive(Debug)]
struct Connections {
    servers: Servers,
    replica: Uuid,
    plans: &'static str,
}

impl Connections {
    async fn open(&self) -> Result<Reached, Unreachable> {
        let mut reached = self.servers.reach().await?;
        let set = sqlx::query(SESSION).bind(LOCK_TIMEOUT).bind(self.replica.to_string()).bind(self.plans);
        let set = set.execute(&mut reached.connection).await;
        match set {
            Ok(_) => Ok(reached),
            Err(error) => Err(self.servers.refused(&reached, error)),
        }
    }
}

impl managed::Manager for Connections {
    type Type = Reached;
    type Error = Unreachable;

    async fn create(&self) -> Result<Reached, Unreachable> {
        let patience = Instant::now() + ASK_AGAIN;
        let mut pause = Duration::from_millis(10);
        loop {
            match self.open().await {
                Err(error) if error.is_passing() && Instant::now() + pause < patience => sleep(pause).await,
                opened => return opened,
            }
            pause = (2 * pause).min(Duration::from_secs(1));
        }
    }

    async fn recycle(&self, reached: &mut Reached, metrics: &Metrics) -> RecycleResult<Unreachable> {
        let given_up = || RecycleError::message("not to be used any more");
        if reached.term != self.servers.term() || metrics.age() > LIFETIME {
            return Err(given_up());
        }
        let breaks = self.servers.breaks();
        if metrics.last_used() < QUIET && reached.breaks == breaks {
            return Ok(());
        }
        match timeout(PING, reached.connection.ping()).await {
            Ok(Ok(())) => {
                reached.breaks = breaks;
                Ok(())
            }
            Ok(Err(_)) | Err(_) => Err(given_up()),
        }
    }
}

/// A connection that is closed when dropped, unless it was given back.
struct Guarded(Option<Object<Connections>>);

impl Guarded {
    fn inner(&mut self) -> &mut PgConnection {
        let held =
            self.0.as_mut().unwrap_or_else(|| unreachable!("a guarded connection is there until it is given back"));
        &mut held.connection
    }

    fn give_back(&mut self) {
        self.0.take();
    }

    /// Has the others of its server looked at, too.
    fn doubt(&self) {
        if let Some(held) = &self.0
            && let Some(pool) = Object::pool(held)
        {
            pool.manager().servers.doubt(held.term);
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(held) = self.0.take() {
            drop(Object::take(held));
        }
    }
}
