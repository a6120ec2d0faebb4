//! A look at the database past the service, for `singletrack demo`: what it refuses by itself, and what it says of itself.

use uuid::Uuid;

use crate::store::{Db, Error, LIMIT, Servers, demo, doctor::promise};

/// Somebody with a way of their own to the database.
pub struct Witness(Db);

impl Witness {
    /// Nothing is connected to yet.
    pub fn new(servers: impl Into<Servers>) -> Self {
        Self(Db::new(servers, 1, LIMIT))
    }

    /// Types a second row for the slot of this run; the index that refused it. `None`: it was let in.
    ///
    /// # Errors
    /// When the database can't be asked, or refuses it for another reason.
    pub async fn double(&self, run_id: Uuid) -> Result<Option<String>, Error> {
        self.0.with(async |connection| demo::copy_by_hand(connection, run_id).await).await
    }

    /// What `invariant_violations` has, over all of history: a line per row.
    ///
    /// # Errors
    /// When the database can't be asked.
    pub async fn violations(&self) -> Result<Vec<String>, Error> {
        let broken = self.0.with(async |connection| promise::violations(connection, true).await).await?;
        Ok(broken.into_iter().flat_map(|wrong| wrong.rows).collect())
    }

    /// Hangs up.
    pub async fn leave(&self) {
        self.0.close().await;
    }
}
