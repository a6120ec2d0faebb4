//! A load generator that costs little, for it shares the machine with what it measures: requests are bytes made beforehand or
//! by a `format`, connections stay open, and nothing of an answer is looked at but its status and its length.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

/// Latencies in microseconds, to three digits.
pub type Latencies = Histogram<u64>;

pub fn latencies() -> Result<Latencies> {
    Ok(Histogram::new_with_bounds(1, 600_000_000, 3)?)
}

/// A percentile in milliseconds.
pub fn milliseconds(latencies: &Latencies, percentile: f64) -> f64 {
    latencies.value_at_percentile(percentile) as f64 / 1000.0
}

/// A connection that stays open.
pub struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
}

/// What was answered; the body is there until the next call.
pub struct Answer<'a> {
    pub status: u16,
    pub body: &'a [u8],
}

impl Connection {
    pub async fn open(address: &str) -> Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("can't connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, received: Vec::with_capacity(16 << 10) })
    }

    pub async fn call(&mut self, request: &[u8]) -> Result<Answer<'_>> {
        self.stream.write_all(request).await?;
        self.received.clear();
        let mut head = None;
        loop {
            if head.is_none() {
                head = read_head(&self.received)?;
            }
            if let Some((status, start, length)) = head
                && self.received.len() >= start + length
            {
                return Ok(Answer { status, body: &self.received[start..start + length] });
            }
            if self.stream.read_buf(&mut self.received).await? == 0 {
                bail!("the service closed a connection");
            }
        }
    }
}

/// Status, where the body begins, and how long it is; nothing while the head is not there as a whole.
fn read_head(received: &[u8]) -> Result<Option<(u16, usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut answer = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(start) = answer.parse(received)? else { return Ok(None) };
    let status = answer.code.context("an answer without a status")?;
    let length = answer.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length = length.context("an answer without a length")?;
    Ok(Some((status, start, std::str::from_utf8(length.value)?.parse()?)))
}

/// The bytes of a POST, at the end of `request`.
pub fn post(request: &mut Vec<u8>, path: &[&[u8]], body: &[u8]) {
    use std::io::Write as _;
    request.extend_from_slice(b"POST ");
    path.iter().for_each(|part| request.extend_from_slice(part));
    // Memory takes everything.
    let _ = write!(
        request,
        " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    request.extend_from_slice(body);
}

/// The bytes of a GET.
pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes()
}

/// Writes the next request.
pub type Next = Arc<dyn Fn(&mut Vec<u8>) + Send + Sync>;

/// What became of many requests.
pub struct Load {
    /// How many were answered with each status.
    pub answers: BTreeMap<u16, u64>,
    /// From the first request to the last answer.
    pub seconds: f64,
    pub latencies: Latencies,
}

impl Load {
    /// How many per second were answered with `status`; all of them should be.
    pub fn rate(&self, status: u16) -> Result<f64> {
        let good = self.answers.get(&status).copied().unwrap_or_default();
        if self.answers.len() != 1 || good == 0 {
            eprintln!("    not all answers were {status}: {:?}", self.answers);
        }
        if good == 0 {
            bail!("no request was answered with {status}");
        }
        Ok(good as f64 / self.seconds)
    }
}

/// Closed loop: each connection sends its next request when it has its answer. For rates.
pub async fn closed(address: &str, connections: usize, length: Duration, next: Next) -> Result<Load> {
    let mut open = Vec::with_capacity(connections);
    for _ in 0..connections {
        open.push(Connection::open(address).await?);
    }
    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    for mut connection in open {
        let next = next.clone();
        tasks.spawn(async move {
            let (mut answers, mut latencies, mut request) = (BTreeMap::new(), latencies()?, Vec::with_capacity(1024));
            while begin.elapsed() < length {
                request.clear();
                next(&mut request);
                let sent = Instant::now();
                let status = connection.call(&request).await?.status;
                latencies.saturating_record(micros(sent.elapsed()));
                *answers.entry(status).or_insert(0) += 1;
            }
            anyhow::Ok((answers, latencies))
        });
    }
    gather(tasks, begin).await
}

/// Open loop: requests are due at their times whatever becomes of those before them, and latency counts from then on.
pub async fn open(address: &str, connections: usize, rate: f64, length: Duration, next: Next) -> Result<Load> {
    let mut ready = Vec::with_capacity(connections);
    for _ in 0..connections {
        ready.push(Connection::open(address).await?);
    }
    let begin = Instant::now();
    let due = Arc::new(Mutex::new(pace(rate, (rate * length.as_secs_f64()) as u64)));
    let mut tasks = JoinSet::new();
    for mut connection in ready {
        let (next, due) = (next.clone(), due.clone());
        tasks.spawn(async move {
            let (mut answers, mut latencies, mut request) = (BTreeMap::new(), latencies()?, Vec::with_capacity(1024));
            loop {
                let Some(due) = due.lock().await.recv().await else { break };
                request.clear();
                next(&mut request);
                let status = connection.call(&request).await?.status;
                latencies.saturating_record(micros(due.elapsed()));
                *answers.entry(status).or_insert(0) += 1;
            }
            anyhow::Ok((answers, latencies))
        });
    }
    gather(tasks, begin).await
}

type Counted = Result<(BTreeMap<u16, u64>, Latencies)>;

async fn gather(mut tasks: JoinSet<Counted>, begin: Instant) -> Result<Load> {
    let mut load = Load { answers: BTreeMap::new(), seconds: 0.0, latencies: latencies()? };
    while let Some(done) = tasks.join_next().await {
        let (answers, latencies) = done??;
        load.latencies.add(latencies)?;
        answers.into_iter().for_each(|(status, count)| *load.answers.entry(status).or_default() += count);
    }
    load.seconds = begin.elapsed().as_secs_f64();
    Ok(load)
}

pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// When each of `count` requests is due, told at that time: by a thread of its own, for tokio's timers have a grain of a millisecond.
pub fn pace(rate: f64, count: u64) -> mpsc::UnboundedReceiver<Instant> {
    let (tell, told) = mpsc::unbounded_channel();
    let begin = Instant::now();
    std::thread::spawn(move || {
        for number in 0..count {
            let due = begin + Duration::from_secs_f64(number as f64 / rate);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if tell.send(due).is_err() {
                return;
            }
        }
    });
    told
}
