//! Many at once: repeated when the outcome of an enqueue is unknown, and taken apart when one workflow blocks the others.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::time::sleep;

use super::enqueue::{Enqueued, Request, enqueue};
use super::settle::{Settled, settle};
use super::{Db, Error, LOCK_TIMEOUT};
use crate::domain::{Lease, Outcome, WorkflowId};

/// How often an enqueue whose outcome is unknown is repeated.
const REPEATS: usize = 3;
/// Requests per statement.
const PIECE: usize = 500;
/// How long many together wait for a lock that somebody else has: one workflow must not hold up the others.
const SHORT: &str = "100ms";

/// What became of each request, in their order. An error is that of the statement it was in: where its outcome is unknown, the
/// run may be there all the same.
pub async fn enqueue_all(db: &Db, requests: &[Request]) -> Vec<Result<Enqueued, Arc<Error>>> {
    if let [request] = requests {
        return vec![surely(db, &[request], None).await.map(one).map_err(Arc::new)];
    }
    let mut answers: Vec<Option<Result<Enqueued, Arc<Error>>>> = requests.iter().map(|_| None).collect();
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&index| (&requests[index].workflow_id, index));
    let mut pieces: Vec<Vec<usize>> = order.chunks(PIECE).rev().map(<[usize]>::to_vec).collect();
    let mut blocked: HashSet<&WorkflowId> = HashSet::new();
    let mut gone: Option<Arc<Error>> = None;
    while let Some(mut piece) = pieces.pop() {
        if let Some(error) = &gone {
            piece.iter().for_each(|&index| answers[index] = Some(Err(error.clone())));
            continue;
        }
        piece.retain(|&index| answers[index].is_none() && !blocked.contains(&requests[index].workflow_id));
        let Some(&first) = piece.first() else { continue };
        let together: Vec<&Request> = piece.iter().map(|&index| &requests[index]).collect();
        match surely(db, &together, Some(SHORT)).await {
            Ok(found) => piece.iter().zip(found).for_each(|(&index, found)| answers[index] = Some(Ok(found))),
            Err(Error::Busy(error)) => {
                let workflow = &requests[first].workflow_id;
                match halves(requests, &piece) {
                    Some((front, back)) => pieces.extend([back, front]),
                    None => {
                        blocked.insert(workflow);
                        let error = Arc::new(Error::Busy(error));
                        let all = order.iter().filter(|&&index| requests[index].workflow_id == *workflow);
                        all.filter(|&&index| answers[index].is_none())
                            .copied()
                            .collect::<Vec<_>>()
                            .into_iter()
                            .for_each(|index| answers[index] = Some(Err(error.clone())));
                    }
                }
            }
            Err(error) => {
                let error = Arc::new(error);
                piece.iter().for_each(|&index| answers[index] = Some(Err(error.clone())));
                // What comes after would only wait in vain.
                gone = error.is_passing().then_some(error);
            }
        }
    }
    answers.into_iter().map(|answer| answer.unwrap_or(Ok(Enqueued::Contended))).collect()
}

fn one(mut answers: Vec<Enqueued>) -> Enqueued {
    answers.pop().unwrap_or(Enqueued::Contended)
}

/// A piece in two, with what is for one workflow in one of them; `None` where all of it is.
fn halves(requests: &[Request], piece: &[usize]) -> Option<(Vec<usize>, Vec<usize>)> {
    let middle = &requests[piece[piece.len() / 2]].workflow_id;
    let starts = |workflow: &WorkflowId| piece.partition_point(|&index| requests[index].workflow_id < *workflow);
    let at = match starts(middle) {
        0 => piece.partition_point(|&index| requests[index].workflow_id <= *middle),
        at => at,
    };
    (at < piece.len()).then(|| (piece[..at].to_vec(), piece[at..].to_vec()))
}

/// When a statement's outcome is unknown, the same insert is repeated on another connection: it finds the run under its
/// id, or waits on the primary key for the lost statement, or takes the slot. Looking for the id alone would prove
/// nothing, for the lost statement may still commit.
async fn surely(db: &Db, requests: &[&Request], lock_timeout: Option<&str>) -> Result<Vec<Enqueued>, Error> {
    let mut answer = db.with(async |connection| within(connection, requests, false, lock_timeout).await).await;
    for _ in 0..REPEATS {
        match answer {
            // Nothing changes what is unknown already, so a failure to connect leaves it unknown.
            Err(lost) if lost.outcome_unknown() => {
                sleep(Duration::from_millis(200)).await;
                let repeat = db.with(async |connection| within(connection, requests, true, lock_timeout).await);
                answer = match repeat.await {
                    Err(error) if error.is_passing() => Err(lost),
                    repeated => repeated,
                };
            }
            _ => break,
        }
    }
    answer
}

/// Enqueues, waiting no longer than `lock_timeout` for each lock, where one is given.
async fn within(
    connection: &mut PgConnection,
    requests: &[&Request],
    repeated: bool,
    lock_timeout: Option<&str>,
) -> sqlx::Result<Vec<Enqueued>> {
    let Some(short) = lock_timeout else { return enqueue(connection, requests, repeated).await };
    set_lock_timeout(connection, short).await?;
    let answers = enqueue(connection, requests, repeated).await;
    set_lock_timeout(connection, LOCK_TIMEOUT).await?;
    answers
}

/// Settles attempts, as [`settle`] does. Where somebody has one of their runs locked, perhaps by an `enqueue_run` that is about to wait
/// for it, the others are settled all the same, and that one is `None`: nothing was changed, and it is to be tried again.
///
/// # Errors
/// Where nothing is settled.
pub async fn settle_all(db: &Db, outcomes: &[(Lease, Outcome)]) -> Result<Vec<Option<Settled>>, Error> {
    let busy = match db.with(async |connection| settle(connection, outcomes, None).await).await {
        Err(Error::Busy(busy)) if outcomes.len() > 1 => busy,
        settled => return Ok(settled?.into_iter().map(Some).collect()),
    };
    let mut answers = Vec::with_capacity(outcomes.len());
    for outcome in outcomes {
        let one = std::slice::from_ref(outcome);
        let alone = db.with(async |connection| {
            set_lock_timeout(connection, SHORT).await?;
            let settled = settle(connection, one, None).await;
            set_lock_timeout(connection, LOCK_TIMEOUT).await?;
            settled
        });
        match alone.await {
            Ok(settled) => answers.extend(settled.into_iter().map(Some)),
            Err(Error::Busy(_)) => answers.push(None),
            Err(error) => return Err(error),
        }
    }
    if answers.iter().all(Option::is_none) { Err(Error::Busy(busy)) } else { Ok(answers) }
}

async fn set_lock_timeout(connection: &mut PgConnection, timeout: &str) -> sqlx::Result<()> {
    sqlx::query!("select set_config('lock_timeout', $1, false)", timeout).fetch_one(connection).await?;
    Ok(())
}
