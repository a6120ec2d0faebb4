//! The log of one attempt: bounded, whatever is written to it.

use tokio::sync::mpsc;

use crate::domain::run::{LogChunk, Stream};

/// The log's receiver and what it may still be sent.
pub(super) struct Log {
    receiver: Option<mpsc::Sender<LogChunk>>,
    limit: u64,
    left: u64,
    is_cut: bool,
}

impl Log {
    /// A log of at most `limit` bytes. What the executor itself says (`System`) does not count.
    pub(super) fn new(receiver: mpsc::Sender<LogChunk>, limit: u64) -> Log {
        Log { receiver: Some(receiver), limit, left: limit, is_cut: false }
    }

    /// Whether what is sent from now on is dropped, but for what the executor says.
    pub(super) fn is_deaf(&self) -> bool {
        self.receiver.is_none() || self.is_cut
    }

    /// Sends it, as far as there is room. Waits while the receiver is full.
    pub(super) async fn send(&mut self, stream: Stream, mut text: String) {
        if stream == Stream::System {
            return self.deliver(stream, text).await;
        }
        if self.is_deaf() {
            return;
        }
        let size = text.len() as u64;
        if size <= self.left {
            self.left -= size;
            return self.deliver(stream, text).await;
        }
        self.is_cut = true;
        text.truncate(text.floor_char_boundary(usize::try_from(self.left).unwrap_or(usize::MAX)));
        if !text.is_empty() {
            self.deliver(stream, text).await;
        }
        self.deliver(Stream::System, format!("log truncated after {} bytes\n", self.limit)).await;
    }

    /// Drops all that is sent from now on.
    pub(super) fn close(&mut self) {
        self.receiver = None;
    }

    async fn deliver(&mut self, stream: Stream, text: String) {
        let Some(receiver) = &self.receiver else { return };
        if receiver.send(LogChunk { stream, text }).await.is_err() {
            self.close();
        }
    }
}
