//! Many at once: repeated when the outcome of an enqueue is unknown, and taken apart when one workflow blocks the others.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;
use uuid::Uuid;

use super::control::{Cancelled, cancel_all};
use super::enqueue::{Depth, Enqueued, Request, enqueue_within, read};
use super::{Db, Error, LOCK_TIMEOUT, set_lock_timeout};
use crate::domain::WorkflowId;

/// How often an enqueue whose outcome is unknown is repeated.
const REPEATS: usize = 3;
/// Requests per statement.
const PIECE: usize = 500;
/// Runs that are cancelled by one statement.
const CANCELS: usize = 50;
/// How long is gone on with cancelling, however many of the runs are locked.
const LONGEST_CANCEL: Duration = Duration::from_secs(20);
/// How long many together wait for a lock that somebody else has: one workflow must not hold up the others.
const SHORT: &str = "100ms";
/// The same in the parts of what had to wait before: somebody is known to be there.
const SHORTER: &str = "10ms";

/// What became of each request, in their order. An error is that of the statement it was in: where its outcome is unknown, the
/// run may be there all the same.
pub async fn enqueue_all(db: &Db, requests: &[Request]) -> Vec<Result<Enqueued, Arc<Error>>> {
    let requests: Vec<&Request> = requests.iter().collect();
    let patience = if requests.len() > 1 { SHORT } else { LOCK_TIMEOUT };
    let answers = enqueue_to(db, &requests, Look { patience, depth: Depth::Closely }, false).await;
    answers.into_iter().map(|answer| answer.map(decided)).collect()
}

/// The same for one; `repeated` says that it was sent before, with an outcome that may be unknown.
pub(super) async fn enqueue_one(db: &Db, request: &Request, repeated: bool) -> Result<Enqueued, Arc<Error>> {
    let look = Look { patience: LOCK_TIMEOUT, depth: Depth::Closely };
    enqueue_to(db, &[request], look, repeated).await.pop().unwrap_or(Ok(None)).map(decided)
}

fn decided(answer: Option<Enqueued>) -> Enqueued {
    answer.unwrap_or(Enqueued::Contended)
}

/// As [`enqueue_all`], looking at them as `look` says; `None` for what takes a closer look.
pub(super) async fn enqueue_to(
    db: &Db,
    requests: &[&Request],
    look: Look<'_>,
    repeated: bool,
) -> Vec<Result<Option<Enqueued>, Arc<Error>>> {
    let mut answers = Answers { requests, given: requests.iter().map(|_| None).collect() };
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&index| (&requests[index].workflow_id, index));
    // What was sent before as a part of something larger may be there: it is sent again as what it is.
    let mut pieces: Vec<(Vec<usize>, bool)> =
        order.chunks(PIECE).rev().map(|piece| (piece.to_vec(), repeated)).collect();
    let mut blocked: HashSet<&WorkflowId> = HashSet::new();
    let mut gone: Option<Arc<Error>> = None;
    while let Some((piece, repeated)) = pieces.pop() {
        let first = &requests[piece[0]].workflow_id;
        if let Some(error) = &gone {
            answers.fail(&piece, repeated, error);
            continue;
        }
        let together: Vec<&Request> = piece.iter().map(|&index| requests[index]).collect();
        let busy = blocked.contains(first) && requests[piece[piece.len() - 1]].workflow_id == *first;
        let sent = match busy {
            true => Err(Error::Busy(sqlx::Error::Protocol("the slot is locked".into()))),
            false if repeated && piece.len() > 1 => {
                surely(db, &together, Look { patience: SHORTER, ..look }, true).await
            }
            false => surely(db, &together, look, repeated).await,
        };
        match sent {
            Ok(found) => answers.give(&piece, found),
            Err(Error::Busy(error)) => match halves(requests, &piece) {
                Some((front, back)) => pieces.extend([(back, true), (front, true)]),
                None => {
                    blocked.insert(first);
                    answers.look_up(db, &piece, repeated, Error::Busy(error)).await;
                }
            },
            // One that the database refuses must not keep the others.
            Err(Error::Refused(error)) if piece.len() > 1 => {
                tracing::warn!(%error, "a batch was refused; taking it apart");
                let (front, back) = piece.split_at(piece.len() / 2);
                pieces.extend([(back.to_vec(), true), (front.to_vec(), true)]);
            }
            Err(error @ Error::Refused(_)) => answers.look_up(db, &piece, repeated, error).await,
            Err(error) => {
                let error = Arc::new(error);
                answers.fail(&piece, repeated, &error);
                // What comes after would only wait in vain.
                gone = error.is_passing().then_some(error);
            }
        }
    }
    answers.given.into_iter().map(|answer| answer.unwrap_or(Ok(Some(Enqueued::Contended)))).collect()
}

/// Answers to requests, as they come.
struct Answers<'a> {
    requests: &'a [&'a Request],
    given: Vec<Option<Result<Option<Enqueued>, Arc<Error>>>>,
}

impl Answers<'_> {
    fn give(&mut self, piece: &[usize], found: Vec<Option<Enqueued>>) {
        piece.iter().zip(found).for_each(|(&index, found)| self.given[index] = Some(Ok(found)));
    }

    /// For what could not be sent, or got no answer. What was sent before, as a part of something larger, may be there.
    fn fail(&mut self, piece: &[usize], repeated: bool, error: &Arc<Error>) {
        let known = !repeated || error.outcome_unknown();
        let error = if known { error.clone() } else { Arc::new(Error::TimedOut) };
        piece.iter().for_each(|&index| self.given[index] = Some(Err(error.clone())));
    }

    /// For what was not carried out whole, and is not under way any more: what is there was accepted, `error` is the answer to
    /// the others.
    async fn look_up(&mut self, db: &Db, piece: &[usize], repeated: bool, error: Error) {
        let ids: Vec<Uuid> = piece.iter().map(|&index| self.requests[index].id).collect();
        let there = match piece {
            // Alone, and for the first time, it was one statement, which did nothing.
            [_] if !repeated => Ok(Default::default()),
            _ => db.with(async |connection| read(connection, &ids).await).await,
        };
        let error = Arc::new(match &there {
            Ok(_) => error,
            Err(_) => Error::TimedOut,
        });
        let there = there.unwrap_or_default();
        for (&index, id) in piece.iter().zip(&ids) {
            let run = there.get(id).cloned();
            self.given[index] = Some(run.map(|run| Some(Enqueued::Accepted(run))).ok_or_else(|| error.clone()));
        }
    }
}

/// A piece in two, with what is for one workflow in one of them; `None` where all of it is.
fn halves(requests: &[&Request], piece: &[usize]) -> Option<(Vec<usize>, Vec<usize>)> {
    let middle = &requests[piece[piece.len() / 2]].workflow_id;
    let starts = |workflow: &WorkflowId| piece.partition_point(|&index| requests[index].workflow_id < *workflow);
    let at = match starts(middle) {
        0 => piece.partition_point(|&index| requests[index].workflow_id <= *middle),
        at => at,
    };
    (at < piece.len()).then(|| (piece[..at].to_vec(), piece[at..].to_vec()))
}

/// How requests are looked at.
#[derive(Clone, Copy)]
pub(super) struct Look<'a> {
    /// How long is waited for each lock.
    pub(super) patience: &'a str,
    pub(super) depth: Depth,
}

/// When a statement's outcome is unknown, the same insert is repeated on another connection: it finds the run under its
/// id, or waits on the primary key for the lost statement, or takes the slot. Looking for the id alone would prove
/// nothing, for the lost statement may still commit.
async fn surely(
    db: &Db,
    requests: &[&Request],
    Look { patience, depth }: Look<'_>,
    repeated: bool,
) -> Result<Vec<Option<Enqueued>>, Error> {
    let send = async |repeated| {
        db.with(async |connection| enqueue_within(connection, requests, repeated, patience, depth).await).await
    };
    let mut answer = send(repeated).await;
    for _ in 0..REPEATS {
        match answer {
            // Nothing changes what is unknown already, so a failure to connect leaves it unknown.
            Err(lost) if lost.outcome_unknown() => {
                sleep(Duration::from_millis(200)).await;
                answer = match send(true).await {
                    Err(error) if error.is_passing() => Err(lost),
                    repeated => repeated,
                };
            }
            _ => break,
        }
    }
    answer
}

/// Cancels runs in the name of `actor`. Where somebody has one of them locked, the others are cancelled all the same; `None` is for
/// what could not be, now, and for all that comes after the database went away, or after 20 seconds.
///
/// # Errors
/// Where nothing is done.
pub async fn cancel_apart(db: &Db, run_ids: &[Uuid], actor: &str) -> Result<Vec<Option<Cancelled>>, Error> {
    let mut answers: Vec<Option<Cancelled>> = Vec::with_capacity(run_ids.len());
    // Short ones: they hold what they lock until they end, and others lock in another order.
    let mut pieces: Vec<&[Uuid]> = run_ids.chunks(CANCELS).rev().collect();
    let since = Instant::now();
    while let Some(piece) = pieces.pop().filter(|_| since.elapsed() < LONGEST_CANCEL) {
        let cancelled = db.with(async |connection| {
            set_lock_timeout(connection, SHORT).await?;
            let cancelled = cancel_all(connection, piece, actor).await;
            set_lock_timeout(connection, LOCK_TIMEOUT).await?;
            cancelled
        });
        match cancelled.await {
            Ok(cancelled) => answers.extend(cancelled.into_iter().map(Some)),
            Err(Error::Busy(_)) if piece.len() == 1 => answers.push(None),
            Err(Error::Busy(_)) => pieces.extend(piece.chunks(1).rev()),
            Err(error) if answers.iter().all(Option::is_none) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "can't cancel the rest");
                break;
            }
        }
    }
    answers.resize(run_ids.len(), None);
    Ok(answers)
}
