//! Conventions as tests: layering, sizes, names.

use std::fs;
use std::path::{Path, PathBuf};

/// Which of our modules a module may use.
const LAYERS: &[(&str, &[&str])] = &[
    ("config", &["domain", "executor"]),
    ("telemetry", &["config"]),
    ("metrics", &[]),
    ("traces", &["domain", "tls"]),
    ("domain", &[]),
    ("store", &["domain", "metrics"]),
    ("tls", &[]),
    ("executor", &["domain", "tls"]),
    ("engine", &["domain", "store", "executor", "config", "metrics", "traces"]),
    ("api", &["domain", "store", "metrics", "traces"]),
    ("dev", &[]),
    ("ui", &[]),
    ("app", &["api", "config", "domain", "engine", "executor", "store", "ui"]),
    ("cli", &["app", "config", "dev", "domain", "telemetry", "tls", "traces"]),
];

fn files(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut open = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|kind| kind == "rs" || kind == "sql") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    assert!(!found.is_empty(), "{folder} has no files");
    found
}

/// The top-level module that a file of `src/` belongs to.
fn module(path: &Path) -> String {
    let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// The modules that a text uses by `crate::name`.
fn used(text: &str) -> Vec<&str> {
    let name_end = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    text.match_indices("crate::")
        .map(|(at, found)| &text[at + found.len()..])
        .map(|rest| &rest[..name_end(rest)])
        .collect()
}

#[test]
fn modules_use_only_what_their_layer_may() {
    for (path, text) in files("src") {
        let own = module(&path);
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == own) else {
            assert!(["lib", "main"].contains(&own.as_str()), "{own} has no layer: give it one");
            continue;
        };
        for other in used(&text) {
            assert!(other == own || allowed.contains(&other), "{} uses {other}", path.display());
        }
    }
}

#[test]
fn sql_is_in_the_store_and_status_codes_are_in_the_api() {
    for (path, text) in files("src") {
        let own = module(&path);
        assert!(own == "store" || !text.contains("sqlx::query"), "{} has SQL", path.display());
        assert!(own == "api" || !text.contains("StatusCode"), "{} knows HTTP", path.display());
    }
}

#[test]
fn bodies_are_read_in_one_place_which_gives_them_a_deadline() {
    for (path, text) in files("src/api") {
        let own = path.ends_with("extract.rs");
        assert!(
            own || !["BytesRejection", ": Bytes", "<Bytes"]
                .iter()
                .any(|way| text.contains(way) && !path.ends_with("openapi.rs")),
            "{} reads one",
            path.display()
        );
    }
}

#[test]
fn made_up_sql_is_in_one_file_at_most() {
    let name = ["Assert", "SqlSafe"].concat();
    let with: Vec<_> =
        [files("src"), files("tests")].concat().into_iter().filter(|(_, text)| text.contains(&name)).collect();
    assert!(with.len() <= 1, "{:?}", with.iter().map(|(path, _)| path).collect::<Vec<_>>());
}

#[test]
fn no_file_is_long_and_none_is_named_for_nothing() {
    for (path, text) in ["src", "tests", "benches", "migrations"].map(files).concat() {
        assert!(text.lines().count() <= 500, "{} is too long: replan the room", path.display());
        let name = path.file_stem().unwrap().to_str().unwrap();
        let empty = ["util", "utils", "helpers", "common", "types", "models", "misc"];
        assert!(!empty.contains(&name), "{} says nothing about what is in it", path.display());
    }
}
