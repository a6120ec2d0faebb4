//! What the process counts of its own work, for Prometheus. What the database knows is asked for when somebody scrapes.
//!
//! Names follow Prometheus' conventions (<https://prometheus.io/docs/practices/naming/>): base units, `_total` for what only grows. No
//! label has more values than a person can read: workflow ids, run ids and names of workers are in none.

use std::sync::LazyLock;

use prometheus::{
    Encoder as _, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// The media type of [`render`].
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Seconds from a millisecond to an hour.
const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];
/// Entries of a statement.
const ENTRIES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0];

/// What an enqueue is answered, an attempt comes to, is executed by, a renewal is answered, and a reaper finds.
const ANSWERS: &[&str] = &[
    "accepted",
    "existing",
    "slot_taken",
    "workflow_paused",
    "too_many_waiting",
    "not_found",
    "idempotency_key_reused",
    "idempotency_in_flight",
    "contended",
    "unknown",
    "unavailable",
];
const OUTCOMES: &[&str] = &["succeeded", "failed", "cancelled", "timed_out", "stale"];
const EXECUTORS: &[&str] = &["command", "http", "pull", "handler"];
const RENEWALS: &[&str] = &["held", "cancel_requested", "overdue", "busy", "lost"];
const CAUSES: &[&str] = &["worker_lost", "unkillable", "callback_timeout", "unconfirmed", "expired"];

/// The metrics of this process.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::default);

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Enqueues by what they were answered: `accepted`, `existing`, `slot_taken`, ...
    pub enqueues: IntCounterVec,
    /// Attempts settled by this replica, by what was said of them.
    pub attempts: IntCounterVec,
    /// Runs that became final by it, by status: settled, or ended before they were started.
    pub ended: IntCounterVec,
    /// How long attempts took that this replica executed.
    pub attempt_seconds: Histogram,
    /// How long runs were due before they were claimed.
    pub waiting_seconds: Histogram,
    /// Runs that were claimed, by kind of executor.
    pub claims: IntCounterVec,
    /// Renewals of leases by their answer.
    pub renewals: IntCounterVec,
    /// Ends that were refused because the lease was lost.
    pub lost: IntCounter,
    /// Runs that the reaper ended, by cause.
    pub reaped: IntCounterVec,
    /// Scheduled runs that met their slot, and waiting runs that were found behind a free one.
    pub promoted: IntCounterVec,
    /// Entries per statement, by what is gathered.
    pub batch_size: HistogramVec,
    /// Requests by method, route and status.
    pub requests: HistogramVec,
    /// Runs that are not over, by status.
    pub runs: IntGaugeVec,
    /// Ages, of what waits longest.
    pub ages: Ages,
    /// Connections, by pool and state.
    pub connections: IntGaugeVec,
    /// Whether the database answered when this was asked for.
    pub database_up: prometheus::IntGauge,
}

/// Seconds that the database says, when it is asked.
#[derive(Debug)]
pub struct Ages {
    /// Since the run that has been due the longest is due.
    pub oldest_queued: GaugeVec,
    /// Since the transaction began that event streams do not look beyond.
    pub events_lag: GaugeVec,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        let all = Register(&registry);
        all.gauges("build_info", "1, under the version of this replica.", &["version"])
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        let ages = Ages {
            oldest_queued: all.gauge(
                "oldest_queued_age_seconds",
                "For how long the run that has been due the longest has waited to be claimed.",
                &[],
            ),
            events_lag: all.gauge(
                "events_lag_seconds",
                "Age of the oldest open transaction that writes: event streams show nothing newer than its begin.",
                &[],
            ),
        };
        Self {
            enqueues: all.counters("enqueues_total", "Enqueues, by what they were answered.", "answer", ANSWERS),
            attempts: all.counters("attempts_total", "Attempts settled by this replica, by what was said of them.", "outcome", OUTCOMES),
            ended: all.counters(
                "runs_ended_total",
                "Runs that became final by this replica, by status: settled, cancelled before their start, skipped or expired. Those that a \
                 newer `replace` or somebody's SQL ended are not counted.",
                "status",
                &[OUTCOMES, &["skipped"]].concat(),
            ),
            attempt_seconds: all.histogram("attempt_duration_seconds", "How long attempts took that this replica executed."),
            waiting_seconds: all.histogram("run_waiting_seconds", "How long runs were due before this replica had them claimed."),
            claims: all.counters("claims_total", "Runs claimed by way of this replica, by kind of executor.", "executor", EXECUTORS),
            renewals: all.counters("lease_renewals_total", "Renewals of leases, by answer.", "result", RENEWALS),
            lost: all.counter("lost_leases_refused_total", "Ends that were refused because their lease was lost."),
            reaped: all.counters("reaped_total", "Runs that the reaper of this replica ended or gave back, by cause.", "cause", CAUSES),
            promoted: all.counters(
                "promoted_total",
                "Runs that this replica brought on: scheduled ones that were due, and stranded ones, of which there should be none.",
                "kind",
                &["due", "stranded"],
            ),
            batch_size: all.histograms("statement_entries", "Entries per statement, by what is gathered.", &["kind"], ENTRIES),
            requests: all.histograms(
                "http_request_duration_seconds",
                "Requests until their answer begins, by method, route and status. Long polls take as long as they wait.",
                &["method", "route", "status"],
                SECONDS,
            ),
            runs: all.gauges("runs", "Runs that are not over, by status. Those that are queued or running hold a slot each.", &["status"]),
            ages,
            connections: all.gauges("db_connections", "Connections to the database, by pool and state.", &["pool", "state"]),
            database_up: all.plain_gauge("database_up", "1 if the database answered when this was asked for, else 0."),
            registry,
        }
    }
}

/// Every metric, in Prometheus' text format.
///
/// # Errors
/// When one has no sensible name, which a test looks at.
pub fn render() -> Result<String, prometheus::Error> {
    let mut text = Vec::new();
    TextEncoder::new().encode(&METRICS.registry.gather(), &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Makes metrics and registers them under our name. Names are literals, each used once: none can be refused.
struct Register<'a>(&'a Registry);

impl Register<'_> {
    fn add<M: prometheus::core::Collector + Clone + 'static>(&self, made: Result<M, prometheus::Error>) -> M {
        let metric = made.unwrap_or_else(|error| unreachable!("{error}"));
        self.0.register(Box::new(metric.clone())).unwrap_or_else(|error| unreachable!("{error}"));
        metric
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(named(name, help)))
    }

    /// Counters that are there from the beginning, at 0: an alert on their growth would not see the first time that one is counted.
    fn counters(&self, name: &str, help: &str, label: &str, values: &[&str]) -> IntCounterVec {
        let counters = self.add(IntCounterVec::new(named(name, help), &[label]));
        values.iter().for_each(|value| drop(counters.with_label_values(&[*value])));
        counters
    }

    fn plain_gauge(&self, name: &str, help: &str) -> prometheus::IntGauge {
        self.add(prometheus::IntGauge::with_opts(named(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(named(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.add(GaugeVec::new(named(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::from(named(name, help)).buckets(SECONDS.to_vec())))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        self.add(HistogramVec::new(HistogramOpts::from(named(name, help)).buckets(buckets.to_vec()), labels))
    }
}

fn named(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("singletrack")
}
