//! Events as they happen: one part of the replica reads them, for everybody who listens here, and only while somebody does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Api;
use super::problem::Problem;
use crate::store::events::{self, Change, Page, Position};
use crate::store::{Db, Error};

/// Listeners of a replica; those beyond are refused.
const LISTENERS: usize = 10_000;
/// Those of them that read logs, each by itself.
const LOG_LISTENERS: usize = 200;
/// Listeners that may read the database at once, to catch up with what they have missed.
const READERS: usize = 4;
/// Events that are read at once.
const PAGE: i64 = 500;
/// Time between two looks while there is nothing new.
const LOOK: Duration = Duration::from_millis(200);
/// Time until it is tried again when the database can't be read.
const AGAIN: Duration = Duration::from_secs(1);
/// Pieces of news that are kept for a listener that is slow, a page at most each; then it is dropped.
const BACKLOG: usize = 64;

/// Where listeners hear of events.
pub struct Feed {
    said: broadcast::Sender<Arc<News>>,
    /// Told when a listener came.
    came: Notify,
    places: Arc<Semaphore>,
    log_places: Arc<Semaphore>,
    readers: Semaphore,
    held_back: AtomicU64,
}

/// What happened between two positions. Listeners share it: it is written as JSON once.
#[derive(Debug)]
pub(super) struct News {
    /// It has everything after this.
    pub(super) after: Position,
    /// And up to this.
    pub(super) upto: Position,
    /// The events, in their order.
    pub(super) told: Vec<Told>,
    /// What was told before may be of a history that is gone: the database is another one, or lost its last transactions.
    pub(super) anew: bool,
}

/// An event, ready to be sent.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) position: Position,
    pub(super) change: Change,
    pub(super) json: String,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            said: broadcast::Sender::new(BACKLOG),
            came: Notify::new(),
            places: Arc::new(Semaphore::new(LISTENERS)),
            log_places: Arc::new(Semaphore::new(LOG_LISTENERS)),
            readers: Semaphore::new(READERS),
            held_back: AtomicU64::new(0),
        }
    }
}

impl News {
    fn of(after: Position, Page { changes, upto, .. }: Page) -> Self {
        let told = |(position, change)| {
            let json = serde_json::to_string(&change).unwrap_or_default();
            Told { position, change, json }
        };
        Self { after, upto, told: changes.into_iter().map(told).collect(), anew: false }
    }
}

impl Feed {
    /// A place for one more listener.
    pub(super) fn place(&self) -> Result<OwnedSemaphorePermit, Problem> {
        let place = self.places.clone().try_acquire_owned();
        place.map_err(|_| Problem::too_many_listeners(LISTENERS))
    }

    /// A place for one more listener to a log.
    pub(super) fn log_place(&self) -> Result<OwnedSemaphorePermit, Problem> {
        let place = self.log_places.clone().try_acquire_owned();
        place.map_err(|_| Problem::too_many_listeners(LOG_LISTENERS))
    }

    /// What is said from now on. Whoever wants to miss nothing reads the database after this.
    pub(super) fn hear(&self) -> broadcast::Receiver<Arc<News>> {
        let heard = self.said.subscribe();
        self.came.notify_one();
        heard
    }

    /// Where events stand that are yet to come.
    pub(super) async fn now(&self, db: &Db) -> Result<Position, Error> {
        let _reader = self.readers.acquire().await;
        db.with(async |connection| events::now(connection).await).await
    }

    /// What a listener has missed after `after`; whether that was all; and whether some of it is gone, which it then begins behind.
    pub(super) async fn missed(&self, db: &Db, after: Position) -> Result<(News, bool), Error> {
        let reader = self.readers.acquire().await;
        let page = db.with(async |connection| events::after(connection, after, PAGE).await).await?;
        drop(reader);
        if page.forgotten || page.foreign {
            let now = self.now(db).await?;
            return Ok((News { after: now, upto: now, told: Vec::new(), anew: true }, true));
        }
        let all = !page.full;
        Ok((News::of(after, page), all))
    }

    /// Age of the oldest event that can't be told yet, where it is more than a second: a transaction that began to write before it is open.
    pub(super) fn held_back(&self) -> Option<Duration> {
        Some(Duration::from_secs(self.held_back.load(Ordering::Relaxed))).filter(|age| !age.is_zero())
    }

    /// Says what happens until nobody listens.
    async fn follow(&self, db: &Db) {
        let (mut at, mut said) = (None, None);
        while self.said.receiver_count() > 0 {
            let wait = match self.look(db, at).await {
                Ok((mut news, full)) => {
                    let goes_on = at == Some(news.after);
                    at = Some(news.upto);
                    // Who listens since before it began to look must know what it has not seen.
                    if !goes_on || !news.told.is_empty() {
                        // Those who listen stand where they were last told something. That there was nothing since is news too, or each
                        // of them would read the database for itself: any transaction moves the position on.
                        if let (true, Some(said)) = (goes_on, said) {
                            news.after = said;
                        }
                        said = at;
                        let _ = self.said.send(Arc::new(news));
                    }
                    if full { Duration::ZERO } else { LOOK }
                }
                Err(error) => {
                    tracing::warn!(%error, "can't read events for those who listen; trying again");
                    AGAIN
                }
            };
            if !wait.is_zero() {
                sleep(wait).await;
            }
        }
    }

    async fn look(&self, db: &Db, at: Option<Position>) -> Result<(News, bool), Error> {
        let nothing = |now, anew| (News { after: now, upto: now, told: Vec::new(), anew }, false);
        let now = async || db.with(async |connection| events::now(connection).await).await;
        let Some(at) = at else { return Ok(nothing(now().await?, false)) };
        let page = db.with(async |connection| events::after(connection, at, PAGE).await).await?;
        self.held_back.store(page.held_back.map_or(0, |age| age.as_secs()), Ordering::Relaxed);
        if page.forgotten || page.foreign {
            // What was deleted while this could not read, a listener may have read by itself: each finds out where it stands.
            return Ok(nothing(now().await?, page.foreign));
        }
        let full = page.full;
        Ok((News::of(at, page), full))
    }
}

/// Tells those who listen what happens, until `over`. Without listeners it asks the database nothing.
pub async fn tell_events(api: Api, over: CancellationToken) {
    let telling = async {
        loop {
            api.feed.came.notified().await;
            api.feed.follow(&api.db).await;
        }
    };
    tokio::select! {
        () = over.cancelled() => {}
        () = telling => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_beyond_the_limit_are_refused_until_one_leaves() {
        let feed = Feed::default();
        let mut places: Vec<_> = (0..LISTENERS).map(|_| feed.place().expect("a place")).collect();
        let refused = feed.place().expect_err("no place");
        assert_eq!((refused.status().as_u16(), refused.cause()), (503, "too-many-listeners"));
        places.pop();
        assert!(feed.place().is_ok());
    }
}
