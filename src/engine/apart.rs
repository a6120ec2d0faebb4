//! Batches of which one bad row must not keep the others.

use uuid::Uuid;

use crate::store;

/// Does `work` for all of `items`, or for one by one where the database refuses them together: one bad row must not keep
/// the others. Answers with the runs it was done for.
pub(super) async fn together_or_apart<T: Clone, Work: Future<Output = Result<Vec<Uuid>, store::Error>>>(
    items: Vec<T>,
    id: impl Fn(&T) -> Uuid,
    work: impl Fn(Vec<T>) -> Work,
) -> Result<Vec<Uuid>, store::Error> {
    if items.is_empty() {
        return Ok(Vec::new());
    }
    let mut done = Vec::new();
    match work(items.clone()).await {
        Ok(all) => done = all,
        Err(error @ (store::Error::Refused(_) | store::Error::Busy(_))) => {
            tracing::warn!(%error, "a batch was refused; taking it one by one");
            for item in items {
                let id = id(&item);
                match work(vec![item]).await {
                    Ok(one) => done.extend(one),
                    Err(error @ (store::Error::Refused(_) | store::Error::Busy(_))) => {
                        tracing::error!(%error, run.id = %id, "can't change this run");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        // The database is away: it would be so for each of them.
        Err(error) => return Err(error),
    }
    done.sort();
    Ok(done)
}
