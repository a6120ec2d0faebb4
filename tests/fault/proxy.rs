//! The network between the replicas and Postgres: a proxy that knows the protocol, and does to a connection what networks do.
//!
//! What it passes on it passes on byte for byte and in order, one message at least at a time, with no more in memory per direction
//! than a batch (what one read has brought, and the message it ended in). The one thing it says by itself is `N`, no, to a request
//! for encryption: `sslmode=require` is refused.
//!
//! What it does not do: lose or reorder bytes on a connection that stays (TCP does not either); limit the bandwidth; follow COPY
//! (see [`super::wire`]) and statements unknown to [`super::statements`]; tell a session from a request to cancel, which is passed
//! on like one. The seed fixes the luck of the n-th connection; which client that is, and when, is up to the machine.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::wire::{Answer, Opening, Session, frames, opening};

/// How much is read at once.
const READ: usize = 16 * 1024;

/// Where the server listens.
#[derive(Clone, Debug)]
pub enum Target {
    /// The socket's file, `.s.PGSQL.5432` in the folder that clients name.
    Unix(PathBuf),
    /// An address.
    Tcp(SocketAddr),
}

/// What happens to connections. The default is fair: everything is passed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weather {
    /// Every batch of messages waits that long before it is passed on, in each direction.
    pub delay: Option<Duration>,
    /// Connections stay open, new ones are accepted, and nothing is passed on, the end of a connection neither. What comes
    /// meanwhile is passed on when the hole is closed, as a network does that was away.
    pub black_hole: bool,
    /// New connections are reset.
    pub refuse: bool,
    /// How likely a batch, in either direction, ends in a reset of its connection, at a random message of it.
    pub reset_per_mille: u16,
    /// How likely the message that commits a write is not passed on, nor anything after it: the connection is reset when the
    /// server has all that came before. Nothing commits.
    pub cut_before_commit_per_mille: u16,
    /// How likely the answer to a committed write is lost: the connection is reset when the server has said that it committed.
    /// Only a statement that wrote or returned rows counts: a claim that found nothing is answered.
    pub cut_before_answer_per_mille: u16,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections accepted and not refused.
    pub connections: u64,
    /// Connections refused.
    pub refused: u64,
    /// Batches delayed.
    pub delayed: u64,
    /// Times that a connection had to wait in a black hole.
    pub held: u64,
    /// Connections reset at a random message, or by [`Proxy::reset_all`].
    pub resets: u64,
    /// Writes that the server has committed, and whose answer was passed on. A statement that could have written, and returned a
    /// refusal instead, is one of them.
    pub commits: u64,
    /// Writes cut off before their commit.
    pub cuts_before_commit: u64,
    /// Writes that the server has committed, and whose answer was lost.
    pub cuts_before_answer: u64,
}

/// A way to a server. It is gone, with all connections, when this is dropped.
pub struct Proxy {
    port: u16,
    sky: Arc<Sky>,
    _connections: JoinSet<()>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1, in fair weather. Needs the runtime.
    ///
    /// # Errors
    /// There is no port to be had. That there is no server is found out by the clients, one by one: they are reset.
    pub fn start(target: Target, seed: u64) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let port = listener.local_addr()?.port();
        let sky = Arc::new(Sky::default());
        let mut connections = JoinSet::new();
        connections.spawn(accept(listener, target, sky.clone(), StdRng::seed_from_u64(seed)));
        Ok(Self { port, sky, _connections: connections })
    }

    /// Where clients find it on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes the weather, also for the connections there are.
    pub fn set(&self, weather: Weather) {
        self.sky.weather.send_replace(weather);
    }

    /// Resets all connections there are.
    pub fn reset_all(&self) {
        self.sky.resets.send_replace(());
    }

    /// What has happened since the start.
    pub fn counts(&self) -> Counts {
        *self.sky.counts.lock().unwrap()
    }
}

/// What is above all connections.
#[derive(Default)]
struct Sky {
    weather: watch::Sender<Weather>,
    resets: watch::Sender<()>,
    counts: Mutex<Counts>,
}

impl Sky {
    fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.counts.lock().unwrap());
    }

    fn weather(&self) -> Weather {
        *self.weather.borrow()
    }

    async fn out_of_black_hole(&self) {
        let mut weather = self.weather.subscribe();
        if weather.borrow_and_update().black_hole {
            self.count(|counts| counts.held += 1);
            // An error would say that the sky is gone, and it is ours.
            let _ = weather.wait_for(|weather| !weather.black_hole).await;
        }
    }

    async fn delay(&self) {
        if let Some(delay) = self.weather().delay {
            self.count(|counts| counts.delayed += 1);
            sleep(delay).await;
            self.out_of_black_hole().await;
        }
    }
}

async fn accept(listener: TcpListener, target: Target, sky: Arc<Sky>, mut seeds: StdRng) {
    let mut connections = JoinSet::new();
    loop {
        let client = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((client, _)) = client else {
            // No file descriptor is free, or the client has gone: the next one may have more luck.
            sleep(Duration::from_millis(10)).await;
            continue;
        };
        if sky.weather().refuse {
            sky.count(|counts| counts.refused += 1);
            let _ = client.set_zero_linger();
            continue;
        }
        sky.count(|counts| counts.connections += 1);
        let luck = StdRng::seed_from_u64(seeds.random());
        connections.spawn(serve(client, target.clone(), sky.clone(), sky.resets.subscribe(), luck));
    }
}

/// Why a connection ended otherwise than by its client and server, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Broken,
    Reset,
    BeforeCommit,
    BeforeAnswer,
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Broken
    }
}

async fn serve(mut client: TcpStream, target: Target, sky: Arc<Sky>, mut resets: watch::Receiver<()>, luck: StdRng) {
    let end = tokio::select! {
        _ = resets.changed() => Err(End::Reset),
        end = connect(&mut client, target, &sky, luck) => end,
    };
    let Err(end) = end else { return };
    sky.count(|counts| match end {
        End::Broken => {}
        End::Reset => counts.resets += 1,
        End::BeforeCommit => counts.cuts_before_commit += 1,
        End::BeforeAnswer => counts.cuts_before_answer += 1,
    });
    let _ = client.set_zero_linger();
}

async fn connect(client: &mut TcpStream, target: Target, sky: &Sky, luck: StdRng) -> Result<(), End> {
    client.set_nodelay(true)?;
    let Some(greeting) = greeting(client, sky).await? else { return Ok(()) };
    match target {
        Target::Unix(path) => pass_on(client, UnixStream::connect(path).await?, greeting, sky, luck).await,
        Target::Tcp(address) => {
            let server = TcpStream::connect(address).await?;
            server.set_nodelay(true)?;
            pass_on(client, server, greeting, sky, luck).await
        }
    }
}

/// Reads up to the message that opens a session, and what came with it; nothing when the client leaves before.
async fn greeting(client: &mut TcpStream, sky: &Sky) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = Vec::new();
    loop {
        match opening(&buffer)? {
            Opening::Session(_) => return Ok(Some(buffer)),
            Opening::Encrypt(length) => {
                client.write_all(b"N").await?;
                buffer.drain(..length);
            }
            Opening::Partial => {
                buffer.reserve(READ);
                if client.read_buf(&mut buffer).await? == 0 {
                    return Ok(None);
                }
                sky.out_of_black_hole().await;
            }
        }
    }
}

async fn pass_on<S>(client: &mut TcpStream, server: S, greeting: Vec<u8>, sky: &Sky, luck: StdRng) -> Result<(), End>
where
    S: AsyncRead + AsyncWrite,
{
    let (from_client, to_client) = client.split();
    let (from_server, mut to_server) = split(server);
    let Opening::Session(length) = opening(&greeting)? else { return Err(End::Broken) };
    sky.delay().await;
    to_server.write_all(&greeting[..length]).await?;
    let requests = greeting[length..].to_vec();
    let connection = Mutex::new(Connection { session: Session::new(), luck, held: Vec::new() });
    let asking = pump(from_client, to_server, requests, sky, |requests| {
        connection.lock().unwrap().judge_requests(requests, sky.weather())
    });
    let answering =
        pump(from_server, to_client, Vec::new(), sky, |answers| connection.lock().unwrap().judge_answers(answers, sky));
    tokio::try_join!(asking, answering).map(|_| ())
}

/// Passes on what `judge` takes from the buffer, batch after batch, and the end of one side to the other.
async fn pump<R, W>(
    mut from: R,
    mut to: W,
    mut buffer: Vec<u8>,
    sky: &Sky,
    judge: impl Fn(&mut Vec<u8>) -> io::Result<Judged>,
) -> Result<(), End>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    loop {
        let judged = judge(&mut buffer)?;
        if !judged.passed.is_empty() {
            sky.delay().await;
            to.write_all(&judged.passed).await?;
        }
        if let Some(end) = judged.end {
            return Err(end);
        }
        buffer.reserve(READ);
        let length = from.read_buf(&mut buffer).await?;
        sky.out_of_black_hole().await;
        if length == 0 {
            to.shutdown().await?;
            return Ok(());
        }
    }
}

/// What becomes of a batch.
#[derive(Default)]
struct Judged {
    passed: Vec<u8>,
    end: Option<End>,
}

/// One connection in its session.
struct Connection {
    session: Session,
    luck: StdRng,
    /// The answers to a write, until it is known to be committed.
    held: Vec<u8>,
}

impl Connection {
    fn judge_requests(&mut self, buffer: &mut Vec<u8>, weather: Weather) -> io::Result<Judged> {
        let mut judged = Judged::default();
        let frames = frames(buffer)?;
        let reset = self.reset_at(frames.len(), weather);
        let mut used = 0;
        for (at, frame) in frames.into_iter().enumerate() {
            if reset == Some(at) {
                judged.end = Some(End::Reset);
                break;
            }
            if self.session.request(&frame) && self.happens(weather.cut_before_commit_per_mille) {
                judged.end = Some(End::BeforeCommit);
                break;
            }
            used += frame.bytes.len();
        }
        judged.passed.extend(buffer.drain(..used));
        Ok(judged)
    }

    fn judge_answers(&mut self, buffer: &mut Vec<u8>, sky: &Sky) -> io::Result<Judged> {
        let weather = sky.weather();
        let mut judged = Judged::default();
        let frames = frames(buffer)?;
        let reset = self.reset_at(frames.len(), weather);
        let mut used = 0;
        for (at, frame) in frames.into_iter().enumerate() {
            if reset == Some(at) {
                judged.end = Some(End::Reset);
                break;
            }
            used += frame.bytes.len();
            // The server may say that a statement is complete before it commits: only the last answer proves a commit.
            let may_be_lost = weather.cut_before_answer_per_mille > 0 && self.session.is_about_commit();
            let hold = may_be_lost || !self.held.is_empty();
            let to = if hold { &mut self.held } else { &mut judged.passed };
            to.extend(frame.bytes);
            let Answer::Last { committed } = self.session.answer(&frame) else { continue };
            if committed && hold && self.happens(weather.cut_before_answer_per_mille) {
                judged.end = Some(End::BeforeAnswer);
                break;
            }
            sky.count(|counts| counts.commits += u64::from(committed));
            judged.passed.append(&mut self.held);
        }
        buffer.drain(..used);
        Ok(judged)
    }

    /// The message of a batch at which its connection is reset, if it is.
    fn reset_at(&mut self, frames: usize, weather: Weather) -> Option<usize> {
        (frames > 0 && self.happens(weather.reset_per_mille)).then(|| self.luck.random_range(0..frames))
    }

    fn happens(&mut self, per_mille: u16) -> bool {
        self.luck.random_ratio(u32::from(per_mille.min(1000)), 1000)
    }
}
