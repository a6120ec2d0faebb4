//! What worker and guard tell each other: a line of JSON each, over a socket.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::domain::executor::Limits;
use crate::executor::boottime::Boottime;
use crate::executor::command::exit::Exit;

/// Worker to guard.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::executor::command) enum Order {
    /// The first one, once.
    Start(Box<Start>),
    /// The lease is good until then.
    Renewed(Boottime),
    /// End the run: TERM, the grace, KILL.
    Stop,
    /// End the run at once.
    Kill,
}

/// What to start, and until when.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::executor::command) struct Start {
    pub(in crate::executor::command) argv: Vec<String>,
    pub(in crate::executor::command) cwd: Option<String>,
    /// Its whole environment; of a name given twice the last one counts.
    pub(in crate::executor::command) env: Vec<(String, OsString)>,
    pub(in crate::executor::command) user: Option<String>,
    pub(in crate::executor::command) limits: Limits,
    /// Unless renewed: nothing is started after it, and what runs is stopped.
    pub(in crate::executor::command) end_by: Boottime,
    /// Between TERM and KILL.
    pub(in crate::executor::command) grace: Duration,
}

/// Guard to worker.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::executor::command) enum Report {
    Started {
        /// Whether in a PID namespace of its own.
        namespace: bool,
    },
    /// It was not, and why; the last report.
    CannotStart(String),
    /// It was not: `end_by` had passed. The last report.
    TooLate,
    /// Nothing of the run is left; the last report.
    Ended {
        /// How the command itself ended.
        exit: Exit,
        /// Whether it was made to: by an order, or because `end_by` had passed.
        stopped: bool,
    },
}

/// As it goes over the socket.
pub(in crate::executor::command) fn line(message: &impl Serialize) -> Vec<u8> {
    // Nothing here has a key that is no string, the one thing that could fail.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// The guard's end of the socket.
pub(super) struct Control {
    socket: UnixStream,
    received: Vec<u8>,
    /// So much of it has no line's end.
    searched: usize,
}

impl Control {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, received: Vec::new(), searched: 0 }
    }

    /// Tells the worker. Where it is gone, the next order is an error.
    pub(super) fn report(&mut self, report: &Report) {
        let _ = self.socket.write_all(&line(report));
    }

    /// The next order; waits for it unless `poll` says that there is something to read. An error: there will be none.
    pub(super) fn order(&mut self) -> io::Result<Order> {
        loop {
            if let Some(order) = self.received_order() {
                return order;
            }
            self.receive()?;
        }
    }

    /// Takes in what is there, or waits until something is.
    pub(super) fn receive(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        match self.socket.read(&mut buffer) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.received.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The first order that is received whole.
    pub(super) fn received_order(&mut self) -> Option<io::Result<Order>> {
        let searched = std::mem::replace(&mut self.searched, self.received.len());
        let end = searched + self.received[searched..].iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.received.drain(..=end).collect();
        self.searched = 0;
        Some(serde_json::from_slice(&line).map_err(io::Error::from))
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
