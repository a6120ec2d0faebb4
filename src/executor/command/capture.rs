//! Reads what a command prints: a bounded log, in the order of arrival, and the last line of standard output.
//! Memory stays flat whatever is printed.

use std::os::fd::AsFd;

use rustix::io::ioctl_fionread;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{ChildStderr, ChildStdout};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::domain::run::{LogChunk, Stream};
use crate::executor::log::Log;
use crate::executor::text::Text;

use super::Limits;
use super::output::{Found, LastLine};

const READ_BYTES: usize = 16 * 1024;

/// How far the command's end has come, told to those who serve its pipes.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub(super) enum Phase {
    Running,
    /// Nobody of the run is left: what is in the pipes now is all there will be.
    Draining,
    /// Nobody waits for the log any more.
    Abandoned,
}

/// Waits until the end has come that far.
pub(super) async fn reached(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    // What `wait_for` returns holds a lock, so it must not live on in a caller's `select!`. An error means that nobody
    // follows the command any more, which is as far as it can come.
    drop(phase.wait_for(|now| *now >= wanted).await);
}

/// Reads both pipes until they end, or the run has, and returns the run's output.
pub(super) async fn capture(
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    log: mpsc::Sender<LogChunk>,
    limits: Limits,
    mut phase: watch::Receiver<Phase>,
) -> Option<Value> {
    let mut sink = Sink { log: Log::new(log, limits.log_bytes), phase: phase.clone() };
    let mut out = Tap::new(stdout, Stream::Stdout);
    let mut err = Tap::new(stderr, Stream::Stderr);
    let mut last_line = LastLine::new(limits.output_bytes);
    while out.is_open() || err.is_open() {
        let flush_at = [out.text.due, err.text.due].into_iter().flatten().min();
        tokio::select! {
            read = out.read(), if out.is_open() => {
                last_line.push(out.received(read));
                out.log(read, &mut sink).await;
            }
            read = err.read(), if err.is_open() => err.log(read, &mut sink).await,
            () = sleep_until(flush_at.unwrap_or_else(Instant::now)), if flush_at.is_some() => {
                out.flush_due(&mut sink).await;
                err.flush_due(&mut sink).await;
            }
            () = reached(&mut phase, Phase::Draining) => break,
        }
    }
    out.drain_only();
    err.drain_only();
    while out.is_open() || err.is_open() {
        tokio::select! {
            // The run's output is in there, also when the log was given up long ago.
            biased;
            read = out.read(), if out.is_open() => {
                last_line.push(out.received(read));
                out.log(read, &mut sink).await;
            }
            read = err.read(), if err.is_open() => err.log(read, &mut sink).await,
            // Whoever opens the pipe through /proc can steal what was counted, so that it never comes.
            () = reached(&mut phase, Phase::Abandoned) => break,
        }
    }
    out.finish(&mut sink).await;
    err.finish(&mut sink).await;
    match last_line.found() {
        Found::Object(value) => Some(value),
        Found::Nothing => None,
        Found::TooLong => {
            let limit = limits.output_bytes;
            let text =
                format!("the last line of standard output has more than {limit} bytes and is not kept as output\n");
            sink.send(Stream::System, text).await;
            None
        }
    }
}

/// One pipe and the text read from it that is not in the log yet.
struct Tap<R> {
    pipe: Option<R>,
    /// What may still be read, once the run is gone.
    left: Option<usize>,
    buffer: Vec<u8>,
    text: Text,
    stream: Stream,
}

impl<R: AsyncRead + AsFd + Unpin> Tap<R> {
    fn new(pipe: Option<R>, stream: Stream) -> Tap<R> {
        Tap { pipe, left: None, buffer: vec![0; READ_BYTES], text: Text::default(), stream }
    }

    fn is_open(&self) -> bool {
        self.pipe.is_some() && self.left != Some(0)
    }

    /// Reads what there is; 0 at the end. An error is an end too.
    async fn read(&mut self) -> usize {
        let Some(pipe) = &mut self.pipe else { return 0 };
        let most = self.left.unwrap_or(READ_BYTES).min(READ_BYTES);
        pipe.read(&mut self.buffer[..most]).await.unwrap_or(0)
    }

    fn received(&self, read: usize) -> &[u8] {
        &self.buffer[..read]
    }

    async fn log(&mut self, read: usize, sink: &mut Sink) {
        if read == 0 {
            self.pipe = None;
        }
        if let Some(left) = &mut self.left {
            *left -= read;
        }
        if sink.log.is_deaf() {
            self.text = Text::default();
            return;
        }
        self.text.push(&self.buffer[..read]);
        while let Some(text) = self.text.take(false) {
            sink.send(self.stream, text).await;
        }
    }

    async fn flush_due(&mut self, sink: &mut Sink) {
        if self.text.due.is_some_and(|due| due <= Instant::now()) {
            self.flush(sink).await;
        }
    }

    async fn flush(&mut self, sink: &mut Sink) {
        while let Some(text) = self.text.take(true) {
            sink.send(self.stream, text).await;
        }
    }

    async fn finish(&mut self, sink: &mut Sink) {
        self.text.end();
        self.flush(sink).await;
    }

    /// From here on only what the run left in the pipe is read. No end of file is waited for: where the guard is off, or a
    /// pipe was handed to a stranger, somebody may hold it, and write to it, for ever.
    fn drain_only(&mut self) {
        if let Some(pipe) = &self.pipe {
            let waiting = ioctl_fionread(pipe).unwrap_or(0);
            self.left = Some(usize::try_from(waiting).unwrap_or(usize::MAX));
        }
    }
}

/// The log, for as long as somebody waits for it.
struct Sink {
    log: Log,
    phase: watch::Receiver<Phase>,
}

impl Sink {
    /// Waits while the log is full, which makes the command wait, but no longer than somebody waits for the log.
    async fn send(&mut self, stream: Stream, text: String) {
        tokio::select! {
            biased;
            () = self.log.send(stream, text) => {}
            () = reached(&mut self.phase, Phase::Abandoned) => {
                tracing::warn!("nobody read the end of a run's log in time, it is dropped");
                self.log.close();
            }
        }
    }
}
