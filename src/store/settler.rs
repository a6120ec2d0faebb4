//! Ends of attempts, gathered from whoever has one: one statement settles all that came while the one before was under way.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::gather::{Flight, Gather};
use super::settle::{Settled, settle};
use super::{Db, Error};
use crate::domain::{Lease, Outcome};

/// Ends that may wait to be sent.
const ROOM: usize = 20_000;
/// Ends per statement.
const PIECE: usize = 500;
/// How long a run that somebody has locked is asked for again before its caller is told, and how often.
const PATIENCE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(20);

type Answer = Result<Settled, Arc<Error>>;

/// Settles attempts.
#[derive(Clone)]
pub struct Settler {
    db: Db,
    ends: Arc<Gather<(Lease, Outcome), Answer>>,
}

impl Settler {
    /// One that sends by `db`, while [`Settler::run`] runs.
    pub fn new(db: Db) -> Self {
        Self { db, ends: Arc::new(Gather::new(ROOM)) }
    }

    /// Settles an attempt, as [`settle`] does. One whose run somebody has locked is tried again for two seconds, and delays no other.
    ///
    /// # Errors
    /// Those of the statement it was in. What was refused as a part of many is tried by itself before.
    pub async fn settle(&self, lease: Lease, outcome: Outcome) -> Answer {
        let over = Instant::now() + PATIENCE;
        loop {
            let settled = self.ends.ask((lease, outcome.clone())).await.unwrap_or_else(|unasked| Err(unasked.into()));
            if !matches!(settled, Ok(Settled::Busy)) || Instant::now() > over {
                return settled;
            }
            sleep(AGAIN).await;
        }
    }

    /// Settles many; what the database went away from in between is [`Settled::Busy`], and may be sent again, settled or not.
    ///
    /// # Errors
    /// Where nothing is settled; [`Error::Busy`] where somebody has all of their runs locked.
    pub async fn settle_all(&self, outcomes: Vec<(Lease, Outcome)>) -> Result<Vec<Settled>, Arc<Error>> {
        let asked = outcomes.into_iter().map(|(lease, outcome)| self.settle(lease, outcome));
        let answers = join_all(asked).await;
        if answers.iter().all(|answer| matches!(answer, Ok(Settled::Busy))) {
            return Err(Arc::new(Error::Busy(sqlx::Error::Protocol("somebody has the run locked".into()))));
        }
        match answers.iter().all(Result::is_err) {
            true => answers.into_iter().collect(),
            false => Ok(answers.into_iter().map(|answer| answer.unwrap_or(Settled::Busy)).collect()),
        }
    }

    /// Sends what is asked for, for ever: one statement after the other. One task for each [`Flight`].
    pub fn run(self, flight: Flight) -> impl Future<Output = ()> {
        let (db, ends) = (self.db, self.ends.flying(flight));
        async move { ends.fly(&db, "ends", PIECE, async |connection, ends| settle(connection, ends, None).await).await }
    }
}
