//! A disk that is full, or slow: a library of ours (`disk.c`), loaded into a server before its C library.
//!
//! **Full** is what a file system says that has no block left: what would make a file of the data folder longer fails with ENOSPC,
//! as a whole; what is already there can be overwritten, and files can be made, as long as they stay empty. So inserts that find
//! room in a page go on, those that need a new page are refused (53100), and the next segment of the write-ahead log is a PANIC.
//! **Slow** is that each `fsync` and `fdatasync` takes so much longer; `fsync` stays on, and nothing is safe before that time is over.
//!
//! What it does not do: see what goes through stdio (statistics, `backup_label`) or is outside of the data folder (tablespaces, a
//! linked `pg_wal`, the server's log); refuse holes, directories, `copy_file_range`, and a statically linked server; slow down reads,
//! writes, and the `O_SYNC` of other values of `wal_sync_method`; lose what was not synced when the server crashes (the kernel lives
//! on), or tear pages. Linux with glibc only.

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Where in the file of `struct control` each of its numbers is.
const FULL: u64 = 0;
const SLOW_MS: u64 = 8;
const ATTACHED: u64 = 16;
const REFUSED: u64 = 24;
const SLOWED: u64 = 32;
const CONTROL: u64 = 40;

/// A disk that works until it is told otherwise.
#[derive(Debug)]
pub struct Disk {
    library: PathBuf,
    path: PathBuf,
    control: File,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Starts of a server on this disk, those of other programs that it ran included.
    pub attached: u64,
    /// Calls refused with ENOSPC.
    pub refused: u64,
    /// Calls that took longer.
    pub slowed: u64,
}

impl Disk {
    /// Compiles the library into a folder, which is made if it is missing. The account that the server runs under has to be able to
    /// enter it: not a plain `tempdir`. One folder for each disk.
    ///
    /// # Errors
    /// No Linux, no `cc`, or what it has to say.
    pub fn build(folder: &Path) -> io::Result<Self> {
        if !cfg!(target_os = "linux") {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "a disk that fails takes Linux"));
        }
        fs::create_dir_all(folder)?;
        let folder = fs::canonicalize(folder)?;
        let (library, path) = (folder.join("disk.so"), folder.join("disk.control"));
        for old in [&library, &path] {
            // Not written over: a server that was left behind may still have it mapped.
            let _ = fs::remove_file(old);
        }
        compile(&library)?;
        let control = File::options().read(true).write(true).create_new(true).open(&path)?;
        control.set_len(CONTROL)?;
        // Whatever the umask was: another account loads the one, and counts in the other.
        fs::set_permissions(&library, Permissions::from_mode(0o755))?;
        control.set_permissions(Permissions::from_mode(0o666))?;
        Ok(Self { library, path, control })
    }

    /// The environment of a server on this disk.
    pub fn env(&self) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        vec![("LD_PRELOAD".into(), text(&self.library)), ("FAULT_DISK".into(), text(&self.path))]
    }

    /// From now on no file grows.
    ///
    /// # Panics
    /// No server was started on it: the dynamic linker only warns of a library that it cannot load.
    pub fn fill(&self) {
        self.set(FULL, 1);
    }

    /// From now on each sync, those under way included, takes that much longer; in milliseconds, rounded down.
    ///
    /// # Panics
    /// As [`Disk::fill`].
    pub fn slow(&self, by: Duration) {
        self.set(SLOW_MS, u64::try_from(by.as_millis()).unwrap());
    }

    /// From now on it works, also for the syncs under way. A server that gave up has to be started again.
    ///
    /// # Panics
    /// As [`Disk::fill`].
    pub fn mend(&self) {
        self.set(FULL, 0);
        self.set(SLOW_MS, 0);
    }

    /// What has happened since it was built.
    pub fn counts(&self) -> Counts {
        Counts { attached: self.get(ATTACHED), refused: self.get(REFUSED), slowed: self.get(SLOWED) }
    }

    fn set(&self, at: u64, value: u64) {
        assert!(self.get(ATTACHED) > 0, "no server has loaded {}: see its log", self.library.display());
        self.control.write_all_at(&value.to_ne_bytes(), at).unwrap();
    }

    fn get(&self, at: u64) -> u64 {
        let mut value = [0; 8];
        self.control.read_exact_at(&mut value, at).unwrap();
        u64::from_ne_bytes(value)
    }
}

fn compile(library: &Path) -> io::Result<()> {
    let mut cc = Command::new("cc")
        .args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-x", "c", "-", "-o"])
        .arg(library)
        .args(["-x", "none", "-ldl"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // The source is part of this program: it may have moved from where it was built.
    cc.stdin.take().unwrap().write_all(include_bytes!("disk.c"))?;
    let output = cc.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("cc: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
