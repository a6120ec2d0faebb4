//! A real pgbouncer in front of the tests' Postgres.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::geteuid;

use super::database::TestDb;
use super::{eventually, skipped};

/// A running pgbouncer, killed when dropped.
pub struct Pooler {
    /// The database by way of it; the test's own statements go there directly.
    pub test: TestDb,
    /// What there may be of it, in this order: the process is gone before its folder.
    _process: Process,
    _folder: tempfile::TempDir,
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

impl Pooler {
    /// One with these settings, when it lets in; `None` where it is not installed.
    pub async fn to(test: &TestDb, settings: &str) -> Option<Self> {
        if Command::new("pgbouncer").arg("--version").output().is_err() {
            skipped("pgbouncer is not installed");
            return None;
        }
        let options = test.options();
        let server = options.get_socket().unwrap();
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
        command.arg(folder.path().join("ini")).current_dir("/").stdin(Stdio::null()).stderr(Stdio::null());
        if geteuid().is_root() {
            // It refuses root, and the database lets in its own account only.
            chown(folder.path(), Some(owner.uid()), Some(owner.gid())).unwrap();
            command.uid(owner.uid()).gid(owner.gid());
        }
        let process = Process(command.spawn().unwrap());
        let (database, _) = test.url.split_once("host=").unwrap();
        let url = format!("{database}host={own}&sslmode=disable");
        eventually("pgbouncer lets in", Duration::from_secs(10), || async {
            folder.path().join(".s.PGSQL.5432").exists().then_some(())
        })
        .await;
        let test = TestDb { sql: test.sql.clone(), ..TestDb::at(url) };
        Some(Self { test, _process: process, _folder: folder })
    }
}
