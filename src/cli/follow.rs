//! Server-sent events of the service, as long as somebody wants them: whoever loses the connection comes back for the rest.

use std::time::Duration;

use reqwest::Response;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::client::{Client, Failure};
use super::output::tell;

/// Silence after which the other end is taken for gone: it says something every 15 seconds.
const SILENCE: Duration = Duration::from_secs(45);
/// Time until the next try.
const AGAIN: Duration = Duration::from_secs(1);

/// One event.
pub(super) struct Event {
    pub(super) name: String,
    pub(super) data: Value,
}

/// A stream at `path`, without gaps.
pub(super) struct Stream<'a> {
    client: &'a Client,
    path: String,
    query: Vec<(&'static str, String)>,
    open: Option<Response>,
    unread: Vec<u8>,
    /// The last event that was read.
    last: Option<String>,
    was_open: bool,
    complained: bool,
}

impl<'a> Stream<'a> {
    /// Nothing is sent yet.
    pub(super) fn new(client: &'a Client, path: String, query: Vec<(&'static str, String)>) -> Self {
        Self { client, path, query, open: None, unread: Vec::new(), last: None, was_open: false, complained: false }
    }

    /// The next event; `None` when the service says that there will be no other.
    ///
    /// # Errors
    /// When the service can't be reached at first, and when it refuses. Once it was reached, it is waited for.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(event) = self.take() {
                match event.name.as_str() {
                    "end" => return Ok(None),
                    // We were too slow: the rest is had by coming back.
                    "dropped" => self.open = None,
                    _ => return Ok(Some(event)),
                }
            }
            let Some(response) = &mut self.open else {
                match self.client.open(&self.path, &self.query, self.last.as_deref()).await {
                    Ok(None) => return Ok(None),
                    Ok(Some(response)) => {
                        (self.open, self.was_open, self.complained) = (Some(response), true, false);
                        self.unread.clear();
                    }
                    Err(Failure::Unreached(why) | Failure::NoAnswer(why)) if self.was_open => {
                        self.complain(&why);
                        sleep(AGAIN).await;
                    }
                    Err(failure) => return Err(failure),
                }
                continue;
            };
            match timeout(SILENCE, response.chunk()).await {
                Ok(Ok(Some(chunk))) => self.unread.extend_from_slice(&chunk),
                // The replica stops, or the connection is lost: another one may be there.
                _ => {
                    self.open = None;
                    sleep(AGAIN).await;
                }
            }
        }
    }

    fn complain(&mut self, why: &str) {
        if !std::mem::replace(&mut self.complained, true) {
            tell(format_args!("singletrack: {why} Trying again."));
        }
    }

    /// The next event of those that were received; comments are none, but their id counts.
    fn take(&mut self) -> Option<Event> {
        loop {
            let end = self.unread.windows(2).position(|pair| pair == b"\n\n")?;
            let block: Vec<u8> = self.unread.drain(..end + 2).collect();
            let (mut name, mut data) = (String::new(), None);
            for line in String::from_utf8_lossy(&block).lines() {
                match line.split_once(": ") {
                    Some(("id", id)) => self.last = Some(id.to_owned()),
                    Some(("event", given)) => given.clone_into(&mut name),
                    Some(("data", given)) => data = serde_json::from_str(given).ok(),
                    _ => {}
                }
            }
            if let Some(data) = data {
                return Some(Event { name, data });
            }
        }
    }
}
