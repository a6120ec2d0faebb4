//! How an attempt ends before its answer does.

use std::fs;

use super::*;

#[tokio::test]
async fn a_server_that_never_answers_is_left_at_the_time_limit() {
    let server = Server::new(|stream| async move {
        let _held = stream;
        std::future::pending().await
    })
    .await;
    let mut bench = to(server.url());
    bench.time_limit = Duration::from_millis(300);
    let seen = bench.run().await;
    assert_eq!((seen.verdict(), seen.outcome().reason.as_deref()), (Verdict::TimedOut, Some("timeout")));
    assert_eq!(seen.error(), "ran longer than its time limit of 0.3 s");
    assert!(seen.took >= bench.time_limit && seen.took < SOON, "{:?}", seen.took);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn a_server_that_takes_no_connection_is_left_at_the_time_limit() {
    // Nobody accepts, and the queue of one is taken: the connection is never made.
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let listener = socket.listen(0).expect("a queue");
    let address = listener.local_addr().expect("an address");
    let _waiting = TcpStream::connect(address).await.expect("the first in the queue");
    let mut bench = to(format!("http://{address}/"));
    bench.time_limit = Duration::from_millis(300);
    let seen = bench.run().await;
    assert_eq!(seen.verdict(), Verdict::TimedOut, "{}", seen.error());
    assert!(seen.took < SOON, "{:?}", seen.took);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endless_answer_neither_outlives_the_time_limit_nor_grows() {
    let sent = Arc::new(Mutex::new(0));
    let count = Arc::clone(&sent);
    let server = Server::new(move |mut stream| {
        let sent = Arc::clone(&count);
        async move {
            let mut piece = ENDLESS.to_vec();
            while stream.write_all(&piece).await.is_ok() {
                piece = vec![b'x'; 1 << 20];
                *sent.lock().expect("whole") += 1;
            }
        }
    })
    .await;
    let mut bench = to(server.url());
    (bench.time_limit, bench.log_bytes) = (Duration::from_secs(2), 100_000);
    let before = peak_memory();
    let seen = bench.run().await;
    let grown = peak_memory().saturating_sub(before);
    assert_eq!(seen.verdict(), Verdict::TimedOut);
    assert!(seen.took < SOON, "{:?}", seen.took);
    assert!(seen.text(Stream::Stdout) == "x".repeat(100_000));
    let sent = *sent.lock().expect("whole");
    assert!(sent > 100, "only {sent} MiB were read");
    assert!(grown < 50_000, "{grown} KiB more memory for {sent} MiB");
}

fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

#[tokio::test]
async fn a_drip_does_not_put_the_time_limit_off() {
    let server = Server::new(|mut stream| async move {
        let mut piece = ENDLESS;
        while stream.write_all(piece).await.is_ok() {
            piece = b".";
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let mut bench = to(server.url());
    bench.time_limit = Duration::from_millis(500);
    let seen = bench.run().await;
    assert_eq!(seen.verdict(), Verdict::TimedOut);
    assert!(seen.took < SOON, "{:?}", seen.took);
    assert!(seen.text(Stream::Stdout).starts_with(".."));
}

#[tokio::test]
async fn a_stop_closes_the_connection_and_says_why() {
    for (cause, verdict, reason) in [
        (StopCause::Cancel, Verdict::Cancelled, "requested"),
        (StopCause::Shutdown, Verdict::Stale, "shutdown"),
        (StopCause::Unrenewed, Verdict::Stale, "worker_lost"),
        (StopCause::LeaseLost, Verdict::Stale, "worker_lost"),
    ] {
        for first in ["", "HTTP/1.1 200 OK\r\n\r\nworking\n"] {
            let (closed, mut is_closed) = mpsc::channel(1);
            let (arrived, mut has_arrived) = mpsc::channel(1);
            let server = Server::new(move |mut stream| {
                let (closed, arrived) = (closed.clone(), arrived.clone());
                async move {
                    stream.write_all(first.as_bytes()).await.expect("the client reads");
                    arrived.send(()).await.expect("the test waits");
                    let rest = stream.read(&mut [0; 16]).await;
                    closed.send(matches!(rest, Ok(0) | Err(_))).await.expect("the test waits");
                }
            })
            .await;
            let bench = to(server.url());
            let (log, mut chunks) = mpsc::channel::<LogChunk>(64);
            let (stopper, stop) = watch::channel(None);
            let stopping = async {
                has_arrived.recv().await.expect("the request");
                if !first.is_empty() {
                    while chunks.recv().await.expect("the answer").stream == Stream::System {}
                }
                stopper.send(Some(cause)).expect("the attempt listens");
            };
            let attempt = tokio::time::timeout(SOON, bench.attempt(log, stop));
            let (answer, ()) = tokio::join!(attempt, stopping);
            let Ok(Answer::Ended(outcome)) = answer else { panic!("{cause:?}: {answer:?}") };
            assert_eq!((outcome.verdict, outcome.reason.as_deref()), (verdict, Some(reason)));
            let is_closed = tokio::time::timeout(SOON, is_closed.recv()).await;
            assert_eq!(is_closed, Ok(Some(true)), "{cause:?}: the server sees the end");
        }
    }
}

#[tokio::test]
async fn an_attempt_stopped_before_it_begins_sends_nothing() {
    let server = Server::answering(answer("200 OK", &[], "")).await;
    let (log, _chunks) = mpsc::channel(1);
    let (_stopper, stop) = watch::channel(Some(StopCause::Cancel));
    // Not even the question whether it may begin is asked, of which the answer would be another verdict.
    let answer = Bench { may_start: false, ..to(server.url()) }.attempt(log, stop).await;
    assert!(matches!(answer, Answer::Ended(Outcome { verdict: Verdict::Cancelled, .. })), "{answer:?}");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn a_log_that_nobody_reads_delays_no_stop() {
    let server = Server::answering(answer("200 OK", &[], &"line\n".repeat(100_000))).await;
    let mut bench = to(server.url());
    bench.time_limit = Duration::from_millis(500);
    let (log, _chunks) = mpsc::channel(1);
    let (_stopper, stop) = watch::channel(None);
    let answer = tokio::time::timeout(SOON, bench.attempt(log, stop)).await;
    let Ok(Answer::Ended(outcome)) = answer else { panic!("{answer:?}") };
    assert_eq!(outcome.verdict, Verdict::TimedOut);
}
