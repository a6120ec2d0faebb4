//! One run as it goes on: its events and its log, as server-sent events that end with the run.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::Event;
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use super::Api;
use super::auth::Caller;
use super::events::{HEARTBEAT, answer, begin, name_of};
use super::extract::Params;
use super::feed::News;
use super::problem::Problem;
use crate::domain::Status;
use crate::store::events::{Change, is_over, of_run};
use crate::store::logs::{self, LogEntry, Read};
use crate::store::{Db, Error};

/// Rows that are read at once.
const PAGE: i64 = 200;
/// Time between two looks at a log that grows, and the longest at one that does not.
const SOON: Duration = Duration::from_millis(250);
const LATER: Duration = Duration::from_secs(1);
/// Time until it is tried again when the database can't be read.
const AGAIN: Duration = Duration::from_secs(1);

/// Whether a stream is asked for, by `follow=true` or by the `Accept` of an `EventSource`.
pub(super) fn is_wanted(headers: &HeaderMap, params: &mut Params) -> Result<bool, Problem> {
    let accepts = |accept: &str| accept.split([',', ';']).any(|kind| kind.trim() == "text/event-stream");
    let asked = headers.get_all(header::ACCEPT).iter().any(|accept| accept.to_str().is_ok_and(accepts));
    Ok(params.one::<bool>("follow")?.unwrap_or(asked))
}

/// The events of a run, those that are there and those that come.
pub(super) async fn events(api: Api, caller: Caller, run_id: Uuid, last: Option<i64>) -> Result<Response, Problem> {
    let place = api.feed.place()?;
    let source = Events { run_id, after: last.unwrap_or(0), heard: api.feed.hear(), stale: true };
    follow(api, caller, source, last.is_some(), place).await
}

/// The log of a run, what is there and what comes.
pub(super) async fn log(
    api: Api,
    caller: Caller,
    run_id: Uuid,
    attempt: Option<i32>,
    last: Option<Read>,
) -> Result<Response, Problem> {
    let place = api.feed.log_place()?;
    let source = Log { run_id, attempt, after: last.unwrap_or_default(), pause: Duration::ZERO };
    follow(api, caller, source, last.is_some(), place).await
}

/// Where a stream comes from.
enum Source {
    Events(Events),
    Log(Log),
}

impl From<Events> for Source {
    fn from(events: Events) -> Self {
        Self::Events(events)
    }
}

impl From<Log> for Source {
    fn from(log: Log) -> Self {
        Self::Log(log)
    }
}

/// What came, and whether nothing comes any more.
type Came = (Vec<Event>, bool);

async fn follow(
    api: Api,
    caller: Caller,
    source: impl Into<Source>,
    again: bool,
    place: OwnedSemaphorePermit,
) -> Result<Response, Problem> {
    let mut source = source.into();
    let (events, ended) = source.read(&api.db).await?;
    // What tells an EventSource not to come back another time.
    if again && ended && events.is_empty() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let mut follower = Follower {
        api: api.clone(),
        source,
        pending: VecDeque::from([begin().comment("from here on")]),
        ended: false,
        quiet_until: Instant::now() + HEARTBEAT,
        _place: place,
    };
    follower.came((events, ended));
    Ok(answer(api, caller, stream::unfold(follower, Follower::next)))
}

/// Where one listener stands.
struct Follower {
    api: Api,
    source: Source,
    pending: VecDeque<Event>,
    ended: bool,
    quiet_until: Instant,
    _place: OwnedSemaphorePermit,
}

impl Follower {
    fn came(&mut self, (events, ended): Came) {
        self.pending.extend(events);
        if ended {
            self.pending.push_back(Event::default().event("end").data("{}"));
            self.ended = true;
        }
    }

    /// The next event, or the end.
    async fn next(mut self) -> Option<(Event, Self)> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                self.quiet_until = Instant::now() + HEARTBEAT;
                return Some((event, self));
            }
            if self.ended {
                return None;
            }
            let api = self.api.clone();
            tokio::select! {
                biased;
                () = sleep_until(self.quiet_until) => {
                    self.pending.push_back(Event::default().comment("nothing new"));
                    self.source.look_again();
                }
                came = self.source.go_on(&api.db) => match came {
                    Ok(came) => self.came(came),
                    Err(error) => {
                        tracing::warn!(%error, "can't read what a listener follows; trying again");
                        sleep(AGAIN).await;
                    }
                }
            }
        }
    }
}

impl Source {
    /// What is there now.
    async fn read(&mut self, db: &Db) -> Result<Came, Problem> {
        Ok(match self {
            Self::Events(events) => events.read(db).await?,
            Self::Log(log) => log.read(db).await?,
        })
    }

    /// What comes next; it may be nothing yet.
    async fn go_on(&mut self, db: &Db) -> Result<Came, Error> {
        match self {
            Self::Events(events) if events.stale => events.read(db).await,
            Self::Events(events) => {
                events.stale = events.hear().await;
                Ok((Vec::new(), false))
            }
            Self::Log(log) => {
                sleep(log.pause).await;
                log.read(db).await
            }
        }
    }

    /// Has it read also where nothing was heard.
    fn look_again(&mut self) {
        if let Self::Events(events) = self {
            events.stale = true;
        }
    }
}

/// The events of one run: read by themselves, in the order in which they were written, when the feed says that there are some.
struct Events {
    run_id: Uuid,
    /// The number of the last one.
    after: i64,
    heard: Receiver<Arc<News>>,
    /// There may be some.
    stale: bool,
}

impl Events {
    async fn read(&mut self, db: &Db) -> Result<Came, Error> {
        let changes = db.with(async |connection| of_run(connection, self.run_id, self.after, PAGE).await).await?;
        self.stale = i64::try_from(changes.len()).is_ok_and(|read| read >= PAGE);
        let is_end = |change: &Change| change.to.parse::<Status>().is_ok_and(Status::is_final);
        let mut ended = changes.iter().any(is_end);
        match changes.last() {
            Some(last) => self.after = last.seq,
            // Whoever comes back may have seen the end.
            None => ended = db.with(async |connection| is_over(connection, self.run_id).await).await?,
        }
        let event = |change: &Change| {
            let json = serde_json::to_string(change).unwrap_or_default();
            Event::default().event(name_of(change)).id(change.seq.to_string()).data(json)
        };
        Ok((changes.iter().map(event).collect(), ended))
    }

    /// Waits for news; whether they may be of this run.
    async fn hear(&mut self) -> bool {
        match self.heard.recv().await {
            // Those that are empty say that somebody begins to look, or begins anew.
            Ok(news) => news.told.is_empty() || news.told.iter().any(|told| told.change.run_id == self.run_id),
            Err(RecvError::Lagged(_)) => true,
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// The log of one run: looked at again and again.
struct Log {
    run_id: Uuid,
    attempt: Option<i32>,
    after: Read,
    pause: Duration,
}

impl Log {
    async fn read(&mut self, db: &Db) -> Result<Came, Error> {
        let (run_id, attempt, after) = (self.run_id, self.attempt, self.after);
        let (entries, over) =
            db.with(async |connection| logs::follow(connection, run_id, attempt, after, PAGE).await).await?;
        let full = i64::try_from(entries.len()).is_ok_and(|read| read >= PAGE);
        self.pause = match entries.as_slice() {
            _ if full => Duration::ZERO,
            [] => (self.pause * 2).clamp(SOON, LATER),
            _ => SOON,
        };
        let event = |entry: LogEntry| {
            self.after.pass(&entry);
            let json = serde_json::to_string(&entry).unwrap_or_default();
            Event::default().event("log").id(self.after.to_string()).data(json)
        };
        Ok((entries.into_iter().map(event).collect(), over && !full))
    }
}
