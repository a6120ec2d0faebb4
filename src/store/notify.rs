//! Hints from the database that something is to be looked at. A lost one costs latency and nothing else.

use std::time::Duration;

use sqlx::Executor as _;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::time::timeout;
use uuid::Uuid;

/// Time for connecting, and for an answer of the server.
const ANSWER: Duration = Duration::from_secs(5);
/// Silence after which the connection is tried: nobody says that the other end is gone.
const QUIET: Duration = Duration::from_secs(30);

/// Hears of requests to cancel running runs.
pub struct Cancels {
    listener: PgListener,
}

impl Cancels {
    /// Begins to listen, on a connection of its own. What was asked for before is not heard of.
    pub async fn listen(options: &PgConnectOptions) -> sqlx::Result<Self> {
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ANSWER).connect_lazy_with(options.clone());
        let mut listener = PgListener::connect_with(&pool).await?;
        // Who reconnects must look at everything, so a lost connection must be told of.
        listener.eager_reconnect(false);
        within(listener.listen("singletrack_cancel")).await?;
        Ok(Self { listener })
    }

    /// The next run whose end was asked for. An error means that hints may have been lost: listen anew.
    pub async fn next(&mut self) -> sqlx::Result<Uuid> {
        loop {
            match timeout(QUIET, self.listener.try_recv()).await {
                Ok(heard) => {
                    let heard = heard?.ok_or(sqlx::Error::WorkerCrashed)?;
                    // Anybody may notify; what is no id is no hint.
                    if let Ok(run_id) = heard.payload().parse() {
                        return Ok(run_id);
                    }
                }
                Err(_) => {
                    within(self.listener.execute("select 1")).await?;
                }
            }
        }
    }
}

async fn within<T>(answer: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
    timeout(ANSWER, answer).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}
