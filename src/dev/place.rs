//! Where data, log, lock and socket live.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use super::account::Account;

/// The file name Postgres gives its socket, as long as the port is the usual one.
const SOCKET_FILE: &str = ".s.PGSQL.5432";
/// What a socket's address holds on the tightest of our systems (macOS; Linux has room for 107 bytes).
const SOCKET_LIMIT: usize = 103;
/// Where root keeps the data of clones that the account of Postgres cannot enter.
const ELSEWHERE: &str = "/var/lib/singletrack";
/// How long a lock is waited for: a process that was killed holds it a moment longer.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// The folder everything lives in, and the account that can use it.
#[derive(Debug)]
pub(super) struct Place {
    /// The base folder, absolute.
    pub(super) base: PathBuf,
    /// Who runs Postgres there.
    pub(super) account: Account,
    /// What a person should be told about it.
    pub(super) notes: Vec<String>,
}

/// Settles where the data goes: into `wanted` or, where Postgres's account cannot enter that, below `/var/lib`.
pub(super) fn settle(wanted: &Path) -> Result<Place> {
    let wanted = make_base(wanted)?;
    let account = Account::choose(clusters(&wanted).first().map(|(_, path)| path.as_path()));
    if account.can_enter(&wanted) {
        return Ok(Place { base: wanted, account, notes: Vec::new() });
    }
    let base = make_base(&Path::new(ELSEWHERE).join(fingerprint(&wanted)))?;
    let account = Account::choose(clusters(&base).first().map(|(_, path)| path.as_path()));
    if !account.can_enter(&base) {
        bail!(
            "the account of Postgres (uid {}) can enter neither {} nor {}",
            account.uid(),
            wanted.display(),
            base.display()
        );
    }
    let note = format!(
        "Postgres (uid {}) cannot enter {}: its data is in {}",
        account.uid(),
        wanted.display(),
        base.display()
    );
    Ok(Place { base, account, notes: vec![note] })
}

/// The clusters in a base folder: major version and path.
pub(super) fn clusters(base: &Path) -> Vec<(u32, PathBuf)> {
    let Ok(entries) = fs::read_dir(base) else {
        return Vec::new();
    };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.strip_prefix("pg")?.parse().ok()?, entry.path())))
        .collect();
    found.sort();
    found
}

/// The socket's folder for a base folder, and whether that had to be another: a socket's address is short and plain.
pub(super) fn socket_folder(base: &Path) -> (PathBuf, bool) {
    let inside = base.join("socket");
    // Settings and URLs are text, and clients take a comma for the end of one host.
    let sayable = base.to_str().is_some_and(|path| !path.contains(','));
    if sayable && inside.as_os_str().len() + 1 + SOCKET_FILE.len() <= SOCKET_LIMIT {
        return (inside, false);
    }
    (Path::new("/tmp").join(format!("singletrack-{}", fingerprint(base))), true)
}

/// Makes a folder that only `account` can enter, or makes sure that the one there is such a folder: in a folder
/// shared with others it may be a trap that somebody else has set up.
pub(super) fn make_private(folder: &Path, account: &Account) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => account.adopt(folder)?,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot make {}", folder.display()));
        }
    }
    let meta = fs::symlink_metadata(folder)?;
    if !meta.is_dir() || meta.uid() != account.uid() || meta.mode() & 0o077 != 0 {
        bail!(
            "{} is not a folder of uid {} that nobody else can enter: remove it and start again",
            folder.display(),
            account.uid()
        );
    }
    Ok(())
}

/// Takes the base folder for this process until the file is closed; says who has it otherwise.
pub(super) fn lock(base: &Path) -> Result<File> {
    let path = base.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let patience = Instant::now() + LOCK_PATIENCE;
    while let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
        if error != rustix::io::Errno::WOULDBLOCK && error != rustix::io::Errno::INTR {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
        if Instant::now() > patience {
            let mut pid = String::new();
            file.read_to_string(&mut pid)?;
            bail!("another singletrack (pid {}) uses the Postgres in {}: stop it first", pid.trim(), base.display());
        }
        thread::sleep(Duration::from_millis(20));
    }
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

fn make_base(path: &Path) -> Result<PathBuf> {
    let make = || {
        if !path.is_dir() {
            fs::create_dir_all(path)?;
            // As root the account must pass through; what it holds is closed by itself.
            fs::set_permissions(path, Permissions::from_mode(0o711))?;
        }
        fs::canonicalize(path)
    };
    make().with_context(|| format!("cannot make the folder {}", path.display()))
}

/// A short name for a path, the same in every release: FNV-1a, as the standard library promises no stable hash.
fn fingerprint(path: &Path) -> String {
    let hash =
        path.as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_stays_inside_as_long_as_its_address_fits() {
        let room = SOCKET_LIMIT - "/socket/".len() - SOCKET_FILE.len();
        let fits = PathBuf::from(format!("/{}", "x".repeat(room - 1)));
        assert_eq!(socket_folder(&fits), (fits.join("socket"), false));
        let long = PathBuf::from(format!("/{}", "x".repeat(room)));
        let (folder, moved) = socket_folder(&long);
        assert!(moved && folder.starts_with("/tmp"), "{}", folder.display());
        assert_eq!(socket_folder(&long).0, folder, "the same place at the next start");
        assert_ne!(socket_folder(&long.join("y")).0, folder);
        assert!(socket_folder(Path::new("/a,b")).1, "a client would look in two places");
    }

    #[test]
    fn a_fingerprint_never_changes() {
        assert_eq!(fingerprint(Path::new("a")), "af63dc4c8601ec8c");
    }
}
