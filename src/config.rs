//! The settings, from the environment and from flags, which win; all wrong ones are reported at once.

mod database_url;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;

pub use self::database_url::DatabaseUrl;
use crate::domain::Outgoing;
use crate::domain::executor::{MAX_LOG_BYTES, MAX_OUTPUT_BYTES};
use crate::domain::workflow::check_queue;
use crate::executor::command::{Guarding, guard};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Time a worker that is about to lose its lease leaves for a pause of its machine, on top of the kill grace.
pub const MARGIN: Duration = Duration::from_secs(2);

/// The settings as they were given, as text; `None`, or nothing but blanks, is the default. Each flag mirrors the variable
/// named with it, and only the command line reads either: a program of your own says here what is to differ.
#[derive(Args, Clone, Debug, Default)]
pub struct Settings {
    /// Where the runs live, as a postgres:// URL; of several hosts, separated by commas, the one that takes writes is used.
    /// Without the flag `serve`, `worker` and `migrate` read the variable DATABASE_URL; `dev` ignores that one and has a
    /// Postgres of its own.
    #[arg(long, value_name = "URL")]
    pub database_url: Option<String>,
    /// Whether to bring the schema up to date at start: auto or off. [default: auto]
    #[arg(long, env = "SINGLETRACK_MIGRATE", value_name = "WHEN")]
    pub migrate: Option<String>,
    /// Address the API listens on. Beyond loopback every request needs a key, and `serve` starts only when there is one; see
    /// `singletrack keys`. [default: 127.0.0.1:7410]
    #[arg(long, env = "SINGLETRACK_LISTEN", value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Listen beyond loopback also while no key was ever made, and let in whoever gets there: on or off. They can start commands on this
    /// machine. [default: off]
    #[arg(long, env = "SINGLETRACK_ALLOW_PUBLIC", value_name = "WHETHER")]
    pub allow_public: Option<String>,
    /// Requests per second that one key may send to one replica, and at once; those about leases are not counted. A number, or off.
    /// [default: off]
    #[arg(long, env = "SINGLETRACK_KEY_RATE", value_name = "NUMBER")]
    pub key_rate: Option<String>,
    /// How others reach it, through a proxy say: for callbacks and links, and its host is let in. [default: http:// and the address listened on]
    #[arg(long, env = "SINGLETRACK_PUBLIC_URL", value_name = "URL")]
    pub public_url: Option<String>,
    /// Where `dev` keeps its private Postgres. [default: .singletrack]
    #[arg(long, env = "SINGLETRACK_DATA_DIR", value_name = "FOLDER")]
    pub data_dir: Option<String>,
    /// Folder of the programs `initdb` and `postgres` for `dev`. [default: looked for]
    #[arg(long, env = "SINGLETRACK_PG_BIN", value_name = "FOLDER")]
    pub pg_bin: Option<String>,
    /// Connections to the database, besides eight for enqueues, claims and ends, one for heartbeats and one that hears of news. [default: 10]
    #[arg(long, env = "SINGLETRACK_POOL_SIZE", value_name = "NUMBER")]
    pub pool_size: Option<String>,
    /// Runs executed at once by this replica; 0: API only. [default: number of CPUs]
    #[arg(long, env = "SINGLETRACK_WORKERS", value_name = "NUMBER")]
    pub workers: Option<String>,
    /// Queues this replica's workers serve, separated by commas. [default: all]
    #[arg(long, env = "SINGLETRACK_QUEUES", value_name = "NAMES")]
    pub queues: Option<String>,
    /// How often a worker renews what it holds. [default: 10s]
    #[arg(long, env = "SINGLETRACK_HEARTBEAT_INTERVAL", value_name = "DURATION")]
    pub heartbeat_interval: Option<String>,
    /// Silence after which a run is stale, in whole seconds; at least 4 intervals, the kill grace and 2s. [default: 60s]
    #[arg(long, env = "SINGLETRACK_HEARTBEAT_TIMEOUT", value_name = "DURATION")]
    pub heartbeat_timeout: Option<String>,
    /// Time between TERM and KILL when a command is stopped. [default: 3s]
    #[arg(long, env = "SINGLETRACK_KILL_GRACE", value_name = "DURATION")]
    pub kill_grace: Option<String>,
    /// How commands are guarded: auto (in a PID namespace where that is allowed), subreaper (never in one: for commands that
    /// use sudo or other set-uid programs) or off (not at all, to prove what the guard is for: then nothing is promised, and
    /// commands of one workflow may overlap). [default: auto]
    #[arg(long, env = "SINGLETRACK_GUARD", value_name = "HOW")]
    pub guard: Option<String>,
    /// Longest an attempt may take, unless its workflow says otherwise, in whole seconds. [default: 10m]
    #[arg(long, env = "SINGLETRACK_RUN_TIMEOUT", value_name = "DURATION")]
    pub run_timeout: Option<String>,
    /// How long an accepted answer is kept under its Idempotency-Key. [default: 1day]
    #[arg(long, env = "SINGLETRACK_IDEMPOTENCY_TTL", value_name = "DURATION")]
    pub idempotency_ttl: Option<String>,
    /// Longest a queued run may stay unstarted, unless its workflow says otherwise, in whole seconds. [default: 1h]
    #[arg(long, env = "SINGLETRACK_START_WITHIN", value_name = "DURATION")]
    pub start_within: Option<String>,
    /// How often the reaper looks for stale and expired runs. [default: 2s]
    #[arg(long, env = "SINGLETRACK_REAP_INTERVAL", value_name = "DURATION")]
    pub reap_interval: Option<String>,
    /// How long a stopping replica lets its runs finish. [default: 30s]
    #[arg(long, env = "SINGLETRACK_DRAIN_TIMEOUT", value_name = "DURATION")]
    pub drain_timeout: Option<String>,
    /// How long a run is kept after its end, with its logs and events; off: for ever. [default: 90d]
    #[arg(long, env = "SINGLETRACK_RETENTION", value_name = "DURATION")]
    pub retention: Option<String>,
    /// Bytes of log kept per attempt; then a remark that it was cut, and the attempt goes on. [default: 10485760]
    #[arg(long, env = "SINGLETRACK_LOG_BYTES", value_name = "BYTES")]
    pub log_bytes: Option<String>,
    /// Longest last line of standard output, or answer to a request, that is taken as a run's output, in bytes.
    /// [default: 262144]
    #[arg(long, env = "SINGLETRACK_OUTPUT_BYTES", value_name = "BYTES")]
    pub output_bytes: Option<String>,
    /// What `http` executors may reach besides public addresses: ranges such as 10.0.0.0/8 and names such as
    /// jobs.internal or *.internal, separated by commas. [default: nothing more]
    #[arg(long, env = "SINGLETRACK_HTTP_ALLOW", value_name = "RANGES AND NAMES")]
    pub http_allow: Option<String>,
    /// Proxy that all requests of `http` executors go through; it decides where names lead. [default: no proxy]
    #[arg(long, env = "SINGLETRACK_HTTP_PROXY", value_name = "URL")]
    pub http_proxy: Option<String>,
    /// Redirects (307 and 308) that a request of an `http` executor follows, 0 to 10. [default: 0]
    #[arg(long, env = "SINGLETRACK_HTTP_REDIRECTS", value_name = "NUMBER")]
    pub http_redirects: Option<String>,
    /// What the service's own log looks like: text or json. [default: text]
    #[arg(long, env = "SINGLETRACK_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Which of the service's own log lines to show, as directives of tracing-subscriber's EnvFilter. [default: info]
    #[arg(long, env = "RUST_LOG", value_name = "DIRECTIVES")]
    pub log: Option<String>,
    /// Print the settings in force, secrets hidden, and exit.
    #[arg(long)]
    pub print_config: bool,
}

/// The settings in force.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the runs live; `None` where none was named.
    pub database_url: Option<DatabaseUrl>,
    /// Whether to migrate at start.
    pub migrate: Migrate,
    /// Address of the API.
    pub listen: SocketAddr,
    /// Whether to listen beyond loopback also while no key was ever made.
    pub allow_public: bool,
    /// Requests per second that one key may send; `None` for any number.
    pub key_rate: Option<u32>,
    /// How others reach it; `None`: the address listened on.
    pub public_url: Option<String>,
    /// How long an accepted answer is kept under its idempotency key.
    pub idempotency_ttl: Duration,
    /// Where `dev` keeps its data.
    pub data_dir: PathBuf,
    /// Where `dev` finds Postgres; `None`: it looks for it.
    pub pg_bin: Option<PathBuf>,
    /// Connections in the pool.
    pub pool_size: u32,
    /// What the worker needs.
    pub worker: Worker,
    /// What the reaper needs.
    pub reaper: Reaper,
    /// How long a run is kept after its end; `None` for ever.
    pub retention: Option<Duration>,
    /// Text or JSON.
    pub log_format: LogFormat,
    /// Directives of the log filter.
    pub log: String,
}

/// Settings of the worker.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Runs executed at once; 0 for none.
    pub capacity: usize,
    /// The queues it serves; `None` for all.
    pub queues: Option<Vec<String>>,
    /// How often it renews a lease, at most.
    pub heartbeat_interval: Duration,
    /// Heartbeat timeout of runs whose workflow names none.
    pub heartbeat_timeout: Duration,
    /// Between TERM and KILL.
    pub kill_grace: Duration,
    /// How commands are guarded, and by what program.
    pub guarding: Guarding,
    /// Time limit of attempts whose workflow names none.
    pub run_timeout: Duration,
    /// How long a stopping replica lets its runs finish.
    pub drain_timeout: Duration,
    /// Bytes of log kept per attempt.
    pub log_bytes: u64,
    /// Bytes of the last line, or of an answer, that may become the output.
    pub output_bytes: usize,
    /// Whom `http` executors may reach.
    pub outgoing: Outgoing,
}

/// Settings of the reaper.
#[derive(Clone, Debug)]
pub struct Reaper {
    /// How often it looks.
    pub interval: Duration,
    /// How long a run may stay queued, where its workflow does not say.
    pub start_within: Duration,
    /// After no good look for this long it starts counting silence anew.
    pub blind_after: Duration,
}

/// Whether to migrate at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migrate {
    /// Bring the schema up to date.
    Auto,
    /// Leave it to `singletrack migrate`.
    Off,
}

/// What the service's own log looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object per line.
    Json,
}

/// Every wrong setting, a line each.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Mistakes(Vec<String>);

/// Takes settings one by one and keeps what is wrong with them.
struct Reader {
    mistakes: Vec<String>,
}

impl Reader {
    /// The value of `given`, or of `default` where it is absent or empty.
    fn take<T>(
        &mut self,
        name: &str,
        given: &Option<String>,
        default: T,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> T {
        match given.as_deref().map(str::trim) {
            None | Some("") => default,
            Some(text) => parse(text).unwrap_or_else(|mistake| {
                self.mistakes.push(format!("{name}: {mistake}"));
                default
            }),
        }
    }

    fn duration(&mut self, name: &str, given: &Option<String>, default: &'static str) -> Duration {
        let default = humantime::parse_duration(default).unwrap_or_default();
        self.take(name, given, default, |text| match humantime::parse_duration(text) {
            Ok(duration) if duration.is_zero() => Err("must be longer than 0s".into()),
            Ok(duration) if duration > Duration::from_secs(365 * 24 * 3600) => Err("must be at most a year".into()),
            Ok(duration) => Ok(duration),
            Err(_) => Err(format!("`{text}` is not a duration; write for example 500ms, 10s, 2m or 1h 30m")),
        })
    }

    fn whole_seconds(&mut self, name: &str, given: &Option<String>, default: &'static str) -> Duration {
        let duration = self.duration(name, given, default);
        if duration.subsec_nanos() != 0 {
            self.mistakes.push(format!("{name}: must be whole seconds"));
        }
        duration
    }
}

/// A number within bounds.
fn number<T: FromStr + PartialOrd + fmt::Display>(low: T, high: T) -> impl Fn(&str) -> Result<T, String> {
    move |text| match text.parse::<T>() {
        Ok(number) if number >= low && number <= high => Ok(number),
        _ => Err(format!("`{text}` is not a number from {low} to {high}")),
    }
}

impl Settings {
    /// Checks every setting. `database_url` is the variable DATABASE_URL where the command reads it; the flag wins.
    ///
    /// # Errors
    /// Every wrong setting, by the name of its variable, with what is wrong.
    pub fn resolve(&self, database_url: Option<String>) -> Result<Config, Mistakes> {
        let mut read = Reader { mistakes: Vec::new() };
        let database_url = self.database_url.clone().or(database_url);
        let config = Config {
            database_url: read.take("DATABASE_URL", &database_url, None, |text| text.parse().map(Some)),
            migrate: read.take("SINGLETRACK_MIGRATE", &self.migrate, Migrate::Auto, |text| match text {
                "auto" => Ok(Migrate::Auto),
                "off" => Ok(Migrate::Off),
                _ => Err(format!("`{text}` is neither auto nor off")),
            }),
            listen: read.take("SINGLETRACK_LISTEN", &self.listen, SocketAddr::from(([127, 0, 0, 1], 7410)), listen),
            allow_public: read.take("SINGLETRACK_ALLOW_PUBLIC", &self.allow_public, false, |text| match text {
                "on" => Ok(true),
                "off" => Ok(false),
                _ => Err(format!("`{text}` is neither on nor off")),
            }),
            key_rate: read.take("SINGLETRACK_KEY_RATE", &self.key_rate, None, |text| match text {
                "off" => Ok(None),
                _ => number(1, 1_000_000)(text).map(Some).map_err(|mistake| format!("{mistake}, nor off")),
            }),
            idempotency_ttl: read.duration("SINGLETRACK_IDEMPOTENCY_TTL", &self.idempotency_ttl, "1day"),
            public_url: read.take("SINGLETRACK_PUBLIC_URL", &self.public_url, None, |text| public_url(text).map(Some)),
            data_dir: read.take("SINGLETRACK_DATA_DIR", &self.data_dir, ".singletrack".into(), |text| Ok(text.into())),
            pg_bin: read.take("SINGLETRACK_PG_BIN", &self.pg_bin, None, |text| Ok(Some(text.into()))),
            pool_size: read.take("SINGLETRACK_POOL_SIZE", &self.pool_size, 10, number(1, 1000)),
            worker: self.worker(&mut read),
            reaper: Reaper {
                interval: read.duration("SINGLETRACK_REAP_INTERVAL", &self.reap_interval, "2s"),
                start_within: read.whole_seconds("SINGLETRACK_START_WITHIN", &self.start_within, "1h"),
                blind_after: Duration::ZERO,
            },
            retention: read.take("SINGLETRACK_RETENTION", &self.retention, Some(90 * DAY), retention),
            log_format: read.take("SINGLETRACK_LOG_FORMAT", &self.log_format, LogFormat::Text, |text| match text {
                "text" => Ok(LogFormat::Text),
                "json" => Ok(LogFormat::Json),
                _ => Err(format!("`{text}` is neither text nor json")),
            }),
            log: read.take(
                "RUST_LOG",
                &self.log,
                "info".to_owned(),
                |text| match tracing_subscriber::EnvFilter::try_new(text) {
                    Ok(_) => Ok(text.to_owned()),
                    Err(mistake) => Err(format!("`{text}`: {mistake}")),
                },
            ),
        };
        let config = Config {
            reaper: Reaper {
                blind_after: config.worker.heartbeat_interval.max(2 * config.reaper.interval),
                ..config.reaper
            },
            ..config
        };
        if read.mistakes.is_empty() { Ok(config) } else { Err(Mistakes(read.mistakes)) }
    }

    fn worker(&self, read: &mut Reader) -> Worker {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let worker = Worker {
            capacity: read.take("SINGLETRACK_WORKERS", &self.workers, cpus, number(0, 10_000)),
            queues: read.take("SINGLETRACK_QUEUES", &self.queues, None, |text| queues(text).map(Some)),
            heartbeat_interval: read.duration("SINGLETRACK_HEARTBEAT_INTERVAL", &self.heartbeat_interval, "10s"),
            heartbeat_timeout: read.whole_seconds("SINGLETRACK_HEARTBEAT_TIMEOUT", &self.heartbeat_timeout, "60s"),
            kill_grace: read.duration("SINGLETRACK_KILL_GRACE", &self.kill_grace, "3s"),
            guarding: Guarding::by_this_program(read.take(
                "SINGLETRACK_GUARD",
                &self.guard,
                guard::Mode::default(),
                str::parse,
            )),
            run_timeout: read.whole_seconds("SINGLETRACK_RUN_TIMEOUT", &self.run_timeout, "10m"),
            drain_timeout: read.duration("SINGLETRACK_DRAIN_TIMEOUT", &self.drain_timeout, "30s"),
            log_bytes: read.take("SINGLETRACK_LOG_BYTES", &self.log_bytes, 10 << 20, number(0, MAX_LOG_BYTES)),
            output_bytes: read.take("SINGLETRACK_OUTPUT_BYTES", &self.output_bytes, 256 << 10, |text| {
                number(0, MAX_OUTPUT_BYTES)(text).map(|bytes| bytes as usize)
            }),
            outgoing: Outgoing {
                allowed: read.take("SINGLETRACK_HTTP_ALLOW", &self.http_allow, Default::default(), str::parse),
                proxy: read.take("SINGLETRACK_HTTP_PROXY", &self.http_proxy, None, |text| text.parse().map(Some)),
                redirects: read.take("SINGLETRACK_HTTP_REDIRECTS", &self.http_redirects, 0, number(0, 10)),
            },
        };
        let needed = 4 * worker.heartbeat_interval + worker.kill_grace + MARGIN;
        if read.mistakes.is_empty() && worker.heartbeat_timeout < needed {
            read.mistakes.push(format!(
                "SINGLETRACK_HEARTBEAT_TIMEOUT: {} is too short: at least 4 heartbeat intervals, the kill grace and {}, \
                 which is {}",
                humantime::format_duration(worker.heartbeat_timeout),
                humantime::format_duration(MARGIN),
                humantime::format_duration(needed),
            ));
        }
        worker
    }
}

fn listen(text: &str) -> Result<SocketAddr, String> {
    let address = text.replace("localhost:", "127.0.0.1:").parse();
    address.map_err(|_| format!("`{text}` is not an address and port such as 127.0.0.1:7410"))
}

fn public_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    match rest {
        Some(host) if !host.trim_end_matches('/').is_empty() && !host.contains([' ', '?', '#', '@']) => {
            Ok(text.trim_end_matches('/').to_owned())
        }
        _ => Err(format!("`{text}` is not a URL such as https://runs.example.com")),
    }
}

fn retention(text: &str) -> Result<Option<Duration>, String> {
    match humantime::parse_duration(text) {
        _ if text == "off" => Ok(None),
        Ok(duration) if duration >= Duration::from_secs(1) && duration <= 36_500 * DAY => Ok(Some(duration)),
        Ok(_) => Err("must be from 1s to 36500d, or off: for ever".into()),
        Err(_) => Err(format!("`{text}` is not a duration; write for example 12h or 90d, or off: for ever")),
    }
}

fn queues(text: &str) -> Result<Vec<String>, String> {
    let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
    names.iter().try_for_each(|name| check_queue(name))?;
    Ok(names)
}

/// A duration that people count in days, and not in months of 30.44 of them.
fn in_days(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds.is_multiple_of(DAY.as_secs()) && duration.subsec_nanos() == 0 => {
            format!("{}d", seconds / DAY.as_secs())
        }
        _ => humantime::format_duration(duration).to_string(),
    }
}

/// The settings as `VARIABLE=value` lines, secrets hidden.
impl fmt::Display for Config {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = humantime::format_duration;
        let path = |path: &Option<PathBuf>| path.as_ref().map_or(String::new(), |path| path.display().to_string());
        let lower = |value: &dyn fmt::Debug| format!("{value:?}").to_lowercase();
        let (worker, reaper) = (&self.worker, &self.reaper);
        let url = self.database_url.as_ref().map_or(String::new(), |url| format!("{url:?}"));
        writeln!(out, "DATABASE_URL={url}")?;
        writeln!(out, "SINGLETRACK_MIGRATE={}", lower(&self.migrate))?;
        writeln!(out, "SINGLETRACK_LISTEN={}", self.listen)?;
        writeln!(out, "SINGLETRACK_ALLOW_PUBLIC={}", if self.allow_public { "on" } else { "off" })?;
        let rate = self.key_rate.map_or("off".to_owned(), |rate| rate.to_string());
        writeln!(out, "SINGLETRACK_KEY_RATE={rate}")?;
        writeln!(out, "SINGLETRACK_PUBLIC_URL={}", self.public_url.as_deref().unwrap_or_default())?;
        writeln!(out, "SINGLETRACK_DATA_DIR={}", self.data_dir.display())?;
        writeln!(out, "SINGLETRACK_PG_BIN={}", path(&self.pg_bin))?;
        writeln!(out, "SINGLETRACK_POOL_SIZE={}", self.pool_size)?;
        writeln!(out, "SINGLETRACK_WORKERS={}", worker.capacity)?;
        writeln!(out, "SINGLETRACK_QUEUES={}", worker.queues.as_deref().unwrap_or_default().join(","))?;
        writeln!(out, "SINGLETRACK_HEARTBEAT_INTERVAL={}", time(worker.heartbeat_interval))?;
        writeln!(out, "SINGLETRACK_HEARTBEAT_TIMEOUT={}", time(worker.heartbeat_timeout))?;
        writeln!(out, "SINGLETRACK_KILL_GRACE={}", time(worker.kill_grace))?;
        writeln!(out, "SINGLETRACK_GUARD={}", worker.guarding.mode)?;
        writeln!(out, "SINGLETRACK_RUN_TIMEOUT={}", time(worker.run_timeout))?;
        writeln!(out, "SINGLETRACK_IDEMPOTENCY_TTL={}", time(self.idempotency_ttl))?;
        writeln!(out, "SINGLETRACK_START_WITHIN={}", time(reaper.start_within))?;
        writeln!(out, "SINGLETRACK_REAP_INTERVAL={}", time(reaper.interval))?;
        writeln!(out, "SINGLETRACK_DRAIN_TIMEOUT={}", time(worker.drain_timeout))?;
        writeln!(out, "SINGLETRACK_RETENTION={}", self.retention.map_or("off".to_owned(), in_days))?;
        writeln!(out, "SINGLETRACK_LOG_BYTES={}", worker.log_bytes)?;
        writeln!(out, "SINGLETRACK_OUTPUT_BYTES={}", worker.output_bytes)?;
        let proxy = worker.outgoing.proxy.as_ref().map_or(String::new(), ToString::to_string);
        writeln!(out, "SINGLETRACK_HTTP_ALLOW={}", worker.outgoing.allowed)?;
        writeln!(out, "SINGLETRACK_HTTP_PROXY={proxy}")?;
        writeln!(out, "SINGLETRACK_HTTP_REDIRECTS={}", worker.outgoing.redirects)?;
        writeln!(out, "SINGLETRACK_LOG_FORMAT={}", lower(&self.log_format))?;
        write!(out, "RUST_LOG={}", self.log)
    }
}
