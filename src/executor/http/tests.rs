//! Each test speaks to a real server and holds the executor to one of its promises.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::RootCertStore;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use super::{Answer, Call, Client, run};
use crate::domain::executor::Http;
use crate::domain::outcome::{Outcome, Verdict};
use crate::domain::outgoing::{Allowed, Outgoing};
use crate::domain::run::{LogChunk, Run, StopCause, Stream};

/// For what must happen at once, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(8);

/// A server on this machine's loopback, and what it was sent: a text per connection.
struct Server {
    port: u16,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Takes each connection, reads one request, and lets `talk` answer it.
    async fn new<Talk: Future<Output = ()> + Send>(
        talk: impl Fn(TcpStream) -> Talk + Clone + Send + 'static,
    ) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (talk, seen) = (talk.clone(), Arc::clone(&seen));
                tokio::spawn(async move {
                    let request = read_request(&mut stream).await;
                    seen.lock().expect("whole").push(request);
                    talk(stream).await;
                });
            }
        });
        Server { port, requests }
    }

    /// Gives everybody the same answer.
    async fn answering(answer: impl Into<String>) -> Server {
        let answer: Arc<str> = answer.into().into();
        Server::new(move |mut stream| {
            let answer = Arc::clone(&answer);
            async move { stream.write_all(answer.as_bytes()).await.expect("the client reads") }
        })
        .await
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/hook", self.port)
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("whole").clone()
    }
}

/// Reads head and body of a request; less if the client sends less.
async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.map_or(0, |length| length.parse().expect("a number")) {
                return text;
            }
        }
        if !matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
            return text;
        }
    }
}

/// An answer with this status line, these headers and this body.
fn answer(status: &str, headers: &[&str], body: &str) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len())
}

/// The beginning of an answer without an end.
const ENDLESS: &[u8] = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";

struct Bench {
    http: Http,
    run: Run,
    outgoing: Outgoing,
    roots: Option<RootCertStore>,
    time_limit: Duration,
    log_bytes: u64,
    output_bytes: usize,
    may_start: bool,
}

struct Seen {
    answer: Answer,
    chunks: Vec<LogChunk>,
    took: Duration,
}

/// A request to `url`, with all of 127.0.0.1 allowed.
fn to(url: impl Into<String>) -> Bench {
    let run = json!({
        "id": "019a0000-0000-7000-8000-000000000001", "workflow_id": "deploy@prod", "definition": "deploy", "revision": 3,
        "status": "running", "executor_type": "http", "queue": "default", "priority": 0, "labels": {"team": "red"},
        "input": {"n": 1}, "on_conflict": "reject", "attempt": 2, "max_attempts": 4, "fence": 77,
        "created_at": "2026-01-01T00:00:00Z", "timeout_seconds": 600, "requested_by": "test",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    });
    Bench {
        http: Http { url: url.into(), method: None, headers: BTreeMap::new(), callback_timeout_seconds: None },
        run: serde_json::from_str(&run.to_string()).expect("a run"),
        outgoing: Outgoing { allowed: "127.0.0.1".parse().expect("an address"), ..Outgoing::default() },
        roots: None,
        time_limit: Duration::from_secs(60),
        log_bytes: 1 << 20,
        output_bytes: 4096,
        may_start: true,
    }
}

impl Bench {
    /// Only this is allowed besides public addresses.
    fn allowing(mut self, list: &str) -> Bench {
        self.outgoing.allowed = if list.is_empty() { Allowed::default() } else { list.parse().expect("a list") };
        self
    }

    fn client(&self) -> Client {
        let client = match &self.roots {
            Some(roots) => Client::trusting(roots.clone(), &self.outgoing),
            None => Client::new(&self.outgoing),
        };
        client.expect("a client")
    }

    async fn attempt(&self, log: mpsc::Sender<LogChunk>, stop: watch::Receiver<Option<StopCause>>) -> Answer {
        self.attempt_with(&self.client(), log, stop).await
    }

    async fn attempt_with(
        &self,
        client: &Client,
        log: mpsc::Sender<LogChunk>,
        stop: watch::Receiver<Option<StopCause>>,
    ) -> Answer {
        let call = Call {
            client,
            http: &self.http,
            run: &self.run,
            callback_url: "https://runs.example.com/api/v1/leases/finish",
            token: "secret",
            time_limit: self.time_limit,
            log_bytes: self.log_bytes,
            output_bytes: self.output_bytes,
            may_start: &|| self.may_start,
        };
        run(call, log, stop).await
    }

    async fn run(&self) -> Seen {
        self.run_and(|_, _| {}).await
    }

    /// Runs to the end, showing each chunk to `watcher`, who may stop the run.
    async fn run_and(&self, mut watcher: impl FnMut(&LogChunk, &watch::Sender<Option<StopCause>>)) -> Seen {
        let (log, mut chunks) = mpsc::channel(4);
        let (stopper, stop) = watch::channel(None);
        let began = Instant::now();
        let collect = async {
            let mut all = Vec::new();
            while let Some(chunk) = chunks.recv().await {
                watcher(&chunk, &stopper);
                all.push(chunk);
            }
            all
        };
        let attempt = async { (self.attempt(log, stop).await, began.elapsed()) };
        let ((answer, took), chunks) = tokio::join!(attempt, collect);
        Seen { answer, chunks, took }
    }
}

impl Seen {
    fn text(&self, stream: Stream) -> String {
        let same = self.chunks.iter().filter(|chunk| chunk.stream == stream);
        same.map(|chunk| chunk.text.as_str()).collect()
    }

    fn outcome(&self) -> &Outcome {
        match &self.answer {
            Answer::Ended(outcome) => outcome,
            Answer::HandedOver => panic!("handed over"),
        }
    }

    fn verdict(&self) -> Verdict {
        self.outcome().verdict
    }

    fn error(&self) -> &str {
        self.outcome().error.as_deref().unwrap_or("")
    }

    fn output(&self) -> Option<&Value> {
        self.outcome().output.as_ref()
    }
}

mod addresses;
mod answers;
mod ending;
mod requests;
