//! Natural batching: while a statement is in flight, what is asked for gathers, and the next statement takes all of it. There is no
//! timer: who comes when nothing is in flight is sent at once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgConnection;
use tokio::sync::{Notify, oneshot};
use tokio::time::{timeout, timeout_at};

use super::{Db, Error};
use crate::metrics::METRICS;

/// So many that wait are worth a second statement beside the first: each costs as much by itself as a dozen that it takes. With 16, 32
/// clients in a closed loop get a quarter less.
const MANY: usize = 64;
/// When the first has been under way for so long, what waits is worth one too.
const HELD_UP: Duration = Duration::from_millis(20);
/// Who has not been sent by then is told so: with a database that does not answer it could be minutes.
const LONGEST: Duration = Duration::from_secs(5);

/// What was asked for and is not yet sent.
pub(super) struct Gather<T, A> {
    waiting: Mutex<Waiting<T, A>>,
    some: Notify,
    many: Notify,
    room: usize,
    longest: Duration,
}

struct Waiting<T, A> {
    /// In the order of their numbers.
    queue: VecDeque<Asked<T, A>>,
    /// What was asked for so far.
    asked: u64,
    /// How many flights there are, once there was one.
    flying: Option<usize>,
    /// Since when the first statement is under way.
    sent: Option<Instant>,
}

/// What somebody asked for, and where the answer goes.
pub(super) struct Asked<T, A> {
    pub(super) item: T,
    number: u64,
    /// Nobody may be there any more to take it: that undoes nothing.
    answer: oneshot::Sender<Result<A, Unasked>>,
}

impl<T, A> Asked<T, A> {
    pub(super) fn answer(self, answer: A) {
        let _ = self.answer.send(Ok(answer));
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Unasked {
    /// As much as there is room for waits already, or it has waited for too long: it was not sent.
    Full,
    /// Nobody sends anything any more: it was not sent.
    Ended,
    /// Whoever had it is gone, and may have sent it.
    Lost,
}

impl From<Unasked> for Arc<Error> {
    fn from(unasked: Unasked) -> Self {
        Self::new(match unasked {
            Unasked::Full => Error::Full,
            Unasked::Ended => Error::Ended,
            Unasked::Lost => Error::TimedOut,
        })
    }
}

/// Which of the statements under way at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flight {
    /// Takes whatever waits.
    First,
    /// Helps out.
    Second,
}

impl Flight {
    /// All of them: more would only make smaller statements.
    pub const ALL: [Self; 2] = [Self::First, Self::Second];
}

impl<T, A> Gather<T, A> {
    /// Room for so many that wait.
    pub(super) fn new(room: usize) -> Self {
        let waiting = Waiting { queue: VecDeque::new(), asked: 0, flying: None, sent: None };
        Self { waiting: Mutex::new(waiting), some: Notify::new(), many: Notify::new(), room, longest: LONGEST }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting<T, A>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks, and waits for the answer. Whoever gives up waiting is answered all the same, unheard.
    pub(super) async fn ask(&self, item: T) -> Result<A, Unasked> {
        let (answer, mut answered) = oneshot::channel();
        let number = {
            let mut waiting = self.waiting();
            if waiting.flying == Some(0) {
                return Err(Unasked::Ended);
            }
            if waiting.queue.len() >= self.room {
                return Err(Unasked::Full);
            }
            waiting.asked += 1;
            let number = waiting.asked;
            waiting.queue.push_back(Asked { item, number, answer });
            self.some.notify_one();
            // The first that waits may wait for long, and then it is the second flight's.
            if waiting.is_for_two() || waiting.sent.is_some() && waiting.queue.len() == 1 {
                self.many.notify_one();
            }
            number
        };
        let told = match timeout(self.longest, &mut answered).await {
            Ok(told) => told,
            Err(_) if self.waiting().withdraw(number) => return Err(Unasked::Full),
            // It is under way.
            Err(_) => answered.await,
        };
        told.unwrap_or(Err(Unasked::Lost))
    }

    /// A flight, which sends what is asked for.
    pub(super) fn flying(self: &Arc<Self>, flight: Flight) -> Flying<T, A> {
        *self.waiting().flying.get_or_insert(0) += 1;
        Flying { gather: self.clone(), flight }
    }
}

/// A flight that is there. With the last one, be it by a panic or because its runtime has ended, all ends for those who wait, and for whoever
/// comes.
pub(super) struct Flying<T, A> {
    gather: Arc<Gather<T, A>>,
    flight: Flight,
}

impl<T, A> Drop for Flying<T, A> {
    fn drop(&mut self) {
        let mut waiting = self.gather.waiting();
        let left = waiting.flying.map_or(0, |flying| flying - 1);
        waiting.flying = Some(left);
        if left == 0 {
            waiting.queue.drain(..).for_each(|asked| drop(asked.answer.send(Err(Unasked::Ended))));
        }
    }
}

impl<T, A> Flying<T, A> {
    /// What waits, at most so much of it, in its order; waits until there is something for this flight.
    pub(super) async fn next(&self, limit: usize) -> Vec<Asked<T, A>> {
        let Self { gather, flight } = self;
        if *flight == Flight::First {
            gather.waiting().sent = None;
        }
        loop {
            let held_up_at = {
                let mut waiting = gather.waiting();
                let some = waiting.queue.len().min(limit);
                if some > 0 && (*flight == Flight::First || waiting.is_for_two()) {
                    if *flight == Flight::First {
                        waiting.sent = Some(Instant::now());
                    }
                    let taken = waiting.queue.drain(..some).collect();
                    if !waiting.queue.is_empty() {
                        gather.many.notify_one();
                    }
                    return taken;
                }
                waiting.sent.filter(|_| some > 0).map(|sent| sent + HELD_UP)
            };
            match (flight, held_up_at) {
                (Flight::First, _) => gather.some.notified().await,
                (Flight::Second, None) => gather.many.notified().await,
                (Flight::Second, Some(at)) => drop(timeout_at(at.into(), gather.many.notified()).await),
            }
        }
    }
}

impl<T: Clone, A> Flying<T, Result<A, Arc<Error>>> {
    /// Sends what is asked for by `send`, which answers in the same order, for ever; `kind` is what is counted: one statement after the other, of at most `limit` each.
    pub(super) async fn fly(
        &self,
        db: &Db,
        kind: &'static str,
        limit: usize,
        send: impl AsyncFn(&mut PgConnection, &[T]) -> sqlx::Result<Vec<A>>,
    ) {
        loop {
            let mut pieces = vec![self.next(limit).await];
            while let Some(piece) = pieces.pop() {
                METRICS.batch_size.with_label_values(&[kind]).observe(piece.len() as f64);
                let items: Vec<T> = piece.iter().map(|asked| asked.item.clone()).collect();
                let sent = db.with(async |connection| {
                    let answers = send(connection, &items).await?;
                    // Or somebody would be given another's answer.
                    let wrong = format!("{} answers to {} entries", answers.len(), items.len());
                    if answers.len() == items.len() { Ok(answers) } else { Err(sqlx::Error::Protocol(wrong)) }
                });
                match sent.await {
                    Ok(answers) => piece.into_iter().zip(answers).for_each(|(asked, answer)| asked.answer(Ok(answer))),
                    // One that the database refuses, or that waits for somebody, must not keep the others.
                    Err(error @ (Error::Refused(_) | Error::Busy(_))) if piece.len() > 1 => {
                        tracing::warn!(%error, "what was sent together was refused; taking it apart");
                        let mut front = piece;
                        let back = front.split_off(front.len() / 2);
                        pieces.extend([back, front]);
                    }
                    Err(error) => {
                        let error = Arc::new(error);
                        piece.into_iter().for_each(|asked| asked.answer(Err(error.clone())));
                    }
                }
            }
        }
    }
}

impl<T, A> Waiting<T, A> {
    fn is_for_two(&self) -> bool {
        self.sent.is_some_and(|sent| self.queue.len() >= MANY || sent.elapsed() >= HELD_UP)
    }

    /// Takes back what waits under this number; whether it still does.
    fn withdraw(&mut self, number: u64) -> bool {
        let at = self.queue.binary_search_by_key(&number, |asked| asked.number);
        at.is_ok_and(|at| self.queue.remove(at).is_some())
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;

    /// Asks, and waits until that can be seen.
    async fn ask(
        gather: &Arc<Gather<usize, usize>>,
        asking: &mut JoinSet<Option<usize>>,
        items: std::ops::Range<usize>,
    ) {
        let before = gather.waiting().queue.len();
        for item in items.clone() {
            let gather = gather.clone();
            asking.spawn(async move { gather.ask(item).await.ok() });
        }
        while gather.waiting().queue.len() < before + items.len() {
            tokio::task::yield_now().await;
        }
    }

    fn items(batch: &[Asked<usize, usize>]) -> Vec<usize> {
        batch.iter().map(|asked| asked.item).collect()
    }

    #[tokio::test]
    async fn what_comes_meanwhile_is_taken_together_and_each_gets_its_own_answer() {
        let (gather, mut asking) = (Arc::new(Gather::new(100)), JoinSet::new());
        let flying = gather.flying(Flight::First);
        ask(&gather, &mut asking, 0..1).await;
        let first = flying.next(10).await;
        assert_eq!(items(&first), [0], "who comes when nothing is in flight does not wait");
        ask(&gather, &mut asking, 1..4).await;
        first.into_iter().for_each(|asked| asked.answer(100));
        let mut second = flying.next(2).await;
        assert_eq!(items(&second), [1, 2]);
        drop(second.pop());
        second.into_iter().for_each(|asked| asked.answer(101));
        assert_eq!(items(&flying.next(2).await), [3]);
        let mut answers = asking.join_all().await;
        answers.sort();
        assert_eq!(answers, [None, None, Some(100), Some(101)], "one that was dropped is told so");
    }

    #[tokio::test]
    async fn beyond_its_room_nothing_waits() {
        let (gather, mut asking) = (Arc::new(Gather::new(2)), JoinSet::new());
        ask(&gather, &mut asking, 0..2).await;
        assert!(matches!(gather.ask(2).await, Err(Unasked::Full)));
        gather.flying(Flight::First).next(1).await;
        assert!(matches!(gather.ask(3).await, Err(Unasked::Ended)), "that was the only flight");
    }

    #[tokio::test]
    async fn a_second_flight_helps_where_much_waits_or_the_first_is_held_up() {
        let (gather, mut asking) = (Arc::new(Gather::new(1000)), JoinSet::new());
        let [first, second] = Flight::ALL.map(|flight| gather.flying(flight));
        ask(&gather, &mut asking, 0..1).await;
        let nothing = Duration::from_millis(1);
        assert!(timeout(nothing, second.next(10)).await.is_err(), "that is the first one's");
        first.next(10).await;
        ask(&gather, &mut asking, 1..2).await;
        assert!(timeout(nothing, second.next(10)).await.is_err(), "the first is soon back");
        ask(&gather, &mut asking, 2..1 + MANY).await;
        assert_eq!(second.next(1000).await.len(), MANY);
        gather.waiting().sent = Instant::now().checked_sub(2 * HELD_UP);
        ask(&gather, &mut asking, 200..201).await;
        assert_eq!(items(&second.next(10).await), [200]);
    }

    #[tokio::test]
    async fn with_the_last_flight_all_ends_for_those_who_wait_and_whoever_comes() {
        let gather = Arc::new(Gather::<usize, usize>::new(10));
        let asked = [0, 1, 2].map(|item| {
            let gather = gather.clone();
            async move { gather.ask(item).await }
        });
        let [taken, first, second] = asked.map(tokio::spawn);
        let flights = Flight::ALL.map(|flight| gather.flying(flight));
        // One after the other, they have asked.
        while gather.waiting().queue.len() < 3 {
            tokio::task::yield_now().await;
        }
        let under_way = flights[0].next(1).await;
        let [one, other] = flights;
        drop(one);
        assert!(!first.is_finished() && !second.is_finished(), "there is another one");
        drop(other);
        for waiting in [first, second] {
            assert!(matches!(waiting.await.expect("no panic"), Err(Unasked::Ended)));
        }
        assert!(matches!(gather.ask(3).await, Err(Unasked::Ended)));
        drop(under_way);
        assert!(matches!(taken.await.expect("no panic"), Err(Unasked::Lost)), "it may have been sent");
    }

    #[tokio::test]
    async fn what_is_not_sent_in_time_is_taken_back_and_what_is_under_way_is_waited_for() {
        let gather = Arc::new(Gather { longest: Duration::from_millis(1), ..Gather::<usize, usize>::new(10) });
        let flying = gather.flying(Flight::First);
        let mut asking = JoinSet::new();
        ask(&gather, &mut asking, 0..1).await;
        let under_way = flying.next(10).await;
        assert!(matches!(gather.ask(1).await, Err(Unasked::Full)));
        assert!(gather.waiting().queue.is_empty(), "nobody will send it");
        under_way.into_iter().for_each(|asked| asked.answer(100));
        assert_eq!(asking.join_next().await.expect("one").expect("no panic"), Some(100));
    }
}
