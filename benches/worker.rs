//! A worker in a process of its own: handlers that do nothing but write down when they began.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use singletrack::config::Settings;
use singletrack::store::Db;
use singletrack::{Context, Handlers, Stop, embed};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use uuid::Uuid;

use crate::workflows::{BUSY, NOOP, workflow};

/// Handlers at once: a handler that does nothing is never the bottleneck. `BENCH_WORKERS` is another number.
const HANDLERS: &str = "1000";
const POLL: Duration = Duration::from_millis(5);

/// How many handlers at once.
pub fn handlers() -> String {
    std::env::var("BENCH_WORKERS").unwrap_or_else(|_| HANDLERS.to_owned())
}

/// A worker that is at it.
pub struct Worker {
    begun: Arc<Begun>,
    stop: Stop,
    since: Instant,
    working: JoinHandle<Result<()>>,
}

#[derive(Default)]
struct Begun {
    count: AtomicU64,
    times: Mutex<Vec<(Uuid, Duration)>>,
}

impl Worker {
    pub fn start(url: &str) -> Result<Self> {
        let settings =
            Settings { database_url: Some(url.to_owned()), workers: Some(handlers()), ..Settings::default() };
        let config = settings.resolve(None)?;
        let (begun, stop) = (Arc::new(Begun::default()), Stop::default());
        let handler = {
            let begun = begun.clone();
            move |context: Context| {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                if let Ok(mut times) = begun.times.lock() {
                    times.push((context.run().id, now));
                }
                begun.count.fetch_add(1, Ordering::Relaxed);
                async { Ok::<(), String>(()) }
            }
        };
        let handlers = Handlers::new().on(&workflow(NOOP)?, handler.clone()).on(&workflow(BUSY)?, handler);
        let since = Instant::now();
        let working = tokio::spawn(embed(config, handlers, stop.clone()));
        Ok(Self { begun, stop, since, working })
    }

    /// Waits until `count` runs have begun and nothing is pending; stops, writes into `file` when each began, and says how long
    /// it took.
    pub async fn finish(self, count: u64, url: &str, file: Option<&str>) -> Result<Value> {
        let db = Db::new(crate::server::servers(url)?, 1, singletrack::store::LIMIT);
        while self.begun.count.load(Ordering::Relaxed) < count || is_pending(&db).await? {
            if self.working.is_finished() {
                break;
            }
            sleep(POLL).await;
        }
        let seconds = self.since.elapsed().as_secs_f64();
        self.stop.ask();
        self.working.await?.context("the worker")?;
        let times = self.begun.times.lock().map_err(|_| anyhow::anyhow!("a handler panicked"))?;
        if let Some(file) = file {
            let mut out = BufWriter::new(File::create(file).with_context(|| format!("can't write {file}"))?);
            for (run_id, time) in times.iter() {
                writeln!(out, "{run_id} {}", unix(*time))?;
            }
            out.flush()?;
        }
        let first = times.iter().map(|(_, time)| *time).min().unwrap_or_default();
        let last = times.iter().map(|(_, time)| *time).max().unwrap_or_default();
        let runs = times.len();
        Ok(json!({
            "runs": runs, "seconds": seconds, "runs_per_second": runs as f64 / seconds,
            "from_first_to_last_start_seconds": (last - first).as_secs_f64(),
        }))
    }
}

/// Seconds with a fraction, as a text: a float has not enough digits for the nanoseconds.
pub fn unix(time: Duration) -> String {
    format!("{}.{:09}", time.as_secs(), time.subsec_nanos())
}

async fn is_pending(db: &Db) -> Result<bool> {
    let pending = "select exists (select from test_runs where status in ('queued', 'running')) \
                   or exists (select from test_runs where status in ('scheduled', 'waiting'))";
    Ok(db.with(async |connection| sqlx::query_scalar(pending).fetch_one(connection).await).await?)
}
