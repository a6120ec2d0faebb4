//! The servers that `DATABASE_URL` names, and which of them is the primary.
//!
//! sqlx knows one host of a URL. Where there are several, each connection of ours is made here, to the one that takes writes,
//! beginning with the one that did last. All parts of a replica share what was found out, so they move together when
//! another server is promoted. Nothing of that happens where there is one.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions as _, Row as _};
use tokio::sync::watch;
use tokio::time::timeout;

/// Time a server has to let us in where others may be tried: less than half of what a caller waits for a connection.
const ANSWER: Duration = Duration::from_secs(2);

/// By the simple protocol, as nothing is known yet of who is at the other end. A timeline's number has eight hexadecimal digits.
const LOOK: &str = "
    select current_setting('transaction_read_only')::bool as read_only,
           case when not pg_is_in_recovery() then substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) end as timeline";

/// The servers of one database, the same for all parts of a replica. Clones share which one is the primary.
#[derive(Clone)]
pub struct Servers(Arc<Inner>);

struct Inner {
    known: Vec<PgConnectOptions>,
    /// The one to try first.
    next: AtomicUsize,
    primary: watch::Sender<Primary>,
    /// How often a connection broke.
    breaks: AtomicU64,
}

/// What was found out last.
#[derive(Clone, Debug, Default)]
struct Primary {
    /// Its place among the servers, and its timeline; `None` before one was found.
    found: Option<(usize, String)>,
    /// Grows whenever connections made before are to be given up.
    term: u64,
}

/// A connection to the primary.
#[derive(Debug)]
pub(super) struct Reached {
    pub(super) connection: PgConnection,
    /// The term it belongs to: it is good as long as [`Servers::term`] is the same.
    pub(super) term: u64,
    /// What [`Servers::breaks`] was when it was last known to be good.
    pub(super) breaks: u64,
    /// The number of the server.
    server: usize,
}

/// No server could be used, and why each could not.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(|(server, why)| format!("{server} {why}")).collect::<Vec<_>>().join("; "))]
pub struct Unreachable(Vec<(String, Refusal)>);

/// Why a server could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// There was no connection.
    #[error("can't be reached: {0}{remedy}", remedy = remedy(.0))]
    Failed(#[from] sqlx::Error),
    /// It did not let us in in time.
    #[error("gave no answer within {ANSWER:?}")]
    Silent,
    /// It follows another server.
    #[error("is a standby")]
    Standby,
    /// It was told to take no writes.
    #[error("takes no writes")]
    ReadOnly,
    /// It takes writes, and another server was promoted since: what is written there is lost.
    #[error("is an old primary: its timeline is {own} and {seen} was seen, a restart of this replica forgets that")]
    Outdated {
        /// Its timeline.
        own: String,
        /// That of the primary of before.
        seen: String,
    },
}

/// What can be done where the cause alone does not tell: it names neither the setting nor the file.
fn remedy(error: &sqlx::Error) -> &'static str {
    let sqlx::Error::Io(error) = error else { return "" };
    let refused = error.get_ref().and_then(|cause| cause.downcast_ref());
    match refused {
        Some(rustls::Error::InvalidCertificate(_)) => {
            " (sslmode asks for another certificate: name the file of its authority by sslrootcert, and the host as the \
             certificate has it)"
        }
        _ if error.kind() == std::io::ErrorKind::NotFound => {
            " (there is no such socket, or no such file as sslrootcert names)"
        }
        _ => "",
    }
}

impl Unreachable {
    /// Whether asking again in a moment can help, because a server starts, or is about to be promoted.
    pub(super) fn is_passing(&self) -> bool {
        self.0.iter().any(|(_, why)| match why {
            Refusal::Failed(sqlx::Error::Io(error)) => error.kind() == std::io::ErrorKind::ConnectionRefused,
            // too_many_connections, cannot_connect_now
            Refusal::Failed(sqlx::Error::Database(error)) => matches!(error.code().as_deref(), Some("53300" | "57P03")),
            Refusal::Failed(_) => false,
            Refusal::Silent | Refusal::Standby | Refusal::ReadOnly | Refusal::Outdated { .. } => true,
        })
    }
}

impl From<Vec<PgConnectOptions>> for Servers {
    /// In this order they are tried until one is known. The same database on each, of course.
    fn from(known: Vec<PgConnectOptions>) -> Self {
        Self(Arc::new(Inner {
            known,
            next: AtomicUsize::new(0),
            primary: watch::Sender::default(),
            breaks: AtomicU64::new(0),
        }))
    }
}

impl From<PgConnectOptions> for Servers {
    /// The one server there is. It is used as it is, standby or not.
    fn from(only: PgConnectOptions) -> Self {
        vec![only].into()
    }
}

impl fmt::Debug for Servers {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The options know the password.
        out.debug_list().entries(self.0.known.iter().map(name)).finish()
    }
}

impl Servers {
    /// A connection to the primary, as it comes, after one look at each server.
    ///
    /// # Errors
    /// When none of them can be used.
    pub async fn connect(&self) -> Result<PgConnection, Unreachable> {
        Ok(self.reach().await?.connection)
    }

    /// How to connect to the primary. It is looked for where there is more than one server.
    pub(super) async fn primary(&self) -> Result<(PgConnectOptions, u64), Unreachable> {
        if let [only] = &self.0.known[..] {
            return Ok((only.clone(), 0));
        }
        let reached = self.reach().await?;
        Ok((self.0.known[reached.server].clone(), reached.term))
    }

    /// A connection to the primary and what it takes to see that it is still that.
    pub(super) async fn reach(&self) -> Result<Reached, Unreachable> {
        let breaks = self.breaks();
        if let [only] = &self.0.known[..] {
            let connected = only.connect().await;
            let failed = |error| Unreachable(vec![(name(only), Refusal::Failed(error))]);
            return Ok(Reached { connection: connected.map_err(failed)?, term: 0, breaks, server: 0 });
        }
        let mut refusals = Vec::new();
        for _ in &self.0.known {
            let number = self.0.next.load(Ordering::Relaxed);
            let server = &self.0.known[number];
            let tried = timeout(ANSWER, look(server)).await.unwrap_or(Err(Refusal::Silent));
            match tried.and_then(|(connection, timeline)| Ok((connection, self.follow(number, timeline)?))) {
                Ok((connection, term)) => return Ok(Reached { connection, term, breaks, server: number }),
                Err(refusal) => refusals.push((name(server), refusal)),
            }
            // Whoever asks next, also if this caller runs out of time, goes on with another one.
            let after = (number + 1) % self.0.known.len();
            let _ = self.0.next.compare_exchange(number, after, Ordering::Relaxed, Ordering::Relaxed);
        }
        Err(Unreachable(refusals))
    }

    /// What it means that a connection failed before it could be used.
    pub(super) fn refused(&self, reached: &Reached, error: sqlx::Error) -> Unreachable {
        Unreachable(vec![(name(&self.0.known[reached.server]), Refusal::Failed(error))])
    }

    /// The term that connections must be of to be used.
    pub(super) fn term(&self) -> u64 {
        self.0.primary.borrow().term
    }

    /// Waits until connections of this term are to be given up.
    pub(super) async fn term_over(&self, term: u64) {
        // It fails when the sender is gone, which we have.
        let _ = self.0.primary.subscribe().wait_for(|primary| primary.term != term).await;
    }

    /// A connection of this term found its server to take no writes: those beside it have to be looked at, too.
    pub(super) fn doubt(&self, term: u64) {
        let several = self.0.known.len() > 1;
        self.0.primary.send_if_modified(|primary| {
            let doubted = several && primary.term == term;
            primary.term += u64::from(doubted);
            doubted
        });
    }

    /// A connection broke: those beside it, which may be broken too, are to be tried before they are used again.
    pub(super) fn broke(&self) {
        self.0.breaks.fetch_add(1, Ordering::Relaxed);
    }

    /// How often that was said.
    pub(super) fn breaks(&self) -> u64 {
        self.0.breaks.load(Ordering::Relaxed)
    }

    /// Takes a server that takes writes for the primary, unless it is known to have been replaced; the term it begins or goes on
    /// with. A server that is promoted begins a timeline of a higher number.
    fn follow(&self, server: usize, timeline: String) -> Result<u64, Refusal> {
        let mut result = Ok(0);
        self.0.primary.send_if_modified(|primary| {
            let moved = match &primary.found {
                Some((_, seen)) if timeline < *seen => {
                    result = Err(Refusal::Outdated { own: timeline.clone(), seen: seen.clone() });
                    return false;
                }
                found => found.as_ref() != Some(&(server, timeline.clone())),
            };
            if moved {
                let known = name(&self.0.known[server]);
                match &primary.found {
                    None => tracing::info!(server = known, timeline, "found the primary of the database"),
                    Some((before, _)) => {
                        let before = name(&self.0.known[*before]);
                        tracing::warn!(server = known, timeline, before, "the database has another primary");
                    }
                }
                *primary = Primary { found: Some((server, timeline.clone())), term: primary.term + 1 };
                self.0.next.store(server, Ordering::Relaxed);
            }
            result = Ok(primary.term);
            moved
        });
        result
    }
}

/// A connection to a server that takes writes, and the timeline it is on.
async fn look(server: &PgConnectOptions) -> Result<(PgConnection, String), Refusal> {
    let mut connection = server.connect().await?;
    let seen = sqlx::raw_sql(LOOK).fetch_one(&mut connection).await?;
    match seen.try_get("timeline")? {
        None => Err(Refusal::Standby),
        Some(_) if seen.try_get("read_only")? => Err(Refusal::ReadOnly),
        Some(timeline) => Ok((connection, timeline)),
    }
}

/// A server for people: `host:port`, or the folder of its socket.
fn name(server: &PgConnectOptions) -> String {
    match server.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", server.get_host(), server.get_port()),
    }
}
