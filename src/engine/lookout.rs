//! One glance for all periodic parts: they run when there is something for them, and an idle replica asks the database
//! little. A sign is a hint like any other: what it is about, a part finds by itself.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::executor::boottime::Boottime;
use crate::store::lookout::{Signs, glance};
use crate::store::{self, Db};

/// Time between two glances, unless something is due sooner.
pub const OFTEN: Duration = Duration::from_millis(750);
/// The least time between two, however much is due.
const SOON: Duration = Duration::from_millis(50);
/// A part that no sign called for this long looks by itself: the net under signs that say too little.
const NET: Duration = Duration::from_secs(60);

/// A glance, and when it was sent.
#[derive(Clone, Debug)]
pub struct Look {
    /// What it saw.
    pub signs: Signs,
    /// When it was sent.
    pub at: Boottime,
}

impl Look {
    /// How long to wait for the next one, which is `often` if nothing is due sooner.
    pub(super) fn rest(&self, often: Duration) -> Duration {
        self.signs.until_next.map_or(often, |next| next.max(SOON).min(often))
    }
}

/// Looks what there is to do.
pub async fn pass(db: &Db) -> Result<Look, store::Error> {
    db.with(async |connection| {
        let at = Boottime::now();
        Ok(Look { signs: glance(connection).await?, at })
    })
    .await
}

/// Where the parts hear what was seen.
#[derive(Clone)]
pub struct Looks(watch::Receiver<Option<Look>>);

/// Where it is told what was seen, `None` where that is not known, and where that is heard.
pub fn looks() -> (watch::Sender<Option<Look>>, Looks) {
    let (tell, hear) = watch::channel(None);
    (tell, Looks(hear))
}

impl Looks {
    /// Waits for a glance, one that this part has not heard of yet, that calls for it. Where nobody knows what there is, all are
    /// called.
    pub async fn call_for(&mut self, mut wanted: impl FnMut(&Look) -> bool) {
        let called = async {
            while self.0.changed().await.is_ok() {
                if self.0.borrow_and_update().as_ref().is_none_or(&mut wanted) {
                    return;
                }
            }
            std::future::pending().await // nobody looks any more: the replica stops
        };
        let _ = timeout(NET, called).await;
    }
}
