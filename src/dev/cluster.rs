//! The data folder: whole or absent, of the right version, and used by nobody else.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::account::Account;
use super::find::{self, Installed};
use super::place::{self, Place};

/// The one role of the cluster.
pub(super) const USER: &str = "singletrack";

/// How long an abandoned server may take to write its last checkpoint.
const LEAVING: Duration = Duration::from_secs(60);

/// The cluster for this version, made if there is none; data of another version only is an error.
pub(super) fn ensure(place: &Place, installed: &Installed) -> Result<PathBuf> {
    let cluster = place.base.join(format!("pg{}", installed.major));
    if cluster.exists() {
        return Ok(cluster);
    }
    if let Some((major, path)) = place::clusters(&place.base).pop() {
        let remedy = match find::installed().into_iter().find(|one| one.major == major) {
            Some(one) => format!("set SINGLETRACK_PG_BIN={}", one.bin.display()),
            None => format!("install Postgres {major}"),
        };
        bail!(
            "{} was made by Postgres {major}, this is {}: {remedy}, or move that folder away to start empty",
            path.display(),
            installed.major
        );
    }
    build(place, installed, &cluster)?;
    Ok(cluster)
}

/// Builds beside and renames: a crash in the middle leaves nothing that looks like a cluster.
fn build(place: &Place, installed: &Installed, cluster: &Path) -> Result<()> {
    for entry in fs::read_dir(&place.base)?.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b"new.") {
            // An initdb that we lost may still be writing there; the next build removes what stays.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let fresh = place.base.join(format!("new.{}", std::process::id()));
    place::make_private(&fresh, &place.account)?;
    let output = place
        .account
        .command(&installed.bin.join("initdb"))
        .args(["--auth-local=trust", "--auth-host=reject", "--encoding=UTF8", "--locale=C", "-U", USER, "-D"])
        .arg(&fresh)
        .output()
        .context("cannot run initdb")?;
    if !output.status.success() {
        let _ = fs::remove_dir_all(&fresh);
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("initdb failed ({}): {}", output.status, text.trim().replace('\n', " "));
    }
    fs::rename(&fresh, cluster)?;
    File::open(&place.base)?.sync_all()?;
    Ok(())
}

/// Waits until no server is left on a cluster that nobody owns any more (its owner was killed), and clears what
/// would make Postgres mistake some other process for it. The caller holds the lock of the base folder.
pub(super) fn vacate(cluster: &Path, socket: &Path) -> Result<()> {
    let patience = Instant::now() + LEAVING;
    let mut asked = false;
    while let Some(pid) = recorded(cluster) {
        if test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
            break;
        }
        if !serves(pid, cluster) {
            // The number was given to another process, or is that of a corpse nobody collects.
            fs::remove_file(cluster.join("postmaster.pid"))?;
            break;
        }
        if !asked {
            // It hears of its parent's death by itself, except where the system cannot tell it.
            let _ = kill_process(pid, Signal::INT);
            asked = true;
        }
        if Instant::now() > patience {
            bail!("Postgres {} still uses {}: stop it first", pid.as_raw_nonzero(), cluster.display());
        }
        thread::sleep(Duration::from_millis(20));
    }
    for name in [".s.PGSQL.5432", ".s.PGSQL.5432.lock"] {
        let _ = fs::remove_file(socket.join(name));
    }
    Ok(())
}

/// The process that Postgres's own lock file names.
fn recorded(cluster: &Path) -> Option<Pid> {
    let text = fs::read_to_string(cluster.join("postmaster.pid")).ok()?;
    Pid::from_raw(text.lines().next()?.trim().parse().ok()?)
}

/// Whether a process is a server on this cluster. Its command line tells, and is readable where its working folder
/// is not (root in a container without CAP_SYS_PTRACE); without /proc, Postgres itself has to find out.
fn serves(pid: Pid, cluster: &Path) -> bool {
    let Ok(line) = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())) else {
        return !Path::new("/proc/self/cmdline").exists();
    };
    line.split(|byte| *byte == 0).any(|argument| argument == cluster.as_os_str().as_encoded_bytes())
}

/// Whether this account owns the cluster; Postgres would say so less clearly.
pub(super) fn check_owner(cluster: &Path, account: &Account) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let owner = fs::metadata(cluster).with_context(|| format!("cannot read {}", cluster.display()))?.uid();
    if owner != account.uid() {
        bail!(
            "{} belongs to uid {owner}, we are uid {}: start as its owner or as root",
            cluster.display(),
            account.uid()
        );
    }
    Ok(())
}
