//! Hints from the database that something is to be looked at. A lost one costs latency and nothing else.

use std::time::Duration;

use sqlx::Executor as _;
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::time::timeout;
use uuid::Uuid;

use super::{Error, Servers};

/// Time for connecting, and for an answer of the server.
const ANSWER: Duration = Duration::from_secs(5);
/// Silence after which the connection is tried: nobody says that the other end is gone.
const QUIET: Duration = Duration::from_secs(30);

/// Hears of requests to cancel running runs.
pub struct Cancels {
    listener: PgListener,
    servers: Servers,
    term: u64,
}

impl Cancels {
    /// Begins to listen to the primary, on a connection of its own. What was asked for before is not heard of.
    pub async fn listen(servers: &Servers) -> Result<Self, Error> {
        let (options, term) = servers.primary().await.map_err(Error::Unreachable)?;
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ANSWER).connect_lazy_with(options);
        let mut listener = PgListener::connect_with(&pool).await.map_err(Error::of_statement)?;
        // Who reconnects must look at everything, so a lost connection must be told of.
        listener.eager_reconnect(false);
        within(listener.listen("singletrack_cancel")).await.map_err(Error::of_statement)?;
        Ok(Self { listener, servers: servers.clone(), term })
    }

    /// The next run whose end was asked for. An error means that hints may have been lost, also because another server is the
    /// primary now: listen anew.
    pub async fn next(&mut self) -> Result<Uuid, Error> {
        loop {
            let heard = tokio::select! {
                heard = timeout(QUIET, self.listener.try_recv()) => heard,
                () = self.servers.term_over(self.term) => return Err(Error::Moved),
            };
            match heard {
                Ok(heard) => {
                    let heard = heard.and_then(|heard| heard.ok_or(sqlx::Error::WorkerCrashed));
                    // Anybody may notify; what is no id is no hint.
                    if let Ok(run_id) = heard.map_err(Error::of_statement)?.payload().parse() {
                        return Ok(run_id);
                    }
                }
                Err(_) => {
                    within(self.listener.execute("select 1")).await.map_err(Error::of_statement)?;
                }
            }
        }
    }
}

async fn within<T>(answer: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
    timeout(ANSWER, answer).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}
