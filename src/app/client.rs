//! Enqueueing from your own program.

use std::sync::Arc;

use tokio::task::JoinSet;

use crate::store::enqueue::{Enqueued, Request};
use crate::store::enqueuer::Enqueuer;
use crate::store::{Db, Error, Flight, LIMIT, Servers};

/// Enqueues runs from your own program, as the API does: requests that come while a statement is under way are sent together by the
/// next one. Clone it freely; the connections are shared. It wants a runtime of Tokio, and ends with that or with
/// its last clone: then [`Error::Ended`] is the answer.
///
/// The schema must be up to date ([`prepare_schema`](super::prepare_schema)).
#[derive(Clone)]
pub struct Client {
    enqueuer: Enqueuer,
    _flights: Arc<JoinSet<()>>,
}

impl Client {
    /// One that opens at most so many connections to the primary of `servers` and as many for what goes its own way, as it needs them;
    /// four are enough for most.
    ///
    /// # Panics
    /// Outside of a runtime of Tokio.
    pub fn new(servers: impl Into<Servers>, connections: u32) -> Self {
        let db = Db::new(servers, connections, LIMIT);
        let enqueuer = Enqueuer::new(db.clone(), db.flights(connections));
        let flights = Flight::ALL.map(|flight| enqueuer.clone().run(flight)).into_iter().collect();
        Self { enqueuer, _flights: Arc::new(flights) }
    }

    /// Enqueues a run. The answer is given after the commit; whoever drops the future before does not know what became of it.
    ///
    /// # Errors
    /// Where the database was away, or refused it; [`Error::Full`] where it could not be sent for five seconds. After one with [`Error::outcome_unknown`] the run may be there all the same.
    pub async fn enqueue(&self, request: Request) -> Result<Enqueued, Arc<Error>> {
        self.enqueuer.enqueue(request).await
    }

    /// Enqueues many; the answers stand in the order of the requests, and those for one workflow are carried out in it.
    pub async fn enqueue_all(&self, requests: &[Request]) -> Vec<Result<Enqueued, Arc<Error>>> {
        self.enqueuer.enqueue_all(requests).await
    }
}
