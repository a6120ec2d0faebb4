//! Warns of old snapshots: while one is held, the rows that every run leaves behind pile up, and a busy workflow gets slower and
//! slower. On every replica: whose log is read is not known.

use std::time::{Duration, Instant};

use crate::store::doctor::server::{Pin, ReplicationSlot, prepared, replication_slots, sessions};
use crate::store::{self, Db};

/// How often it looks.
pub const INTERVAL: Duration = Duration::from_secs(60);
/// How often it warns of the same thing.
const WARN: Duration = Duration::from_secs(300);
/// Seconds for which a snapshot may be held.
const OLD: i32 = 600;
/// Transactions since what a replication slot keeps after which it is said to be old: it has no time. As the doctor has it.
const FAR_BEHIND: i64 = 100_000;

/// Looks for old snapshots, and remembers when it warned.
pub struct Watch {
    db: Db,
    old: i32,
    warned: Option<Instant>,
}

impl Watch {
    /// One that has not warned yet.
    pub fn new(db: Db) -> Self {
        Self { db, old: OLD, warned: None }
    }

    /// One to which a snapshot is old after so many seconds.
    pub fn of_age(db: Db, seconds: i32) -> Self {
        Self { old: seconds, ..Self::new(db) }
    }

    /// Looks, and warns unless it did of late; what it has found, a line each.
    pub async fn pass(&mut self) -> Result<Vec<String>, store::Error> {
        let old = self.old;
        let (sessions, prepared, slots) = self
            .db
            .with(async |connection| {
                let sessions = sessions(connection, old).await?;
                let prepared = prepared(connection, old).await?;
                Ok((sessions, prepared, replication_slots(connection).await?))
            })
            .await?;
        let lines: Vec<String> = [
            sessions.iter().map(session).collect(),
            prepared.iter().map(transaction).collect(),
            slots.iter().filter_map(slot).collect::<Vec<_>>(),
        ]
        .concat();
        if !lines.is_empty() && self.warned.is_none_or(|warned| warned.elapsed() >= WARN) {
            self.warned = Some(Instant::now());
            for pin in &lines {
                tracing::warn!(
                    pin,
                    "an old snapshot keeps dead rows from being removed, and busy workflows get slower: end it"
                );
            }
        }
        Ok(lines)
    }
}

fn session(Pin { who, what, seconds, age }: &Pin) -> String {
    format!("process {who}: {what}, open for {seconds} s, {age} transactions behind")
}

fn transaction(Pin { who, what, seconds, age }: &Pin) -> String {
    format!("prepared transaction {who} of {what}, for {seconds} s, {age} transactions behind")
}

fn slot(ReplicationSlot { name, age, .. }: &ReplicationSlot) -> Option<String> {
    let age = (*age).filter(|age| *age > FAR_BEHIND)?;
    Some(format!("replication slot {name}, {age} transactions behind"))
}
