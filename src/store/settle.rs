//! The one way out of `running`: worker and reaper alike bring an [`Outcome`] under a lease.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::domain::{Lease, Outcome, Status};
use crate::metrics::METRICS;

/// What became of an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The run is now this: final, or `queued` for its next attempt.
    Recorded(Status),
    /// The same end was settled under this very lease before: an answer was lost, and the repetition changed nothing. The
    /// run is this now.
    Already(Status),
    /// The lease is gone; nothing was changed. The run is this now, unless it does not exist.
    Lost(Option<Status>),
    /// Somebody has the run locked, perhaps an `enqueue_run` that is about to wait for it: nothing was changed, and it is to be tried
    /// again.
    Busy,
}

/// Settles attempts. The answers stand in the order of `outcomes`. It waits for nobody's lock.
///
/// What an end comes to is decided here, in the update itself, because a request to cancel may arrive until then; the
/// table is [`crate::domain::status::transition`]. Where another attempt is to follow, the run goes back to `queued` and
/// keeps its slot; the wait is that of its workflow's revision, or longer where the outcome says so, and a week at most.
/// `actor` is who does it, where that is neither the worker that claimed the run nor whom the outcome names.
pub async fn settle<'a>(
    connection: &mut PgConnection,
    outcomes: &[(Lease, Outcome)],
    actor: impl Into<Option<&'a str>>,
) -> sqlx::Result<Vec<Settled>> {
    let actor = actor.into();
    let (mut answers, unsure) = attempt(connection, outcomes, actor).await?;
    // A run that was changed while the statement began, perhaps by its own first record, is seen as it is now, and what is said of its
    // attempts as it was then. A new statement sees both.
    if !unsure.is_empty() {
        let again: Vec<_> = unsure.iter().map(|&index| outcomes[index].clone()).collect();
        for (index, answer) in unsure.into_iter().zip(attempt(connection, &again, actor).await?.0) {
            answers[index] = answer;
        }
    }
    for ((_, outcome), answer) in outcomes.iter().zip(&answers) {
        match answer {
            Settled::Recorded(status) => {
                METRICS.attempts.with_label_values(&[outcome.verdict.status().as_str()]).inc();
                if status.is_final() {
                    METRICS.ended.with_label_values(&[status.as_str()]).inc();
                }
            }
            Settled::Lost(_) => METRICS.lost.inc(),
            Settled::Already(_) | Settled::Busy => {}
        }
    }
    Ok(answers)
}

/// One statement over all of `outcomes`; and of which of them another one may say something else.
async fn attempt(
    connection: &mut PgConnection,
    outcomes: &[(Lease, Outcome)],
    actor: Option<&str>,
) -> sqlx::Result<(Vec<Settled>, Vec<usize>)> {
    #[cfg(feature = "unfenced")]
    let outcomes = &under_any_lease(connection, outcomes).await?;
    let run_ids: Vec<Uuid> = outcomes.iter().map(|(lease, _)| lease.run_id).collect();
    let fences: Vec<i64> = outcomes.iter().map(|(lease, _)| lease.fence).collect();
    let secrets: Vec<Option<Uuid>> = outcomes.iter().map(|(lease, _)| lease.secret).collect();
    let statuses: Vec<String> =
        outcomes.iter().map(|(_, outcome)| outcome.verdict.status().as_str().to_owned()).collect();
    let reasons: Vec<Option<String>> = outcomes.iter().map(|(_, outcome)| outcome.reason.clone()).collect();
    let exit_codes: Vec<Option<i32>> = outcomes.iter().map(|(_, outcome)| outcome.exit_code).collect();
    let outputs: Vec<Option<serde_json::Value>> = outcomes.iter().map(|(_, outcome)| outcome.output.clone()).collect();
    let errors: Vec<Option<String>> = outcomes.iter().map(|(_, outcome)| outcome.error.clone()).collect();
    let waits: Vec<Option<f64>> =
        outcomes.iter().map(|(_, outcome)| outcome.retry_after.map(|wait| wait.as_secs_f64())).collect();
    let actors: Vec<Option<String>> =
        outcomes.iter().map(|(_, outcome)| outcome.said_by.clone().or(actor.map(str::to_owned))).collect();
    let mut rows = sqlx::query_file!(
        "src/store/sql/settle.sql",
        &run_ids,
        &fences,
        &secrets as &[Option<Uuid>],
        &statuses,
        &reasons as &[Option<String>],
        &exit_codes as &[Option<i32>],
        &outputs as &[Option<serde_json::Value>],
        &errors as &[Option<String>],
        &actors as &[Option<String>],
        &waits as &[Option<f64>],
    )
    .fetch_all(connection)
    .await?;
    let (mut answers, mut unsure) = (vec![Settled::Lost(None); outcomes.len()], vec![false; outcomes.len()]);
    // As they were found, and over that what was settled.
    rows.sort_by_key(|row| row.recorded);
    for row in rows {
        let place = usize::try_from(row.position).unwrap_or_default().saturating_sub(1);
        answers[place] = match (row.recorded, row.already, row.status) {
            (true, _, Some(status)) => Settled::Recorded(status),
            (_, true, Some(status)) => Settled::Already(status),
            (.., None) => Settled::Busy,
            // Changed before we had it, by somebody who left the lease alone.
            _ if row.held => Settled::Busy,
            (.., status) => Settled::Lost(status),
        };
        unsure[place] = !row.recorded && (row.held || matches!(answers[place], Settled::Lost(Some(_))));
    }
    let unsure = (0..outcomes.len()).filter(|&index| unsure[index]).collect();
    Ok((answers, unsure))
}

/// The control of the fault suite: every end is taken as if it were said under the lease of the moment.
#[cfg(feature = "unfenced")]
async fn under_any_lease(
    connection: &mut PgConnection,
    outcomes: &[(Lease, Outcome)],
) -> sqlx::Result<Vec<(Lease, Outcome)>> {
    let mut taken = Vec::new();
    for (lease, outcome) in outcomes {
        let fence: i64 = sqlx::query_scalar("select fence from test_runs where id = $1")
            .bind(lease.run_id)
            .fetch_one(&mut *connection)
            .await?;
        taken.push((Lease { fence, secret: None, ..*lease }, outcome.clone()));
    }
    Ok(taken)
}
