//! The protocol between a client and Postgres (version 3), as far as it takes to know which message commits a write, and which
//! answer says that it has.
//!
//! It follows the simple and the extended protocol with any pipelining. It does not know COPY, replication, and what is
//! encrypted; nor, of a text with several transactions in it, that the first one committed and the second one failed.

use std::collections::{HashMap, VecDeque};
use std::io;

use super::statements::{Kind, kinds};

/// How long the message may be that opens a connection; the server's own limit.
const OPENING: usize = 10_000;
const ENCRYPT_BY_TLS: u32 = 80_877_103;
const ENCRYPT_BY_GSS: u32 = 80_877_104;

/// One message.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    kind: u8,
    body: &'a [u8],
    /// All of it, as it is on the wire.
    pub bytes: &'a [u8],
}

/// The whole messages that a buffer begins with.
///
/// # Errors
/// What is there is no message.
pub fn frames(mut buffer: &[u8]) -> io::Result<Vec<Frame<'_>>> {
    let mut frames = Vec::new();
    while let Some((&kind, rest)) = buffer.split_first() {
        let Some(length) = whole(rest, usize::MAX)? else { break };
        frames.push(Frame { kind, body: &rest[4..length], bytes: &buffer[..=length] });
        buffer = &rest[length..];
    }
    Ok(frames)
}

/// The message that opens a connection, without the byte that says of the others what they are.
#[derive(Debug, PartialEq, Eq)]
pub enum Opening {
    /// More has to be read.
    Partial,
    /// A request for encryption, of that many bytes; the client waits for one byte that answers it.
    Encrypt(usize),
    /// A session begins, or somebody else's statement is to be cancelled.
    Session(usize),
}

/// What a connection begins with.
///
/// # Errors
/// What is there is no such message.
pub fn opening(buffer: &[u8]) -> io::Result<Opening> {
    let Some(length) = whole(buffer, OPENING)? else { return Ok(Opening::Partial) };
    Ok(match number(&buffer[4..length]) {
        Some(ENCRYPT_BY_TLS | ENCRYPT_BY_GSS) => Opening::Encrypt(length),
        _ => Opening::Session(length),
    })
}

/// The length of a message, which is what it begins with and counts itself, once it is whole.
fn whole(buffer: &[u8], limit: usize) -> io::Result<Option<usize>> {
    let Some(length) = number(buffer) else { return Ok(None) };
    let length = length as usize;
    if !(4..=limit).contains(&length) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "that is not the protocol of Postgres"));
    }
    Ok((buffer.len() >= length).then_some(length))
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// Splits off a text that a zero byte ends.
fn text(body: &[u8]) -> (&[u8], &[u8]) {
    let end = body.iter().position(|byte| *byte == 0).unwrap_or(body.len());
    (&body[..end], body.get(end + 1..).unwrap_or_default())
}

/// What an answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// There is more to come.
    Partial,
    /// It ends the answers to a request.
    Last {
        /// The request has committed a write, and one that found rows to write.
        committed: bool,
    },
}

/// What is known of one connection: both directions tell it of each message, in order, as it is passed on.
#[derive(Debug)]
pub struct Session {
    statements: HashMap<Vec<u8>, Kind>,
    portals: HashMap<Vec<u8>, Kind>,
    in_transaction: bool,
    /// Something was written that is not committed.
    wrote: bool,
    /// The request under way, not yet ended by its client, would commit a write.
    commits: bool,
    /// A request is under way.
    open: bool,
    /// The requests not yet answered: whether they commit a write.
    unanswered: VecDeque<bool>,
    failed: bool,
    effect: bool,
}

impl Session {
    /// A connection whose opening message is passed on.
    pub fn new() -> Self {
        Self {
            statements: HashMap::new(),
            portals: HashMap::new(),
            in_transaction: false,
            wrote: false,
            commits: false,
            open: false,
            // The server's greeting ends as every answer does.
            unanswered: VecDeque::from([false]),
            failed: false,
            effect: false,
        }
    }

    /// Takes note of a message of the client. Whether this one has a write committed: without it nothing would be.
    pub fn request(&mut self, frame: &Frame<'_>) -> bool {
        let (first, rest) = text(frame.body);
        self.open = true;
        let commits = match frame.kind {
            b'Q' => {
                let commits = kinds(first).into_iter().fold(false, |commits, kind| self.execute(kind) | commits);
                commits | self.end()
            }
            b'P' => {
                let kind = kinds(text(rest).0).first().copied().unwrap_or(Kind::Read);
                self.statements.insert(first.to_vec(), kind);
                false
            }
            b'B' => {
                let kind = self.statements.get(text(rest).0).copied().unwrap_or(Kind::Read);
                self.portals.insert(first.to_vec(), kind);
                false
            }
            b'E' => {
                let kind = self.portals.get(first).copied().unwrap_or(Kind::Read);
                self.execute(kind)
            }
            b'C' => {
                self.close(frame.body);
                false
            }
            b'S' => self.end(),
            _ => false,
        };
        self.commits |= commits;
        if matches!(frame.kind, b'Q' | b'S' | b'F') {
            self.unanswered.push_back(std::mem::take(&mut self.commits));
            self.open = false;
        }
        commits
    }

    /// Whether what the server says next is about a request that commits a write, and that was passed on to its end.
    pub fn is_about_commit(&self) -> bool {
        self.unanswered.front() == Some(&true)
    }

    /// Takes note of a message of the server.
    pub fn answer(&mut self, frame: &Frame<'_>) -> Answer {
        match frame.kind {
            b'E' => self.failed = true,
            b'C' => self.effect |= has_effect(text(frame.body).0),
            b'Z' => {
                let commits = self.unanswered.pop_front().unwrap_or(false);
                let idle = frame.body == b"I";
                if self.unanswered.is_empty() && !self.open {
                    // Nothing is on its way that the server does not know of.
                    self.in_transaction = !idle;
                    self.wrote &= !idle;
                }
                let failed = std::mem::take(&mut self.failed);
                let effect = std::mem::take(&mut self.effect);
                return Answer::Last { committed: commits && effect && !failed && idle };
            }
            _ => {}
        }
        Answer::Partial
    }

    fn execute(&mut self, kind: Kind) -> bool {
        match kind {
            Kind::Read => {}
            Kind::Write => self.wrote = true,
            Kind::Begin => self.in_transaction = true,
            Kind::Commit | Kind::Rollback => {
                self.in_transaction = false;
                return std::mem::take(&mut self.wrote) && kind == Kind::Commit;
            }
        }
        false
    }

    /// The end of a request, which commits what is in no transaction of its own.
    fn end(&mut self) -> bool {
        !self.in_transaction && std::mem::take(&mut self.wrote)
    }

    fn close(&mut self, body: &[u8]) {
        let Some((what, name)) = body.split_first() else { return };
        let named = if *what == b'S' { &mut self.statements } else { &mut self.portals };
        named.remove(text(name).0);
    }
}

/// Whether a statement did something, by the tag that completes it: `UPDATE 0` has found nothing to do.
fn has_effect(tag: &[u8]) -> bool {
    let last = tag.rsplit(|byte| *byte == b' ').next().unwrap_or_default();
    tag != b"ROLLBACK" && last != b"0"
}
