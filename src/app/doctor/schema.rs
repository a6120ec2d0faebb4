//! Whether the schema is what the migrations make.

use std::collections::BTreeMap;

use sqlx::postgres::PgConnection;

use super::{Checks, Finding, Judged};
use crate::store::doctor::schema::{self as facts, Applied, Object};
use crate::store::migrate;

/// What the migrations make, by kind and name. A test makes it anew, and it is the same under every version of Postgres.
const MANIFEST: &str = include_str!("manifest.json");

type Manifest = BTreeMap<String, BTreeMap<String, String>>;

/// Kinds of objects: the name of the check, what is so where nothing is found, and what it means where one is not as it should be.
const KINDS: &[(&str, &str, &str, &str)] = &[
    (
        "table",
        "tables",
        "every table is there, and survives a crash",
        "Statements fail; what an unlogged table has is gone after a crash.",
    ),
    (
        "column",
        "columns",
        "every column is as the migrations made it",
        "Statements of the service fail, or mean something else.",
    ),
    (
        "constraint",
        "constraints",
        "every constraint is as the migrations made it",
        "Rows may be written that the service can't understand: the API fails on them, or a claim does on all that it takes with it.",
    ),
    (
        "index",
        "indexes",
        "every index is there, valid, and says what it should",
        "Statements get slow, and where it is a unique one nothing refuses what must not be.",
    ),
    (
        "trigger",
        "triggers",
        "every trigger is there and enabled",
        "What it refuses is not refused any more, or what it records or hands on is not: final runs can be changed, waiting runs strand.",
    ),
    (
        "function",
        "functions",
        "every function does what the migrations say",
        "What calls it does something else, or fails.",
    ),
    ("view", "views", "every view shows what the migrations say", "Who reads it is told something else, or nothing."),
    ("sequence", "sequences", "every sequence counts as it should", "Numbers may come twice, or out of order."),
];

/// The indexes that are the promise.
const PROMISE: [&str; 2] = ["test_runs.test_runs_one_running", "test_runs.test_runs_one_slot"];

/// Makes the checks; `there` says whether the tables were found. Whether there is something to look at besides.
pub(super) async fn look(connection: &mut PgConnection, checks: &mut Checks, there: bool) -> sqlx::Result<bool> {
    let applied = facts::applied(connection).await;
    let same = matches!(&applied, Ok(Some(applied)) if version(applied) == Some(migrate::newest()));
    checks.add(
        "schema-version",
        "the schema is of this program's version",
        applied.map(|applied| versions(applied.as_deref()).into()),
    )?;
    if !there {
        return Ok(false);
    }
    if same {
        let manifest: Manifest = serde_json::from_str(MANIFEST).expect("a test wrote it, and reads it");
        let objects = match facts::objects(connection).await {
            Ok(objects) => Ok(objects),
            Err(error) => Err(checks.why_unseen(error)?),
        };
        for (kind, name, holds, means) in KINDS {
            let judged = objects.as_ref().map_err(Clone::clone).map(|objects| compare(&manifest, kind, means, objects));
            checks.push(name, holds, judged);
        }
    }
    let interferences = facts::interferences(connection).await;
    checks.add(
        "interference",
        "no rule, policy or child table changes what statements mean",
        interferences.map(|found| interfering(found).into()),
    )?;
    Ok(true)
}

fn version(applied: &[Applied]) -> Option<i64> {
    applied.iter().filter(|applied| applied.success).map(|applied| applied.version).max()
}

/// Judges which migrations were applied.
fn versions(applied: Option<&[Applied]>) -> Vec<Finding> {
    const MIGRATE: &str = "singletrack migrate";
    let newest = migrate::newest();
    let Some((applied, at)) = applied.and_then(|applied| Some((applied, version(applied)?))) else {
        let what = "there is no schema in this database, or not where this account looks for it (search_path)";
        return vec![Finding::new(what, "No replica can work on it.", MIGRATE)];
    };
    let mut findings = Vec::new();
    if at > newest {
        findings.push(Finding::new(
            format!("the schema is at version {at}, and this program knows {newest}"),
            "Its objects were not compared: only the version that made them knows what they should be.",
            "Ask the doctor of the newer version.",
        ));
    }
    let missing: Vec<String> = migrate::known()
        .filter(|known| !applied.iter().any(|applied| applied.version == known.version && applied.success))
        .map(|known| known.version.to_string())
        .collect();
    if !missing.is_empty() {
        findings.push(Finding::new(
            format!("the schema is at version {at}, and this program at {newest}: missing is {}", missing.join(", ")),
            "Replicas of this version do not start on it; its objects were not compared.",
            MIGRATE,
        ));
    }
    for known in migrate::known() {
        if applied.iter().any(|applied| applied.version == known.version && *applied.checksum != *known.checksum) {
            findings.push(Finding::new(
                format!("{} was applied with another text", file(known)),
                "It was changed after it had been applied, or is of another build: replicas of this version refuse to start.",
                "Use the build that made this schema, or bring the text back to what was applied.",
            ));
        }
    }
    findings
}

/// What is missing, altered or out of order among the objects of a kind; what somebody added to our tables is a note.
fn compare(manifest: &Manifest, kind: &str, means: &str, objects: &[Object]) -> Judged {
    let mut judged = Judged::default();
    let none = BTreeMap::new();
    let expected = manifest.get(kind).unwrap_or(&none);
    let found: BTreeMap<&str, &Object> =
        objects.iter().filter(|object| object.kind == kind).map(|object| (object.name.as_str(), object)).collect();
    for (name, definition) in expected {
        let wrong = match found.get(name.as_str()) {
            None => Some((format!("{kind} {name} is missing"), Fault::Missing)),
            Some(object) if object.definition != *definition => {
                Some((altered(kind, name, &object.definition, definition), Fault::Altered))
            }
            Some(object) if !object.state.is_empty() => {
                Some((format!("{kind} {name} is {}", object.state), Fault::OutOfOrder))
            }
            Some(_) => None,
        };
        if let Some((what, fault)) = wrong {
            let means = if PROMISE.contains(&name.as_str()) {
                "The promise rests on it: nothing but this index refuses a second run in a slot."
            } else {
                means
            };
            judged.findings.push(Finding::new(what, means, remedy(kind, name, definition, fault)));
        }
    }
    let tables = manifest.get("table").unwrap_or(&none);
    let ours = |name: &str| name.split_once('.').is_some_and(|(table, _)| tables.contains_key(table));
    for (name, object) in found.iter().filter(|(name, _)| !expected.contains_key(**name) && ours(name)) {
        match (kind, object.state.as_str()) {
            ("index", "invalid") => judged.findings.push(Finding::new(
                format!("index {name} is invalid"),
                "It was left behind by a REINDEX or CREATE INDEX CONCURRENTLY that failed: every write pays for it, and nothing reads it.",
                format!("drop index concurrently {};", part(name)),
            )),
            ("trigger" | "constraint", _) => {
                judged.notes.push(format!("{kind} {name} is none of the migrations: what it refuses fails in the service's statements"));
            }
            _ => {}
        }
    }
    judged
}

/// What can be wrong with an object that should be there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Missing,
    Altered,
    /// It says what it should, and does not do it.
    OutOfOrder,
}

fn altered(kind: &str, name: &str, is: &str, should: &str) -> String {
    match kind {
        // A checksum tells nobody anything.
        "function" | "view" => format!("{kind} {name} is not what the migrations made"),
        _ => format!("{kind} {name} was altered: it is `{is}`, and should be `{should}`"),
    }
}

/// A name without that of its table.
fn part(name: &str) -> &str {
    name.split_once('.').map_or(name, |(_, part)| part)
}

fn remedy(kind: &str, name: &str, definition: &str, fault: Fault) -> String {
    let (table, own) = name.split_once('.').unwrap_or((name, name));
    let create = match kind {
        "index" => format!("{};", definition.replacen(" INDEX ", " INDEX CONCURRENTLY ", 1)),
        "trigger" => format!("{definition};"),
        "constraint" => format!("alter table {table} add constraint {own} {definition};"),
        _ => return origin(kind, name),
    };
    let drop = match kind {
        "index" => format!("drop index concurrently {own};"),
        "trigger" => format!("drop trigger {own} on {table};"),
        _ => format!("alter table {table} drop constraint {own};"),
    };
    match (fault, kind) {
        (Fault::Missing, _) => create,
        (Fault::OutOfOrder, "trigger") => format!("alter table {table} enable trigger {own};"),
        (Fault::OutOfOrder, _) => format!("reindex index concurrently {own};"),
        (Fault::Altered, _) => format!("{drop} {create}"),
    }
}

/// Which migration says what an object should be: the last one that makes it.
fn origin(kind: &str, name: &str) -> String {
    let (table, own) = name.split_once('.').unwrap_or((name, name));
    let makes = |sql: &str| match kind {
        "function" => {
            let own = own.split('(').next().unwrap_or(own);
            [format!("create function {own}("), format!("create or replace function {own}(")]
                .iter()
                .any(|made| sql.contains(made))
        }
        "view" => [format!("create view {own} "), format!("create or replace view {own} ")]
            .iter()
            .any(|made| sql.contains(made)),
        "column" => sql.contains(table) && sql.contains(&format!(" {own} ")),
        _ => sql.contains(&format!("create {kind} {own} ")),
    };
    match migrate::known().rev().find(|known| makes(known.sql)) {
        Some(known) => format!("Make it as {} does; migrations are in the repository of this program.", file(known)),
        None => "Make it as the migrations do.".into(),
    }
}

fn file(migration: migrate::Known) -> String {
    format!("migrations/{:04}_{}.sql", migration.version, migration.name.replace(' ', "_"))
}

fn interfering(found: Vec<String>) -> Vec<Finding> {
    let means =
        "Statements of the service see or write other rows than they say: the promise holds for what one table has.";
    let remedy =
        "alter table ... disable row level security; drop policy ...; drop rule ...; alter table ... no inherit ...;";
    let total = i64::try_from(found.len()).unwrap_or(i64::MAX);
    if found.is_empty() {
        return Vec::new();
    }
    let rows = found.into_iter().take(10).collect();
    vec![
        Finding::new(format!("{total} things that change what statements on these tables mean"), means, remedy)
            .about(rows, total),
    ]
}
