//! What a server answers: its text becomes the log, its status the verdict, and a JSON object the output.

use std::time::{Duration, SystemTime};

use reqwest::Response;
use reqwest::header::{DATE, HeaderMap, LOCATION, RETRY_AFTER};
use serde_json::Value;
use tokio::time::{Instant, sleep_until, timeout};

use super::client::root_cause;
use super::failed;
use crate::domain::outcome::{Outcome, Verdict};
use crate::domain::run::Stream;
use crate::executor::log::Log;
use crate::executor::output::object;
use crate::executor::text::Text;

/// Bytes of a refusal that the run's `error` quotes.
const QUOTED_BYTES: usize = 300;
/// How long the text of a 202 is waited for: the run is no longer ours.
const HANDED_OVER_PATIENCE: Duration = Duration::from_secs(1);
/// The longest that a server can put off the next attempt.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Reads the answer to its end, even when it is far longer than what is kept: as long as the server speaks it is at work.
pub(super) async fn conclude(response: Response, log: &mut Log, output_bytes: usize) -> Outcome {
    let status = response.status();
    let mut body = Vec::new();
    if status.is_success() {
        return match keep(response, log, &mut body, output_bytes.saturating_add(1)).await {
            Ok(()) => Outcome { output: output(&body, log, output_bytes).await, ..Outcome::of(Verdict::Succeeded) },
            Err(error) => failed(format!("the answer ({status}) broke off: {}", root_cause(&error))),
        };
    }
    let retry_after = retry_after(response.headers());
    let hint = redirect_hint(&response);
    // An answer that breaks off is an answer still: the status is known.
    let _ = keep(response, log, &mut body, QUOTED_BYTES).await;
    let quoted = quoted(&body);
    Outcome { retry_after, ..failed(format!("answered {status}{hint}{quoted}")) }
}

/// Notes a 202, with the beginning of its text: one piece, for the log's other pieces are numbered by the server.
pub(super) async fn remark(mut response: Response, log: &mut Log) {
    let status = response.status();
    let mut body = Vec::new();
    // Whether the text comes to its end says nothing about the run.
    let _ = timeout(HANDED_OVER_PATIENCE, async {
        while let Ok(Some(bytes)) = response.chunk().await
            && body.len() < QUOTED_BYTES
        {
            body.extend_from_slice(&bytes);
        }
    })
    .await;
    let quoted = quoted(&body);
    log.send(Stream::System, format!("answered {status}{quoted}\n")).await;
}

/// Sends the answer to the log, and keeps its beginning, up to `most` bytes of it.
pub(super) async fn keep(
    mut response: Response,
    log: &mut Log,
    kept: &mut Vec<u8>,
    most: usize,
) -> Result<(), reqwest::Error> {
    log.send(Stream::System, format!("answered {}\n", response.status())).await;
    let mut text = Text::default();
    let end = loop {
        let due = text.due;
        tokio::select! {
            chunk = response.chunk() => match chunk {
                Ok(Some(bytes)) => {
                    kept.extend_from_slice(&bytes[..bytes.len().min(most - kept.len())]);
                    if !log.is_deaf() {
                        text.push(&bytes);
                        flush(&mut text, log, false).await;
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            },
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => flush(&mut text, log, true).await,
        }
    };
    text.end();
    flush(&mut text, log, true).await;
    end
}

async fn flush(text: &mut Text, log: &mut Log, unfinished: bool) {
    while let Some(piece) = text.take(unfinished) {
        log.send(Stream::Stdout, piece).await;
    }
}

async fn output(body: &[u8], log: &mut Log, output_bytes: usize) -> Option<Value> {
    let remark = if body.len() > output_bytes {
        format!("the answer has more than {output_bytes} bytes and is not kept as output\n")
    } else if body.trim_ascii().is_empty() {
        return None;
    } else if let Some(object) = object(body) {
        return Some(object);
    } else {
        "the answer is no JSON object and is not kept as output\n".to_owned()
    };
    log.send(Stream::System, remark).await;
    None
}

/// What to do about a redirect that was not followed.
fn redirect_hint(response: &Response) -> String {
    if !response.status().is_redirection() {
        return String::new();
    }
    let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
    let to = location.map_or(String::new(), |location| format!(" to {}", one_line(location.as_bytes())));
    format!(
        "{to}, which is not followed: give the final address in executor.url (SINGLETRACK_HTTP_REDIRECTS lets workers follow \
         307 and 308)"
    )
}

/// How long the server wants to be left alone, in either form of the header. A date is compared with the server's own, so
/// that nobody's clock has to be right.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let date = |name| text(name).and_then(|date| httpdate::parse_http_date(date).ok());
    let wait = match text(RETRY_AFTER)? {
        seconds if !seconds.is_empty() && seconds.bytes().all(|byte| byte.is_ascii_digit()) => {
            Duration::from_secs(seconds.parse().unwrap_or(u64::MAX))
        }
        _ => {
            let now = date(DATE).unwrap_or_else(SystemTime::now);
            date(RETRY_AFTER)?.duration_since(now).unwrap_or_default()
        }
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

/// What an answer says, to be put behind its status.
fn quoted(body: &[u8]) -> String {
    let line = one_line(body);
    if line.is_empty() { line } else { format!(": {line}") }
}

/// The beginning of a text as one line that a person can read.
fn one_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(QUOTED_BYTES)]);
    let words: Vec<&str> =
        text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|it| !it.is_empty()).collect();
    words.join(" ")
}
