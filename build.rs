//! Hands the checked query macros their description of the database, so that a build needs none.
//!
//! sqlx reads one file per query; we keep them as one, `sqlx-data.json` ({hash: query}), which a review can take in.

use std::env;
use std::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=sqlx-data.json");
    println!("cargo::rerun-if-changed=migrations");
    println!("cargo::rerun-if-env-changed=SINGLETRACK_PREPARE");
    // `.ci/prepare` builds against a live database and names these variables itself.
    if env::var_os("SINGLETRACK_PREPARE").is_some() {
        return;
    }
    match unpack() {
        Ok(folder) => {
            // These reach rustc, and with it the macros, before anything exported: a DATABASE_URL is not looked at.
            println!("cargo::rustc-env=SQLX_OFFLINE=true");
            println!("cargo::rustc-env=SQLX_OFFLINE_DIR={folder}");
        }
        Err(error) => {
            println!("cargo::error=sqlx-data.json: {error} (`make prepare` makes it anew)")
        }
    }
}

/// Unpacks the queries into a folder of the build and returns its path.
fn unpack() -> Result<String, Box<dyn Error>> {
    let folder = Path::new(&env::var("OUT_DIR")?).join("sqlx");
    // A query that is gone must not be found in what an earlier build unpacked.
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
        _ => fs::create_dir_all(&folder)?,
    }
    let queries: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&fs::read_to_string("sqlx-data.json")?)?;
    for (hash, query) in queries {
        fs::write(folder.join(format!("query-{hash}.json")), query.to_string())?;
    }
    Ok(folder.to_str().ok_or("the build folder's path is not UTF-8")?.to_owned())
}
