//! A client of server-sent events.

use reqwest::Method;
use serde_json::Value;
use tokio::time::timeout;

use super::calls::LIMIT;
use super::replica::Client;

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub id: String,
    pub name: String,
    pub data: Value,
}

/// A stream that is read event by event.
pub struct Stream {
    response: reqwest::Response,
    unread: String,
    /// The last id that was given, also by what is no event.
    pub last_id: String,
}

impl Stream {
    /// Opens the stream at `path`, after the event `last`.
    pub async fn open(client: &Client, path: &str, last: Option<&str>) -> Self {
        let mut request = client.request(Method::GET, path);
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        let response = timeout(LIMIT, request.send()).await.unwrap().unwrap();
        let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
        assert_eq!((response.status().as_u16(), kind.as_str()), (200, "text/event-stream"), "{path}");
        Self { response, unread: String::new(), last_id: String::new() }
    }

    /// The same, once the position it begins at was told.
    pub async fn begun(client: &Client, path: &str) -> Self {
        let mut stream = Self::open(client, path, None).await;
        while stream.last_id.is_empty() {
            let block = stream.block().await.expect("a stream that goes on");
            assert_eq!(stream.parse(&block), None, "{block}");
        }
        stream
    }

    /// The next event; none at the end.
    pub async fn next(&mut self) -> Option<Event> {
        timeout(LIMIT, async {
            loop {
                let block = self.block().await?;
                if let Some(event) = self.parse(&block) {
                    return Some(event);
                }
            }
        })
        .await
        .expect("an event, or the end, in time")
    }

    /// The next events.
    pub async fn some(&mut self, count: usize) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..count {
            events.push(self.next().await.unwrap_or_else(|| panic!("the end after {events:?}")));
        }
        events
    }

    /// Everything up to the end.
    pub async fn rest(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }

    async fn block(&mut self) -> Option<String> {
        loop {
            if let Some((block, rest)) = self.unread.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.unread = rest;
                return Some(block);
            }
            let chunk = self.response.chunk().await.ok().flatten()?;
            self.unread.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// What a block of lines says, as the standard has it: without data it is no event, but its id counts.
    fn parse(&mut self, block: &str) -> Option<Event> {
        let (mut name, mut data) = (String::new(), None);
        for line in block.lines() {
            match line.split_once(": ") {
                Some(("id", id)) => self.last_id = id.to_owned(),
                Some(("event", given)) => name = given.to_owned(),
                Some(("data", given)) => data = Some(serde_json::from_str(given).unwrap()),
                _ => {}
            }
        }
        data.map(|data| Event { id: self.last_id.clone(), name, data })
    }
}
