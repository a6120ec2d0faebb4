//! Which Postgres to use.

use std::env;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::account::Account;

const MAJORS: RangeInclusive<u32> = 14..=18;
const INSTALL: &str =
    "install Postgres 14 to 18 (Debian: `apt install postgresql`) or set SINGLETRACK_PG_BIN to its bin folder";

/// An installed Postgres.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Installed {
    /// The folder that holds `initdb` and `postgres`.
    pub(super) bin: PathBuf,
    /// Its major version.
    pub(super) major: u32,
}

/// The Postgres to use: the one named, else of those installed the first that fits data we already have.
pub(super) fn find(named: Option<&Path>, existing: &[u32], account: &Account) -> Result<Installed> {
    let found = match named {
        Some(bin) => inspect(bin).with_context(|| format!("no usable Postgres in {}: {INSTALL}", bin.display()))?,
        None => {
            let mut installed = installed();
            installed.retain(|one| account.can_enter(&one.bin));
            let fits = installed.iter().find(|one| existing.contains(&one.major));
            match fits.or(installed.first()) {
                Some(one) => one.clone(),
                None => bail!("no Postgres found: {INSTALL}"),
            }
        }
    };
    if !MAJORS.contains(&found.major) {
        bail!("Postgres {} in {} is not supported: {INSTALL}", found.major, found.bin.display());
    }
    if !account.can_enter(&found.bin) {
        bail!("the account of Postgres (uid {}) cannot enter {}", account.uid(), found.bin.display());
    }
    Ok(found)
}

/// Every supported Postgres of this machine, in the order of preference.
pub(super) fn installed() -> Vec<Installed> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Links are followed: `/usr/local/bin/initdb` is often the only part of Postgres that is on PATH.
    let on_path = env::split_paths(&path)
        .filter_map(|folder| fs::canonicalize(folder.join("initdb")).ok()?.parent().map(Path::to_path_buf));
    let mut packaged: Vec<Installed> = ["/usr/lib/postgresql", "/usr", "/opt/homebrew/opt"]
        .into_iter()
        .flat_map(folders)
        .filter_map(|bin| inspect(&bin).ok())
        .collect();
    packaged.sort_by_key(|one| std::cmp::Reverse(one.major));
    let local = inspect(Path::new("/usr/local/pgsql/bin")).ok();
    on_path
        .filter_map(|bin| inspect(&bin).ok())
        .chain(packaged)
        .chain(local)
        .filter(|one| MAJORS.contains(&one.major))
        .collect()
}

/// The bin folders that a package manager made under `root`.
fn folders(root: &str) -> Vec<PathBuf> {
    let prefix = match root {
        "/usr" => "pgsql-",
        "/opt/homebrew/opt" => "postgresql",
        _ => "",
    };
    let Ok(entries) = fs::read_dir(root) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()))
        .map(|entry| entry.path().join("bin"))
        .collect()
}

fn inspect(bin: &Path) -> Result<Installed> {
    let bin = fs::canonicalize(bin)?;
    if !bin.join("initdb").exists() {
        bail!("it has no initdb");
    }
    let output = Command::new(bin.join("postgres")).arg("--version").output().context("its postgres does not run")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let major = major_of(&text).with_context(|| format!("its postgres has no version: {}", text.trim()))?;
    Ok(Installed { bin, major })
}

/// The major version in what `postgres --version` prints; betas too (`18beta1`).
fn major_of(version: &str) -> Option<u32> {
    let number = version.split("(PostgreSQL) ").nth(1)?;
    let end = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
    number.get(..end)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_every_vendors_line() {
        assert_eq!(major_of("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n"), Some(15));
        assert_eq!(major_of("postgres (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(major_of("postgres (PostgreSQL) 14"), Some(14));
        assert_eq!(major_of("something else 9"), None);
    }
}
