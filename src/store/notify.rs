//! Hints from the database that something is to be looked at. A lost one costs latency and nothing else.

use std::time::Duration;

use sqlx::Executor as _;
use sqlx::postgres::{PgListener, PgNotification, PgPoolOptions};
use tokio::time::timeout;
use uuid::Uuid;

use super::{Error, Servers};

/// The channels.
const CANCEL: &str = "singletrack_cancel";
const QUEUED: &str = "singletrack_queued";

/// Time for connecting, and for an answer of the server.
const ANSWER: Duration = Duration::from_secs(5);
/// Silence after which the connection is tried: nobody says that the other end is gone.
const QUIET: Duration = Duration::from_secs(30);

/// What there is to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Somebody asked for the end of this run.
    Cancel(Uuid),
    /// Another replica enqueued runs for workers that claim over HTTP.
    QueuedForPull,
    /// Another replica enqueued runs of the other kinds.
    Queued,
}

/// Hears of requests to cancel running runs, and of runs that are to be started.
pub struct Hints {
    listener: PgListener,
    servers: Servers,
    term: u64,
    /// What this one enqueued is no news.
    replica: String,
}

impl Hints {
    /// Begins to listen to the primary, on a connection of its own. What happened before is not heard of, nor what was enqueued by
    /// `replica`, which is [`Db::replica`](super::Db::replica).
    pub async fn listen(servers: &Servers, replica: Uuid) -> Result<Self, Error> {
        let (options, term) = servers.primary().await.map_err(Error::Unreachable)?;
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ANSWER).connect_lazy_with(options);
        let mut listener = PgListener::connect_with(&pool).await.map_err(Error::of_statement)?;
        // Who reconnects must look at everything, so a lost connection must be told of.
        listener.eager_reconnect(false);
        within(listener.listen_all([CANCEL, QUEUED])).await.map_err(Error::of_statement)?;
        Ok(Self { listener, servers: servers.clone(), term, replica: replica.to_string() })
    }

    /// The next hint. An error means that hints may have been lost, also because another server is the
    /// primary now: listen anew.
    pub async fn next(&mut self) -> Result<Hint, Error> {
        loop {
            let heard = tokio::select! {
                heard = timeout(QUIET, self.listener.try_recv()) => heard,
                () = self.servers.term_over(self.term) => return Err(Error::Moved),
            };
            match heard {
                Ok(heard) => {
                    let heard = heard.and_then(|heard| heard.ok_or(sqlx::Error::WorkerCrashed));
                    if let Some(hint) = self.read(&heard.map_err(Error::of_statement)?) {
                        return Ok(hint);
                    }
                }
                Err(_) => {
                    within(self.listener.execute("select 1")).await.map_err(Error::of_statement)?;
                }
            }
        }
    }
}

impl Hints {
    /// Anybody may notify; what can't be read is no hint.
    fn read(&self, heard: &PgNotification) -> Option<Hint> {
        if heard.channel() == CANCEL {
            return heard.payload().parse().ok().map(Hint::Cancel);
        }
        match heard.payload().split_once(' ')? {
            (_, replica) if replica == self.replica => None,
            ("pull", _) => Some(Hint::QueuedForPull),
            _ => Some(Hint::Queued),
        }
    }
}

async fn within<T>(answer: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
    timeout(ANSWER, answer).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}
