//! Every change of a run's status as it happens: server-sent events.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::{StreamExt as _, stream};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, sleep, sleep_until};

use super::Api;
use super::auth::Caller;
use super::extract::Params;
use super::feed::{News, Told};
use super::problem::{Place, Problem};
use super::runs::take_statuses;
use crate::domain::{Status, WorkflowId};
use crate::store::events::{Change, Position};

/// Silence after which a listener is sent a comment, so that both ends notice when the other is gone.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(15);
/// How soon clients are to come back.
const RETRY: Duration = Duration::from_secs(1);

/// Which events a listener wants. What is `None` or empty does not narrow it.
struct Filter {
    workflow_id: Option<String>,
    definition: Option<String>,
    statuses: Vec<Status>,
    queue: Option<String>,
    /// What is not there for them is not told.
    caller: Caller,
}

impl Filter {
    fn wants(&self, change: &Change) -> bool {
        let is = |wanted: &Option<String>, value: &str| wanted.as_deref().is_none_or(|wanted| wanted == value);
        self.caller.sees(&change.workflow_id)
            && is(&self.workflow_id, &change.workflow_id)
            && is(&self.definition, &change.definition)
            && is(&self.queue, &change.queue)
            && (self.statuses.is_empty() || self.statuses.iter().any(|status| status.as_str() == change.to))
    }
}

/// Events of all runs
///
/// Server-sent events (`text/event-stream`), each with an `id`. Whoever comes back with the last one in `Last-Event-ID`, to any replica,
/// gets what happened since, without a gap and nothing twice. Without one the stream begins with what happens from now on.
///
/// - `status`: a run was enqueued, or changed its status; `cancel_requested`: somebody asked for the end of a running run. The data of
///   both is a `Change`, as JSON in one line. They come in the order of the transactions that wrote them, when all that began before
///   have ended; where two transactions crossed, `seq` says which of a run's events was first.
/// - `reset`: what was missed is not kept any more (`SINGLETRACK_RETENTION`). Read the lists anew; the stream goes on from here.
/// - `dropped`: the last one, for a client that reads too slowly. It may come back with the id of the last event that it got.
///
/// Each 15 seconds without an event there is a comment, which also says when an open transaction of somebody's holds events back. The
/// stream ends when the replica stops; `EventSource` comes back by itself.
#[utoipa::path(
    get, path = "/api/v1/events", operation_id = "follow_events", tag = "runs",
    params(("workflow_id" = Option<String>, Query, description = "The full workflow id"),
           ("definition" = Option<String>, Query, description = "The definition; finds its instances too"),
           ("status" = Option<String>, Query, description = "The status from then on: one, or several separated by commas or repeated"),
           ("queue" = Option<String>, Query, description = "The queue"),
           ("Last-Event-ID" = Option<String>, Header, description = "The `id` of the last event that was received"),
           ("last_event_id" = Option<String>, Query, description = "The same, for clients that can't set the header, which wins")),
    responses((status = 200, body = String, content_type = "text/event-stream", description = "Events until one side ends it",
               example = "id: 8814-20313\nevent: status\ndata: {\"seq\":20313,\"run_id\":\"0198c5a0-5a1e-7c5e-9d3c-3f6d2a1b4c5d\",\
                          \"workflow_id\":\"deploy\",\"definition\":\"deploy\",\"queue\":\"default\",\"from\":\"queued\",\
                          \"to\":\"running\",\"attempt\":1,\"fence\":311,\"actor\":\"host:7:1f0c\",\"reason\":null,\
                          \"at\":\"2026-11-22T10:00:01Z\"}\n\n"),
              (status = 400, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem, description = "`too-many-listeners`, or the database can't be used")))]
pub(super) async fn follow(
    State(api): State<Api>,
    caller: Caller,
    headers: HeaderMap,
    mut params: Params,
) -> Result<Response, Problem> {
    let filter = Filter {
        workflow_id: params.one::<WorkflowId>("workflow_id")?.map(|id| id.to_string()),
        definition: params.one::<WorkflowId>("definition")?.map(|id| id.to_string()),
        statuses: take_statuses(&mut params)?,
        queue: params.one("queue")?,
        caller: caller.clone(),
    };
    let last = last_event_id::<Position>(&headers, &mut params)?;
    params.finish(&["workflow_id", "definition", "status", "queue", "last_event_id"])?;
    let place = api.feed.place()?;
    let heard = api.feed.hear();
    let at = match last {
        Some(last) => last,
        None => api.feed.now(&api.db).await?,
    };
    let to = api.clone();
    let listener = Listener {
        pending: VecDeque::from([begin().id(at.to_string())]),
        filter,
        at,
        heard,
        news: None,
        behind: last.is_some(),
        ended: false,
        quiet_until: Instant::now() + HEARTBEAT,
        api,
        _place: place,
    };
    Ok(answer(to, caller, stream::unfold(listener, Listener::next)))
}

/// The first thing that is sent: how soon to come back.
pub(super) fn begin() -> Event {
    Event::default().retry(RETRY)
}

/// Events that were written for a listener and not yet sent to it.
const WRITTEN: usize = 16;

/// A stream of events as an answer, which nobody on the way is to keep. It ends when the caller's key does, or the replica.
///
/// What writes it is a task of its own. As a part of the answer it would stand still while the client does not read, with whatever it
/// has just then: a connection, or its turn at a lock that everybody needs.
pub(super) fn answer(api: Api, caller: Caller, events: impl stream::Stream<Item = Event> + Send + 'static) -> Response {
    let (written, mut taken) = mpsc::channel(WRITTEN);
    tokio::spawn(async move {
        let writing = async {
            let mut events = pin!(events);
            while let Some(event) = events.next().await
                && written.send(event).await.is_ok()
            {}
        };
        tokio::select! {
            () = writing => {}
            () = written.closed() => {}
            () = api.draining.cancelled() => {}
            () = api.keys.until_refused(&api.flights, &caller) => {}
        }
    });
    let taken = stream::poll_fn(move |context| taken.poll_recv(context));
    let mut response = Sse::new(taken.map(Ok::<_, std::convert::Infallible>)).into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The id of the last event that the client got. `EventSource` comes back with the parameter of its first request: the header wins.
pub(super) fn last_event_id<T: std::str::FromStr<Err: std::fmt::Display>>(
    headers: &HeaderMap,
    params: &mut Params,
) -> Result<Option<T>, Problem> {
    let parameter = params.one::<String>("last_event_id")?.map(|id| (Place::Parameter("last_event_id".into()), id));
    let header = headers.get("last-event-id").map(|id| {
        let id = id.to_str().unwrap_or_default().to_owned();
        (Place::Header("Last-Event-ID".into()), id)
    });
    // An empty one is what a client has that got no event yet.
    let Some((place, id)) = header.or(parameter).filter(|(_, id)| !id.is_empty()) else { return Ok(None) };
    id.parse().map(Some).map_err(|error: T::Err| Problem::invalid_at(place, error.to_string()))
}

/// The name under which a change is sent.
pub(super) fn name_of(change: &Change) -> &'static str {
    match change.from.as_deref() == Some(change.to.as_str()) {
        true => "cancel_requested",
        false => "status",
    }
}

/// Where one listener stands.
struct Listener {
    api: Api,
    filter: Filter,
    /// Everything up to here was sent, or is in `pending` or `news`.
    at: Position,
    heard: Receiver<Arc<News>>,
    pending: VecDeque<Event>,
    /// What was heard, and how much of it was looked at.
    news: Option<(Arc<News>, usize)>,
    /// The database has to be read for what was missed.
    behind: bool,
    ended: bool,
    quiet_until: Instant,
    _place: OwnedSemaphorePermit,
}

impl Listener {
    /// The next event, or the end.
    async fn next(mut self) -> Option<(Event, Self)> {
        loop {
            if let Some(event) = self.pending.pop_front().or_else(|| self.take()) {
                self.quiet_until = Instant::now() + HEARTBEAT;
                return Some((event, self));
            }
            if self.ended {
                return None;
            }
            tokio::select! {
                biased;
                () = sleep_until(self.quiet_until) => self.pending.push_back(self.heartbeat()),
                () = self.advance() => {}
            }
        }
    }

    /// The next of the news that this one wants.
    fn take(&mut self) -> Option<Event> {
        let (news, seen) = self.news.as_mut()?;
        while let Some(Told { position, change, json }) = news.told.get(*seen) {
            *seen += 1;
            if *position > self.at {
                self.at = *position;
                if self.filter.wants(change) {
                    return Some(Event::default().event(name_of(change)).id(position.to_string()).data(json));
                }
            }
        }
        self.at = self.at.max(news.upto);
        self.news = None;
        None
    }

    async fn advance(&mut self) {
        if self.behind {
            return self.catch_up().await;
        }
        match self.heard.recv().await {
            Ok(news) if news.anew => self.begin_anew(news.upto),
            // Said by somebody who began to look later than this one did.
            Ok(news) if news.after > self.at => self.behind = true,
            Ok(news) => self.news = Some((news, 0)),
            Err(RecvError::Lagged(_)) => {
                let data =
                    r#"{"detail":"this client reads too slowly: come back with the id of the last event that it got"}"#;
                self.pending.push_back(Event::default().event("dropped").data(data));
                self.ended = true;
            }
            Err(RecvError::Closed) => self.ended = true,
        }
    }

    /// Reads a page of what was missed. What is said meanwhile is heard only from the last page on: it is in the others.
    async fn catch_up(&mut self) {
        let heard = self.api.feed.hear();
        match self.api.feed.missed(&self.api.db, self.at).await {
            Ok((news, _)) if news.anew => {
                self.begin_anew(news.upto);
                (self.heard, self.behind) = (heard, false);
            }
            Ok((news, all)) => {
                self.news = Some((Arc::new(news), 0));
                (self.heard, self.behind) = (heard, !all);
            }
            Err(error) => {
                tracing::warn!(%error, "can't read the events that a listener has missed; trying again");
                sleep(RETRY).await;
            }
        }
    }

    fn begin_anew(&mut self, at: Position) {
        self.at = at;
        let data = r#"{"detail":"events were deleted that this client has not seen: read the lists anew, this stream goes on from here"}"#;
        self.pending.push_back(Event::default().event("reset").id(at.to_string()).data(data));
    }

    /// Has the id too: a client that wants few of the events comes back from where it has heard everything.
    fn heartbeat(&self) -> Event {
        let comment = match self.api.feed.held_back() {
            Some(age) => format!("events of the last {} s are held back by an open transaction", age.as_secs()),
            None => "nothing new".to_owned(),
        };
        Event::default().comment(comment).id(self.at.to_string())
    }
}
