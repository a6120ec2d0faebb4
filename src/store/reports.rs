//! What workers say while they work, gathered from all of them: that they are alive, and what their attempts print.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::future::try_join_all;
use serde_json::Value;

use super::claim::{Renewal, renew};
use super::gather::{Flight, Gather};
use super::logs::{self, Bound, Piece, Printed};
use super::{Db, Error};
use crate::domain::Lease;

/// Renewals, attempts whose log goes on, and numbered pieces of log that may wait to be sent.
const ROOM: [usize; 3] = [50_000, 10_000, 10_000];
/// How many of each a statement takes. The latter are up to 64 KiB each.
const PIECE: [usize; 3] = [500, 50, 100];

type Answer<T> = Result<T, Arc<Error>>;
/// A lease, and what is said about its progress.
type Beat = (Lease, Option<Value>);

/// Passes on what workers say.
#[derive(Clone)]
pub struct Reports(Arc<Inner>);

struct Inner {
    db: Db,
    bound: Bound,
    renewals: Arc<Gather<Beat, Answer<Renewal>>>,
    printed: Arc<Gather<Printed, Answer<()>>>,
    pieces: Arc<Gather<Piece, Answer<bool>>>,
}

impl Reports {
    /// What sends by `db`, while [`Reports::run`] runs. `bound` is how much is kept of the log of an attempt that numbers its pieces itself.
    pub fn new(db: Db, bound: Bound) -> Self {
        let [renewals, printed, pieces] = ROOM;
        Self(Arc::new(Inner {
            db,
            bound,
            renewals: Arc::new(Gather::new(renewals)),
            printed: Arc::new(Gather::new(printed)),
            pieces: Arc::new(Gather::new(pieces)),
        }))
    }

    /// Renews leases, as [`renew`] does, each with what is said about its progress.
    ///
    /// # Errors
    /// Those of the statement one of them was in: nothing is known of any.
    pub async fn renew(&self, leases: Vec<(Lease, Option<Value>)>) -> Answer<Vec<Renewal>> {
        try_join_all(leases.into_iter().map(|beat| async { self.0.renewals.ask(beat).await? })).await
    }

    /// Stores pieces of an attempt's log, as [`logs::append`] does.
    ///
    /// # Errors
    /// Those of the statement.
    pub async fn print(&self, printed: Printed) -> Answer<()> {
        self.0.printed.ask(printed).await?
    }

    /// Stores a piece of log under the number that its worker gave it, as [`logs::append_pieces`] does; whether the lease holds.
    ///
    /// # Errors
    /// Those of the statement.
    pub async fn print_piece(&self, piece: Piece) -> Answer<bool> {
        self.0.pieces.ask(piece).await?
    }

    /// Sends what is said, for ever. One task for each [`Flight`].
    pub fn run(self, flight: Flight) -> impl Future<Output = ()> {
        let Inner { db, bound, renewals, printed, pieces } = &*self.0;
        let (db, bound) = (db.clone(), *bound);
        let (renewals, printed, pieces) = (renewals.flying(flight), printed.flying(flight), pieces.flying(flight));
        let [some_renewals, some_printed, some_pieces] = PIECE;
        let renew = async |connection: &mut _, beats: &[Beat]| {
            let leases: Vec<Lease> = beats.iter().map(|(lease, _)| *lease).collect();
            let progress: HashMap<i64, Value> =
                beats.iter().filter_map(|(lease, said)| Some((lease.fence, said.clone()?))).collect();
            renew(connection, &leases, &progress).await
        };
        async move {
            tokio::join!(
                renewals.fly(&db, "renewals", some_renewals, renew),
                printed.fly(&db, "logs", some_printed, async |connection, printed| {
                    logs::append(connection, printed).await?;
                    Ok(vec![(); printed.len()])
                }),
                pieces.fly(&db, "log_pieces", some_pieces, async move |connection, pieces| {
                    logs::append_pieces(connection, pieces, bound).await
                }),
            );
        }
    }
}
