//! What is run: workflows whose instances (`noop@17`) have a slot each, and the requests for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use singletrack::domain::{Definition, WorkflowId};
use singletrack::store::batch::enqueue_all;
use singletrack::store::enqueue::{Enqueued, Request};
use singletrack::store::{Db, Error, workflows};

/// Done by a handler that does nothing.
pub const NOOP: &str = "noop";
/// The same; the one workflow that everybody wants.
pub const BUSY: &str = "busy";
/// Done by workers over HTTP.
pub const PULLED: &str = "pulled";
/// Done by `/bin/true`.
pub const TRUE: &str = "true";
/// Runs of one statement, where many are enqueued.
const PIECE: usize = 1000;

/// Defines all of them.
pub async fn define_all(db: &Db) -> Result<()> {
    let handler = json!({"executor": {"type": "handler"}});
    let pulled = json!({"executor": {"type": "pull"}});
    let command = json!({"executor": {"type": "command", "argv": ["/bin/true"]}});
    for (id, definition) in [(NOOP, &handler), (BUSY, &handler), (PULLED, &pulled), (TRUE, &command)] {
        define(db, id, definition).await?;
    }
    Ok(())
}

/// Defines one.
pub async fn define(db: &Db, id: &str, definition: &Value) -> Result<()> {
    let id = workflow(id)?;
    let definition: Definition = serde_json::from_value(definition.clone())?;
    db.with(async |connection| workflows::put(connection, &id, &definition, "bench").await).await?;
    Ok(())
}

pub fn workflow(id: &str) -> Result<WorkflowId> {
    id.parse().map_err(anyhow::Error::msg)
}

/// What floor.md gives each job.
pub fn input() -> Value {
    json!({"seq": 1, "to": "someone@example.com", "kind": "welcome"})
}

/// Names for instances that nobody has used, in whatever database.
#[derive(Clone)]
pub struct Instances(Arc<Inner>);

struct Inner {
    prefix: String,
    next: AtomicU64,
}

impl Instances {
    pub fn of(workflow: &str) -> Self {
        let id = uuid::Uuid::now_v7().simple().to_string();
        let prefix = format!("{workflow}@{}-", &id[..16]);
        Self(Arc::new(Inner { prefix, next: AtomicU64::new(1) }))
    }

    /// The next one, at the end of `text`.
    pub fn write(&self, text: &mut Vec<u8>) {
        use std::io::Write as _;
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        // Memory takes everything.
        let _ = write!(text, "{}{number}", self.0.prefix);
    }

    pub fn next(&self) -> String {
        format!("{}{}", self.0.prefix, self.0.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// A request for a run of `workflow_id`.
pub fn request(workflow_id: &str) -> Result<Request> {
    Ok(Request { input: Some(input()), ..Request::new(workflow(workflow_id)?, "bench") })
}

/// Enqueues one run through the library.
pub async fn enqueue(db: &Db, request: Request) -> Result<Enqueued, Arc<Error>> {
    let mut answers = enqueue_all(db, std::slice::from_ref(&request)).await;
    answers.pop().unwrap_or(Ok(Enqueued::Contended))
}

/// Enqueues many runs through the library; all of them must be accepted.
pub async fn enqueue_many(db: &Db, requests: Vec<Request>) -> Result<()> {
    for answer in enqueue_all(db, &requests).await {
        match answer? {
            Enqueued::Accepted(_) => {}
            other => bail!("a run was not accepted: {other:?}"),
        }
    }
    Ok(())
}

/// Enqueues `count` runs of instances of their own.
pub async fn fill(db: &Db, workflow: &str, count: usize) -> Result<()> {
    let instances = Instances::of(workflow);
    let mut left = count;
    while left > 0 {
        let size = left.min(PIECE);
        let requests = (0..size).map(|_| request(&instances.next())).collect::<Result<_>>()?;
        enqueue_many(db, requests).await.context("filling the queue")?;
        left -= size;
    }
    Ok(())
}
