//! Natural batching: while a statement is in flight, what is asked for gathers, and the next statement takes all of it. There is no
//! timer: who comes when nothing is in flight is sent at once.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

/// What was asked for and is not yet sent.
pub(super) struct Gather<T, A> {
    queue: Mutex<VecDeque<Asked<T, A>>>,
    more: Notify,
    room: usize,
}

/// What somebody asked for, and where the answer goes.
pub(super) struct Asked<T, A> {
    pub(super) item: T,
    /// Nobody may be there any more to take it: that undoes nothing.
    pub(super) answer: oneshot::Sender<A>,
}

impl<T, A> Asked<T, A> {
    pub(super) fn answer(self, answer: A) {
        let _ = self.answer.send(answer);
    }
}

/// Nothing was sent.
#[derive(Debug)]
pub(super) enum Unasked {
    /// As much as there is room for waits already.
    Full,
    /// Nobody sends anything any more.
    Gone,
}

impl<T, A> Gather<T, A> {
    /// Room for so many that wait.
    pub(super) fn new(room: usize) -> Self {
        Self { queue: Mutex::default(), more: Notify::new(), room }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Asked<T, A>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks, and waits for the answer. Whoever gives up waiting is answered all the same, unheard.
    pub(super) async fn ask(&self, item: T) -> Result<A, Unasked> {
        let (answer, answered) = oneshot::channel();
        {
            let mut queue = self.queue();
            if queue.len() >= self.room {
                return Err(Unasked::Full);
            }
            queue.push_back(Asked { item, answer });
        }
        self.more.notify_one();
        answered.await.map_err(|_| Unasked::Gone)
    }

    /// What waits, at most so much of it, in its order; waits until there is something.
    pub(super) async fn next(&self, limit: usize) -> Vec<Asked<T, A>> {
        loop {
            {
                let mut queue = self.queue();
                if !queue.is_empty() {
                    let some = queue.len().min(limit);
                    let batch = queue.drain(..some).collect();
                    if !queue.is_empty() {
                        self.more.notify_one();
                    }
                    return batch;
                }
            }
            self.more.notified().await;
        }
    }
}
