//! How many files may be open: as many for the service as it is allowed, and for commands what the service was given.

use std::io;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What it was given, where that was raised.
static GIVEN: OnceLock<Rlimit> = OnceLock::new();

/// Raises the limit of this process as far as it may. Most shells give 1024, for the sake of programs that use `select`: each connection
/// is one.
pub fn raise() {
    let given = getrlimit(Resource::Nofile);
    // Where that is refused, what was given has to do.
    if setrlimit(Resource::Nofile, Rlimit { current: given.maximum, ..given }).is_ok() {
        let _ = GIVEN.set(given); // the first time counts
    }
}

/// Goes back to what was given, in a process that is about to become another program: one system call.
pub(super) fn restore() -> io::Result<()> {
    match GIVEN.get() {
        Some(given) => Ok(setrlimit(Resource::Nofile, *given)?),
        None => Ok(()),
    }
}
