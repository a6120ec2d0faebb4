//! The Postgres that callers see.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustix::process::Signal;

use super::cluster::{self, USER};
use super::find;
use super::place;
use super::process::{Launch, Process};

/// What to start, and where.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The base folder, made if it is missing. It holds the cluster (`pg15`), `socket/`, `postgres.log` and `lock`.
    pub data_dir: PathBuf,
    /// The folder with `initdb` and `postgres`; `None` takes an installed one.
    pub bin_dir: Option<PathBuf>,
    /// Server settings by name; they win over ours, those that make it durable included.
    pub settings: Vec<(String, String)>,
    /// Environment variables of the server, by name; they win over those it gets from us. None by default.
    pub environment: Vec<(String, String)>,
}

/// A Postgres of our own, durable (`fsync` and `synchronous_commit` on), stopped when this value is dropped.
///
/// It listens on a Unix socket only, in a folder that only its account (and root) can enter. It dies with this
/// process, even if that is killed; the data stays. All calls block.
#[derive(Debug)]
pub struct Postgres {
    running: Option<Process>,
    launch: Launch,
    base: PathBuf,
    notes: Vec<String>,
    socket_elsewhere: bool,
    _lock: File,
}

impl Postgres {
    /// Finds or makes the cluster, starts a server on it, and returns when it accepts connections.
    ///
    /// # Errors
    /// In one line each: no usable Postgres, the folder is in use by another process, its data was made by another
    /// major version, or the server did not start (with the end of its log).
    pub fn start(options: Options) -> Result<Postgres> {
        let place = place::settle(&options.data_dir)?;
        let lock = place::lock(&place.base)?;
        let majors: Vec<u32> = place::clusters(&place.base).iter().map(|(major, _)| *major).collect();
        let installed = find::find(options.bin_dir.as_deref(), &majors, &place.account)?;
        let cluster = cluster::ensure(&place, &installed)?;
        cluster::check_owner(&cluster, &place.account)?;
        let (socket, socket_elsewhere) = place::socket_folder(&place.base);
        place::make_private(&socket, &place.account)?;
        let mut notes = place.notes;
        if socket_elsewhere {
            let base = place.base.display();
            notes.push(format!(
                "no socket fits into {base} (path too long, or with a comma): it is in {}",
                socket.display()
            ));
        }
        let launch = Launch {
            program: installed.bin.join("postgres"),
            account: place.account,
            cluster,
            log: place.base.join("postgres.log"),
            settings: settings(&socket, options.settings),
            environment: options.environment,
            socket,
        };
        let mut postgres = Postgres { running: None, launch, base: place.base, notes, socket_elsewhere, _lock: lock };
        postgres.restart()?;
        Ok(postgres)
    }

    /// The URL of a database, for sqlx and libpq alike. The database has to exist: a new cluster has `postgres`.
    pub fn url(&self, database: &str) -> String {
        url(&self.launch.socket, database)
    }

    /// A command line that opens a database in `psql`, ready to be pasted into a shell.
    pub fn psql(&self, database: &str) -> String {
        let socket = quote(&self.launch.socket.to_string_lossy());
        format!("psql -h {socket} -p 5432 -U {USER} -d {}", quote(database))
    }

    /// The base folder, absolute; not the one asked for where Postgres cannot enter that.
    pub fn data_dir(&self) -> &Path {
        &self.base
    }

    /// What a person should be told, one line each: data or socket went elsewhere, and why.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The process id of the server; `None` while it is stopped.
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(Process::pid)
    }

    /// Stops the server: connections are ended, everything is written. Waits up to 10 s, then stops it harder.
    pub fn stop_fast(&mut self) {
        self.stop(&[Signal::INT, Signal::QUIT, Signal::KILL]);
    }

    /// Stops the server without writing anything more: the next start has to recover, as after a crash.
    pub fn stop_immediate(&mut self) {
        self.stop(&[Signal::QUIT, Signal::KILL]);
    }

    /// Kills the server's main process with SIGKILL; its other processes notice and leave by themselves.
    pub fn kill_postmaster(&mut self) {
        self.stop(&[Signal::KILL]);
    }

    /// Starts the server on the same data and socket, after a fast stop if it runs.
    ///
    /// # Errors
    /// As [`Postgres::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.stop_fast();
        place::make_private(&self.launch.socket, &self.launch.account)?;
        self.running = Some(Process::start(&self.launch)?);
        Ok(())
    }

    fn stop(&mut self, signals: &[Signal]) {
        if let Some(mut process) = self.running.take() {
            process.stop(signals);
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop_fast();
        if self.socket_elsewhere {
            let _ = fs::remove_dir(&self.launch.socket);
        }
    }
}

fn settings(socket: &Path, more: Vec<(String, String)>) -> Vec<(String, String)> {
    let socket = socket.to_string_lossy();
    let ours = [
        ("listen_addresses", ""),
        ("port", "5432"),
        ("unix_socket_directories", &socket),
        ("unix_socket_permissions", "0700"),
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("synchronous_commit", "on"),
        ("logging_collector", "off"),
    ];
    ours.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).chain(more).collect()
}

/// Port, user and `sslmode` are spelled out: exported PG* variables would fill in what is missing.
fn url(socket: &Path, database: &str) -> String {
    let socket = encode(&socket.to_string_lossy());
    format!("postgres://{USER}@localhost:5432/{}?host={socket}&sslmode=disable", encode(database))
}

fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_carries_any_path_and_any_name() {
        assert_eq!(
            url(Path::new("/tmp/a b&c/ü"), "x/y"),
            "postgres://singletrack@localhost:5432/x%2Fy?host=%2Ftmp%2Fa%20b%26c%2F%C3%BC&sslmode=disable"
        );
    }

    #[test]
    fn a_shell_reads_the_psql_line_as_it_was_meant() {
        assert_eq!(quote("/tmp/plain-1.x"), "/tmp/plain-1.x");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }
}
