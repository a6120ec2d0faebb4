//! Requests for runs, gathered from whoever has one: one statement takes all that came while the one before was under way.
//!
//! Gathered is what one statement can decide. What takes a closer look, and what is for a workflow that somebody keeps locked, goes its
//! own way, so that it delays no other. Workflows that run often gather by themselves, for the same reason: an old snapshot makes them slow.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

use super::batch::{Look, enqueue_all, enqueue_one, enqueue_to};
use super::enqueue::{Depth, Enqueued, Request};
use super::frequent::Frequent;
use super::gather::{Asked, Flight, Flying, Gather};
use super::{Db, Error};
use crate::domain::{OnConflict, WorkflowId};
use crate::metrics::METRICS;

/// Requests that may wait to be sent, and those for workflows that run often.
const ROOM: usize = 10_000;
/// Requests that are taken together.
const PIECE: usize = 500;
/// How long many together wait for a lock that somebody else has.
const PATIENCE: &str = "50ms";
/// How long requests for a workflow that was found locked go their own way.
const BLOCKED: Duration = Duration::from_secs(30);
/// Requests for locked workflows that wait on a connection at once, and how long others wait for their place.
const WAIT_FOR_LOCKS: usize = 3;
const PLACE: Duration = Duration::from_secs(2);
/// So many who ask for one taken slot together are a storm, and are told a moment later, and a longer one while others are served too: they
/// would take the machine from those whose slots are free.
const STORM: usize = 32;
const MOMENT: Duration = Duration::from_millis(4);
const LONGER: Duration = Duration::from_millis(100);
/// A storm, and whoever asked for another slot, is taken to be there still for so long.
const LATELY: Duration = Duration::from_millis(250);

type Answer = Result<Enqueued, Arc<Error>>;
/// Or it takes a closer look, or waiting; and whether it was sent, perhaps with an unknown outcome.
type Found = Result<Answer, bool>;

/// What somebody is told, and how much later.
type Told = (Duration, Found);
type Requests = Gather<Arc<Request>, Told>;
/// Those who ask for one slot, in their order.
type Asking = VecDeque<Asked<Arc<Request>, Told>>;

/// A request that has to go its own way.
pub struct Apart {
    request: Arc<Request>,
    /// It may have been carried out, or may be yet: then the run that it has made is the answer.
    repeated: bool,
}

/// Enqueues runs.
#[derive(Clone)]
pub struct Enqueuer(Arc<Inner>);

struct Inner {
    db: Db,
    flights: Db,
    requests: Arc<Requests>,
    /// Those for workflows that run often.
    frequent_requests: Arc<Requests>,
    frequent: Mutex<Frequent>,
    weather: Mutex<Weather>,
    /// Workflows that were found locked, and until when they are taken to be.
    blocked: Mutex<HashMap<WorkflowId, Instant>>,
    waiting: Semaphore,
}

impl Enqueuer {
    /// One that sends by `flights`, while [`Enqueuer::run`] runs, and what goes its own way by `db`.
    pub fn new(db: Db, flights: Db) -> Self {
        Self(Arc::new(Inner {
            db,
            flights,
            requests: Arc::new(Gather::new(ROOM)),
            frequent_requests: Arc::new(Gather::new(ROOM)),
            frequent: Mutex::default(),
            weather: Mutex::default(),
            blocked: Mutex::default(),
            waiting: Semaphore::new(WAIT_FOR_LOCKS),
        }))
    }

    /// Enqueues a run, as [`enqueue_all`] does.
    ///
    /// Whoever drops the future does not know what became of the request, and where it has to go its own way, costs a connection:
    /// spawn it where that happens often.
    ///
    /// # Errors
    /// Those of the statement that it was in; [`Error::Full`] when too many wait, or it could not be sent for five seconds.
    pub async fn enqueue(&self, request: Request) -> Answer {
        match self.together(Arc::new(request)).await {
            Ok(answer) => answer,
            Err(apart) => self.apart(apart).await,
        }
    }

    /// Enqueues it together with others, unless it has to go its own way. May be dropped: what was sent is followed to its end.
    pub async fn together(&self, request: Arc<Request>) -> Result<Answer, Apart> {
        let simple = matches!(request.on_conflict, None | Some(OnConflict::Reject | OnConflict::ReturnExisting));
        if !simple || !request.is_plain() || self.is_blocked(&request.workflow_id) {
            return Err(Apart { request, repeated: false });
        }
        let frequent = lock(&self.0.frequent).has(&request.workflow_id);
        let requests = if frequent { &self.0.frequent_requests } else { &self.0.requests };
        match requests.ask(request.clone()).await {
            Ok((later, found)) => {
                if !later.is_zero() {
                    sleep(later).await;
                }
                found.map_err(|repeated| Apart { request, repeated })
            }
            Err(unasked) => Ok(Err(unasked.into())),
        }
    }

    /// Enqueues it by itself.
    pub async fn apart(&self, Apart { request, repeated }: Apart) -> Answer {
        let workflow_id = &request.workflow_id;
        // Not every connection is to wait for the lock of one workflow.
        let _place = match self.is_blocked(workflow_id) {
            true => match timeout(PLACE, self.0.waiting.acquire()).await {
                Ok(place) => place.ok(),
                Err(_) if repeated => return Err(Arc::new(Error::TimedOut)),
                Err(_) => return Err(Arc::new(busy())),
            },
            false => None,
        };
        let answer = enqueue_one(&self.0.db, &request, repeated).await;
        match &answer {
            Err(error) if matches!(**error, Error::Busy(_)) => self.block(workflow_id),
            // Only who wrote knows that the lock is gone.
            Ok(Enqueued::Accepted(_)) => {
                lock(&self.0.blocked).remove(workflow_id);
                lock(&self.0.frequent).ran(workflow_id);
            }
            _ => {}
        }
        answer
    }

    /// Enqueues many.
    pub async fn enqueue_all(&self, requests: &[Request]) -> Vec<Answer> {
        enqueue_all(&self.0.flights, requests).await
    }

    /// Sends what is asked for, for ever: one batch after the other, and beside them those of workflows that run often. One task for each
    /// [`Flight`].
    pub fn run(self, flight: Flight) -> impl Future<Output = ()> {
        let flying = [&self.0.requests, &self.0.frequent_requests].map(|requests| requests.flying(flight));
        async move {
            let [requests, frequent_requests] = flying;
            tokio::join!(self.fly(requests), self.fly(frequent_requests));
        }
    }

    async fn fly(&self, requests: Flying<Arc<Request>, Told>) {
        loop {
            let mut open: BTreeMap<WorkflowId, Asking> = BTreeMap::new();
            for asked in requests.next(PIECE).await {
                open.entry(asked.item.workflow_id.clone()).or_default().push_back(asked);
            }
            lock(&self.0.weather).look(open.keys());
            while !open.is_empty() {
                self.send(&mut open).await;
            }
        }
    }

    /// One statement over the first request of each workflow. What that one is told without having changed anything is the answer to all
    /// who ask the same: they asked before the statement began.
    async fn send(&self, open: &mut BTreeMap<WorkflowId, Asking>) {
        let first: Vec<Asked<_, _>> = open.values_mut().filter_map(VecDeque::pop_front).collect();
        METRICS.batch_size.with_label_values(&["enqueues"]).observe(first.len() as f64);
        let requests: Vec<&Request> = first.iter().map(|asked: &Asked<Arc<Request>, _>| &*asked.item).collect();
        let answers =
            enqueue_to(&self.0.flights, &requests, Look { patience: PATIENCE, depth: Depth::AtOnce }, false).await;
        for (asked, answer) in first.into_iter().zip(answers) {
            let Request { workflow_id, on_conflict, .. } = &*asked.item;
            let found = match answer {
                // Nothing was done.
                Err(error) if matches!(*error, Error::Busy(_)) => {
                    self.block(workflow_id);
                    Err(false)
                }
                Ok(None) => Err(true),
                Ok(Some(enqueued)) => Ok(Ok(enqueued)),
                Err(error) => Ok(Err(error)),
            };
            let alone = matches!(&found, Ok(Ok(Enqueued::Accepted(_))));
            if alone {
                lock(&self.0.frequent).ran(workflow_id);
            }
            let mut later = Duration::ZERO;
            if let Some(others) = open.get_mut(workflow_id) {
                // They were not sent.
                let shared = match &found {
                    Err(_) => Err(false),
                    Ok(Err(error)) if error.outcome_unknown() => Ok(Err(Arc::new(Error::Full))),
                    Ok(answer) => Ok(answer.clone()),
                };
                let all = !matches!(&found, Ok(Ok(_)));
                // What is wrong with one request is not the others' fault.
                let alone = alone || matches!(&found, Ok(Err(error)) if !error.is_passing());
                let alike = |other: &Asked<Arc<Request>, _>| !alone && (all || other.item.on_conflict == *on_conflict);
                let (told, left): (VecDeque<_>, VecDeque<_>) = std::mem::take(others).into_iter().partition(alike);
                *others = left;
                if !alone {
                    later = lock(&self.0.weather).later(workflow_id, told.len());
                }
                told.into_iter().for_each(|other| other.answer((later, shared.clone())));
            }
            asked.answer((later, found));
        }
        open.retain(|_, others| !others.is_empty());
    }

    fn is_blocked(&self, workflow_id: &WorkflowId) -> bool {
        let mut blocked = lock(&self.0.blocked);
        let until = blocked.get(workflow_id).copied();
        if until.is_some_and(|until| until <= Instant::now()) {
            blocked.remove(workflow_id);
            return false;
        }
        until.is_some()
    }

    fn block(&self, workflow_id: &WorkflowId) {
        let now = Instant::now();
        let mut blocked = lock(&self.0.blocked);
        blocked.retain(|_, until| *until > now);
        blocked.insert(workflow_id.clone(), now + BLOCKED);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether there is a storm.
#[derive(Default)]
struct Weather {
    /// The slot that so many asked for together, and when they last did.
    storm: Option<(WorkflowId, Instant)>,
    /// When somebody asked for another.
    others: Option<Instant>,
}

impl Weather {
    /// Takes note of the slots that are asked for together.
    fn look<'a>(&mut self, mut slots: impl ExactSizeIterator<Item = &'a WorkflowId>) {
        let others = match &self.storm {
            Some((storm, at)) if at.elapsed() < LATELY => slots.any(|slot| slot != storm),
            _ => slots.len() > 1,
        };
        if others {
            self.others = Some(Instant::now());
        }
    }

    /// How much later those are told who asked for this slot, beside the first `others` of them.
    fn later(&mut self, workflow_id: &WorkflowId, others: usize) -> Duration {
        if others >= STORM {
            self.storm = Some((workflow_id.clone(), Instant::now()));
        }
        let is_storm = self.storm.as_ref().is_some_and(|(slot, at)| slot == workflow_id && at.elapsed() < LATELY);
        match is_storm {
            true if self.others.is_some_and(|at| at.elapsed() < LATELY) => LONGER,
            true => MOMENT,
            false => Duration::ZERO,
        }
    }
}

fn busy() -> Error {
    Error::Busy(sqlx::Error::Protocol("somebody has the slot of this workflow locked".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_told_later_and_later_still_beside_others() {
        let [busy, other]: [WorkflowId; 2] = ["busy", "other"].map(|id| id.parse().expect("an id"));
        let mut weather = Weather::default();
        assert_eq!(weather.later(&busy, STORM - 1), Duration::ZERO);
        assert_eq!(weather.later(&busy, STORM), MOMENT);
        assert_eq!(weather.later(&busy, 0), MOMENT, "who asks again alone is a part of it");
        assert_eq!(weather.later(&other, 0), Duration::ZERO);
        weather.look([&busy].into_iter());
        assert_eq!(weather.later(&busy, 0), MOMENT);
        weather.look([&other].into_iter());
        assert_eq!(weather.later(&busy, 0), LONGER);
        weather.storm = Instant::now().checked_sub(LATELY).map(|at| (busy.clone(), at));
        assert_eq!(weather.later(&busy, 0), Duration::ZERO, "it is over");
        weather.others = None;
        weather.look([&other].into_iter());
        assert_eq!(weather.later(&other, STORM), MOMENT, "there is nobody else");
    }
}
