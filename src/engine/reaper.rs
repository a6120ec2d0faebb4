//! Ends what nobody acts for any more. On every replica, without a leader.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::Next;
use super::apart::together_or_apart;
use super::lookout::Look;
use crate::config;
use crate::domain::{Lease, Outcome, Verdict};
use crate::executor::boottime::Boottime;
use crate::metrics::METRICS;
use crate::store::claim::release;
use crate::store::reap::{Cause, Sealed, Sight, expire, seal, sight, sweep_leases, unstarted};
use crate::store::settle::{Settled, settle};
use crate::store::{self, Db};

/// Rows per pass and kind.
const BATCH: usize = 100;

/// A clock that is off by this much from one look to the next was set; less is a slow connection.
const STEP: TimeDelta = TimeDelta::seconds(5);

/// A reaper and what it has seen so far.
pub struct Reaper {
    db: Db,
    start_within_seconds: i32,
    blind_after: Duration,
    view: Option<View>,
}

/// The stretch of time over which the database was seen at work.
struct View {
    /// Since when, by the database's clock. Silence before it proves nothing: nobody could be heard.
    seen_since: DateTime<Utc>,
    timeline: String,
    last_good: Boottime,
    /// The database's clock at the last look, and ours then.
    now: DateTime<Utc>,
    at: Boottime,
}

/// What a pass did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Runs whose attempt was ended because their worker fell silent, or did not end it in time.
    pub ended: Vec<Uuid>,
    /// Runs that are queued again because a pull worker never confirmed their lease.
    pub given_back: Vec<Uuid>,
    /// Runs that were skipped because nobody started them.
    pub expired: Vec<Uuid>,
    /// Whether to look again at once.
    pub next: Next,
}

impl Reaper {
    /// A reaper that has seen nothing yet.
    pub fn new(db: Db, config: &config::Reaper) -> Self {
        Self {
            db,
            start_within_seconds: i32::try_from(config.start_within.as_secs()).unwrap_or(i32::MAX),
            blind_after: config.blind_after,
            view: None,
        }
    }

    /// Takes note that the database was seen at work, though there was nothing to end: a run that begins now, and whose worker dies
    /// at once, is not to be heard of from the next pass on only.
    pub fn saw(&mut self, look: &Look) {
        self.look(look.signs.sight.clone(), look.at);
        if let Some(view) = &mut self.view {
            view.last_good = look.at;
        }
    }

    /// Ends one batch of stale and one of expired runs.
    pub async fn pass(&mut self) -> Result<Report, store::Error> {
        let started = Boottime::now();
        let seen = self.db.with(async |connection| sight(connection).await).await?;
        let seen_since = self.look(seen, started);
        let limit = i64::try_from(BATCH).unwrap_or(i64::MAX);
        let sealed = self.db.with(async |connection| seal(connection, seen_since, limit).await).await?;
        // The database was seen at work. What is wrong with single runs below must not blind the next pass.
        if let Some(view) = &mut self.view {
            view.last_good = Boottime::now();
        }
        // One after the other, whatever became of the one before.
        let ended = self.end(&sealed).await;
        let given_back = self.give_back(&sealed).await;
        let expired = self.expire(limit).await;
        let swept = self.db.with(async |connection| sweep_leases(connection, limit).await).await;
        let (ended, given_back, expired, swept) = (ended?, given_back?, expired?, swept?);
        let full = [sealed.len(), expired.len(), usize::try_from(swept).unwrap_or(BATCH)].contains(&BATCH);
        // A full batch of which nothing could be ended would be found again at once.
        let done = ended.len() + given_back.len();
        let next = if full && (done > 0 || sealed.is_empty()) { Next::Again } else { Next::Rest };
        Ok(Report { ended, given_back, expired, next })
    }

    /// Since when the database has been seen without a gap. One failed statement is no gap; no good look for as long as a
    /// heartbeat may take is one. So is a new timeline, where renewals may be missing, and a step of the database's clock,
    /// which makes everybody look silent.
    fn look(&mut self, seen: Sight, at: Boottime) -> DateTime<Utc> {
        let view = match self.view.take() {
            Some(view)
                if view.timeline == seen.timeline
                    && view.last_good.elapsed() <= self.blind_after
                    && !stepped(view.now, seen.now, view.at.elapsed()) =>
            {
                View { now: seen.now, at, ..view }
            }
            _ => View { seen_since: seen.now, timeline: seen.timeline, last_good: at, now: seen.now, at },
        };
        self.view.insert(view).seen_since
    }

    /// Settles what was sealed, down the same path as a worker's own finish.
    async fn end(&self, sealed: &[Sealed]) -> Result<Vec<Uuid>, store::Error> {
        let ended = |found: &Sealed| Some((found.lease, outcome(found.cause)?));
        let outcomes: Vec<(Lease, Outcome)> = sealed.iter().filter_map(ended).collect();
        together_or_apart(outcomes, |(lease, _)| lease.run_id, |outcomes| self.settle(outcomes)).await
    }

    /// Queues again what no pull worker has confirmed.
    async fn give_back(&self, sealed: &[Sealed]) -> Result<Vec<Uuid>, store::Error> {
        let never_begun = sealed.iter().filter(|found| outcome(found.cause).is_none());
        let leases: Vec<Lease> = never_begun.map(|found| found.lease).collect();
        together_or_apart(leases, |lease| lease.run_id, |leases| self.release(leases)).await
    }

    async fn release(&self, leases: Vec<Lease>) -> Result<Vec<Uuid>, store::Error> {
        let reason = Some("unconfirmed");
        let released = self.db.with(async |connection| release(connection, &leases, "reaper", reason).await).await?;
        METRICS.reaped.with_label_values(&["unconfirmed"]).inc_by(released.len() as u64);
        for lease in &released {
            tracing::warn!(run.id = %lease.run_id, "its pull worker never confirmed the lease: queued again");
        }
        Ok(released.into_iter().map(|lease| lease.run_id).collect())
    }

    /// Skips what nobody started.
    async fn expire(&self, limit: i64) -> Result<Vec<Uuid>, store::Error> {
        let within = self.start_within_seconds;
        let found = self.db.with(async |connection| unstarted(connection, within, limit).await).await?;
        together_or_apart(found, |run| *run, |runs| self.skip(runs)).await
    }

    async fn skip(&self, runs: Vec<Uuid>) -> Result<Vec<Uuid>, store::Error> {
        let within = self.start_within_seconds;
        let skipped = self.db.with(async |connection| expire(connection, within, &runs).await).await?;
        METRICS.reaped.with_label_values(&["expired"]).inc_by(skipped.len() as u64);
        for run in &skipped {
            tracing::warn!(run.id = %run, "no worker started it in time: skipped");
        }
        Ok(skipped)
    }

    async fn settle(&self, outcomes: Vec<(Lease, Outcome)>) -> Result<Vec<Uuid>, store::Error> {
        let settled = self.db.with(async |connection| settle(connection, &outcomes, "reaper").await).await?;
        let mut ended = Vec::new();
        for ((lease, outcome), settled) in outcomes.iter().zip(settled) {
            // Else its worker settled it first, which is as good.
            if let Settled::Recorded(status) = settled {
                let reason = outcome.reason.as_deref();
                tracing::warn!(run.id = %lease.run_id, run.fence = lease.fence, status = status.as_str(), reason, "ended an attempt");
                METRICS.reaped.with_label_values(&[reason.unwrap_or_default()]).inc();
                ended.push(lease.run_id);
            }
        }
        Ok(ended)
    }
}

/// Whether a clock that showed `before` and now shows `after` was set in the `elapsed` time between.
fn stepped(before: DateTime<Utc>, after: DateTime<Utc>, elapsed: Duration) -> bool {
    let elapsed = TimeDelta::from_std(elapsed).unwrap_or(TimeDelta::MAX);
    (after - before - elapsed).abs() > STEP
}

/// How an attempt ended; `None` where there was none.
fn outcome(cause: Cause) -> Option<Outcome> {
    let (verdict, reason, error) = match cause {
        Cause::Unconfirmed => return None,
        Cause::Silent => (Verdict::Stale, "worker_lost", "its worker was not heard of for the heartbeat timeout"),
        Cause::Unkillable => (Verdict::TimedOut, "unkillable", "its worker did not end it at its time limit"),
        Cause::CallbackOverdue => (
            Verdict::TimedOut,
            "callback_timeout",
            "its http target answered 202 and did not finish it within `callback_timeout_seconds`",
        ),
    };
    Some(Outcome::because(verdict, reason, error))
}
