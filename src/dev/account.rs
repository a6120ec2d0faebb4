//! The account Postgres runs under.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Signal, geteuid, getpid, getppid};

/// Who runs Postgres: ourselves or, as Postgres refuses root, an unprivileged account.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    uid: u32,
    gid: u32,
    borrowed: bool,
}

impl Account {
    /// The account for a cluster: ourselves or, as root, the owner it already has, else `postgres`, else `nobody`.
    pub(super) fn choose(existing_cluster: Option<&Path>) -> Account {
        let euid = geteuid();
        if !euid.is_root() {
            let gid = rustix::process::getegid().as_raw();
            return Account { uid: euid.as_raw(), gid, borrowed: false };
        }
        let owner = existing_cluster
            .and_then(|path| fs::symlink_metadata(path).ok())
            .map(|meta| (meta.uid(), meta.gid()))
            .filter(|(uid, _)| *uid != 0);
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let (uid, gid) = owner
            .or_else(|| lookup(&passwd, "postgres"))
            .or_else(|| lookup(&passwd, "nobody"))
            .unwrap_or((65534, 65534));
        Account { uid, gid, borrowed: true }
    }

    /// Its numeric user id.
    pub(super) fn uid(&self) -> u32 {
        self.uid
    }

    /// Gives a file or folder that we made to this account.
    pub(super) fn adopt(&self, path: &Path) -> io::Result<()> {
        if self.borrowed {
            std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid))?;
        }
        Ok(())
    }

    /// Whether this account may enter a folder, asked of the kernel: modes alone miss ACLs and mounts.
    pub(super) fn can_enter(&self, folder: &Path) -> bool {
        if !self.borrowed {
            return true;
        }
        let mut test = self.command(Path::new("test"));
        test.arg("-x").arg(folder).stdout(Stdio::null()).stderr(Stdio::null());
        test.status().is_ok_and(|status| status.success())
    }

    /// A command that runs as this account, away from our terminal, and is interrupted when our thread ends.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        // Not our working folder: the account may not be able to enter it.
        command.current_dir("/").stdin(Stdio::null()).env("LC_ALL", "C");
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        if self.borrowed {
            // The standard library drops the supplementary groups along with the user id.
            command.uid(self.uid).gid(self.gid).env_remove("HOME");
        }
        // A terminal's Ctrl-C goes to the whole foreground group; Postgres must stop after us, not with us.
        command.process_group(0);
        die_with_us(&mut command, Signal::INT);
        command
    }
}

/// Has the kernel send a signal to a child when the thread ends that spawned it, which at the latest we do.
pub(crate) fn die_with_us(command: &mut Command, signal: Signal) {
    let parent = getpid();
    let ask = move || {
        #[cfg(target_os = "linux")]
        rustix::process::set_parent_process_death_signal(Some(signal))?;
        // We may have died before the request was in place.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    };
    // SAFETY: between fork and exec only two system calls are made; nothing allocates or takes a lock. It runs after
    // the change of user id, which would clear the request.
    unsafe {
        command.pre_exec(ask);
    }
}

fn lookup(passwd: &str, name: &str) -> Option<(u32, u32)> {
    let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_found_by_its_whole_name() {
        let passwd = "root:x:0:0::/root:/bin/sh\npostgresql:x:9:9::/:/bin/sh\npostgres:x:101:104:a,b:/var:/bin/sh\n";
        assert_eq!(lookup(passwd, "postgres"), Some((101, 104)));
        assert_eq!(lookup(passwd, "nobody"), None);
    }
}
