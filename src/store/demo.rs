//! What `singletrack demo` does to the database past everything else of this program.

use sqlx::PgConnection;
use uuid::Uuid;

/// Tries to put a copy of a run beside it, as anybody can who types SQL; the unique index that refused it. `None`: it is there.
pub async fn copy_by_hand(connection: &mut PgConnection, run_id: Uuid) -> sqlx::Result<Option<String>> {
    let done = sqlx::query!(
        "
        insert into test_runs
        select (jsonb_populate_record(r, jsonb_build_object('id', gen_random_uuid()))).*
        from test_runs r
        where r.id = $1
        ",
        run_id
    )
    .execute(connection)
    .await;
    match done {
        Err(sqlx::Error::Database(refusal)) if refusal.is_unique_violation() => {
            Ok(Some(refusal.constraint().unwrap_or_default().to_owned()))
        }
        done => done.map(|_| None),
    }
}
