//! The process of a real pgbouncer.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::geteuid;

/// A running pgbouncer, killed when dropped.
pub struct Pgbouncer {
    child: Child,
    folder: tempfile::TempDir,
}

impl Pgbouncer {
    /// Whether there is one to start.
    pub fn is_installed() -> bool {
        Command::new("pgbouncer").arg("--version").output().is_ok()
    }

    /// One in front of the server whose socket is in the folder `server`, with these settings, when it lets in. `None` where it is not
    /// installed.
    pub fn start(server: &Path, settings: &str) -> Option<Self> {
        if !Self::is_installed() {
            return None;
        }
        let (folder, owner) = (tempfile::tempdir().unwrap(), fs::metadata(server).unwrap());
        let own = folder.path().display();
        let ini = format!(
            "[databases]\n* = host={} port=5432\n[pgbouncer]\nlisten_addr =\nlisten_port = 5432\nunix_socket_dir = {own}\n\
             auth_type = trust\nauth_file = {own}/users\nmax_client_conn = 500\n{settings}\n",
            server.display()
        );
        fs::write(folder.path().join("ini"), ini).unwrap();
        fs::write(folder.path().join("users"), "\"singletrack\" \"\"\n").unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new("pgbouncer");
        command.arg(folder.path().join("ini")).current_dir("/").stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        if geteuid().is_root() {
            // It refuses root, and the database lets in its own account only.
            chown(folder.path(), Some(owner.uid()), Some(owner.gid())).unwrap();
            command.uid(owner.uid()).gid(owner.gid());
        }
        let this = Self { child: command.spawn().unwrap(), folder };
        let patience = Instant::now() + Duration::from_secs(10);
        while !this.socket().exists() {
            assert!(Instant::now() < patience, "pgbouncer does not let in");
            sleep(Duration::from_millis(10));
        }
        Some(this)
    }

    /// The folder of its socket.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join(".s.PGSQL.5432")
    }
}

impl Drop for Pgbouncer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}
