//! Asking for the end of a run.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::metrics::METRICS;

/// What became of a request to cancel a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It had not started, and is `cancelled` now.
    AtOnce,
    /// It is running: its worker is told, and it becomes `cancelled` when its process is gone, unless it succeeds before.
    Requested,
    /// It was final before.
    AlreadyFinal,
    /// There is no such run.
    Unknown,
}

/// Cancels a run in the name of `actor`. The function in the database is the one that people call by hand.
pub async fn cancel(connection: &mut PgConnection, run_id: Uuid, actor: &str) -> sqlx::Result<Cancelled> {
    let answer =
        sqlx::query_scalar!(r#"select cancel_run($1, $2) as "answer!""#, run_id, actor).fetch_one(connection).await?;
    Ok(count(read(&answer)))
}

/// Cancels runs, in this order, all in one transaction; the answers stand in the order of the runs.
pub async fn cancel_all(connection: &mut PgConnection, run_ids: &[Uuid], actor: &str) -> sqlx::Result<Vec<Cancelled>> {
    let answers = sqlx::query_scalar!(
        r#"
        select cancel_run(e.id, $2) as "answer!"
        from (select id from unnest($1::uuid[]) with ordinality as e (id, position) order by position) e
        "#,
        run_ids,
        actor,
    )
    .fetch_all(connection)
    .await?;
    Ok(answers.iter().map(|answer| count(read(answer))).collect())
}

fn read(answer: &str) -> Cancelled {
    match answer {
        "cancelled" => Cancelled::AtOnce,
        "cancel-requested" => Cancelled::Requested,
        "already-final" => Cancelled::AlreadyFinal,
        _ => Cancelled::Unknown,
    }
}

/// What ends here is settled by nobody.
fn count(cancelled: Cancelled) -> Cancelled {
    if cancelled == Cancelled::AtOnce {
        METRICS.ended.with_label_values(&["cancelled"]).inc();
    }
    cancelled
}
