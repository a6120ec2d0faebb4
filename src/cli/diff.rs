//! What differs between two definitions, member by member.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;
use serde::ser::SerializeMap as _;
use serde_json::{Map, Value};

use crate::domain::text::escaped;

/// One member that differs. Shown as a line for people (`labels.team: "web" -> "shop"`), serialised for programs.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Change {
    /// The names on the way to it.
    path: Vec<String>,
    what: What,
}

#[derive(Clone, Debug, PartialEq)]
enum What {
    /// One value for another.
    Other(Value, Value),
    /// A member of an object, or an entry of an array, that was not there.
    Added(Value),
    /// One that is not there any more.
    Removed(Value),
}

/// Everything in which `new` differs from `old`, in the order of the names.
pub(super) fn diff(old: &Value, new: &Value) -> Vec<Change> {
    let mut found = Vec::new();
    compare(&mut Vec::new(), old, new, &mut found);
    found
}

fn compare(path: &mut Vec<String>, old: &Value, new: &Value, found: &mut Vec<Change>) {
    let nothing = Map::new();
    match (old, new) {
        (old, new) if old == new => {}
        (Value::Object(old), Value::Object(new)) => members(path, old, new, found),
        (Value::Null, Value::Object(new)) => members(path, &nothing, new, found),
        (Value::Object(old), Value::Null) => members(path, old, &nothing, found),
        (Value::Array(old), Value::Array(new)) => entries(path, old, new, found),
        (old, new) => found.push(Change { path: path.clone(), what: What::Other(old.clone(), new.clone()) }),
    }
}

fn members(path: &mut Vec<String>, old: &Map<String, Value>, new: &Map<String, Value>, found: &mut Vec<Change>) {
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for name in names {
        path.push(name.clone());
        match (old.get(name), new.get(name)) {
            // Each variable and header for itself: whether a value is shown goes by its name.
            (None, Some(Value::Object(new))) if !new.is_empty() => members(path, &Map::new(), new, found),
            (Some(Value::Object(old)), None) if !old.is_empty() => members(path, old, &Map::new(), found),
            (None, Some(new)) => found.push(Change { path: path.clone(), what: What::Added(new.clone()) }),
            (Some(old), None) => found.push(Change { path: path.clone(), what: What::Removed(old.clone()) }),
            (Some(old), Some(new)) => compare(path, old, new, found),
            (None, None) => {}
        }
        path.pop();
    }
}

fn entries(path: &[String], old: &[Value], new: &[Value], found: &mut Vec<Change>) {
    let mut gone = old.to_vec();
    let mut come = Vec::new();
    for entry in new {
        match gone.iter().position(|other| other == entry) {
            Some(at) => drop(gone.remove(at)),
            None => come.push(entry.clone()),
        }
    }
    let mut push = |what| found.push(Change { path: path.to_vec(), what });
    if gone.is_empty() && come.is_empty() {
        return push(What::Other(old.into(), new.into())); // the same entries in another order
    }
    gone.into_iter().for_each(|entry| push(What::Removed(entry)));
    come.into_iter().for_each(|entry| push(What::Added(entry)));
}

impl Change {
    /// Whether the values are often secrets, and have no place in the log of a CI.
    fn is_hidden(&self) -> bool {
        matches!(self.path.as_slice(), [executor, kind, _, ..] if executor == "executor" && (kind == "env" || kind == "headers"))
    }
}

impl fmt::Display for Change {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A name that somebody gave a label must not do anything to the terminal.
        let path = self.path.join(".");
        let path = path.escape_debug();
        match &self.what {
            What::Other(..) if self.is_hidden() => write!(out, "{path}: changed"),
            What::Added(_) if self.is_hidden() => write!(out, "{path}: added"),
            What::Removed(_) if self.is_hidden() => write!(out, "{path}: removed"),
            What::Other(old, new) => write!(out, "{path}: {old} -> {new}"),
            What::Added(new) => write!(out, "{path}: added {new}"),
            What::Removed(old) => write!(out, "{path}: removed {old}"),
        }
    }
}

impl Serialize for Change {
    fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let pointer: String = self.path.iter().map(|name| format!("/{}", escaped(name))).collect();
        let (change, from, to) = match &self.what {
            What::Other(old, new) => ("changed", Some(old), Some(new)),
            What::Added(new) => ("added", None, Some(new)),
            What::Removed(old) => ("removed", Some(old), None),
        };
        let mut members = out.serialize_map(None)?;
        members.serialize_entry("pointer", &pointer)?;
        members.serialize_entry("change", change)?;
        for (name, value) in [("from", from), ("to", to)] {
            if let Some(value) = value.filter(|_| !self.is_hidden()) {
                members.serialize_entry(name, value)?;
            }
        }
        members.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn lines(old: Value, new: Value) -> Vec<String> {
        diff(&old, &new).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_equal_has_no_line_and_what_differs_has_its_path() {
        let old = json!({"timeout_seconds": 600, "queue": "default", "backoff": {"factor": 2, "jitter": 0.2}});
        assert_eq!(lines(old.clone(), old.clone()), [""; 0]);
        let new = json!({"timeout_seconds": 900, "queue": "default", "backoff": {"factor": 3, "jitter": 0.2}});
        assert_eq!(lines(old, new), ["backoff.factor: 2 -> 3", "timeout_seconds: 600 -> 900"]);
        assert_eq!(
            lines(json!({"timeout_seconds": null}), json!({"timeout_seconds": 5})),
            ["timeout_seconds: null -> 5"]
        );
    }

    #[test]
    fn members_and_entries_are_added_and_removed_one_by_one() {
        let old = json!({"labels": {"a": "1", "b": "2"}, "retry_on": ["failed", "stale"], "schedule": null});
        let new = json!({"labels": {"b": "3", "c": "4"}, "retry_on": ["stale", "timed_out"], "schedule": {"cron": "0 3 * * *"}});
        let expected = [
            r#"labels.a: removed "1""#,
            r#"labels.b: "2" -> "3""#,
            r#"labels.c: added "4""#,
            r#"retry_on: removed "failed""#,
            r#"retry_on: added "timed_out""#,
            r#"schedule.cron: added "0 3 * * *""#,
        ];
        assert_eq!(lines(old.clone(), new.clone()), expected);
        assert_eq!(lines(new, old).len(), expected.len());
    }

    #[test]
    fn nothing_reaches_a_terminal_but_text() {
        let shown = lines(json!({"labels": {}}), json!({"labels": {"a\u{1b}[2J": "\u{1b}[2J"}}));
        assert_eq!(shown, [r#"labels.a\u{1b}[2J: added "\u001b[2J""#]);
    }

    #[test]
    fn entries_in_another_order_and_entries_given_twice_are_changes() {
        let argv = |entries: Value| json!({"argv": entries});
        assert_eq!(lines(argv(json!(["a", "b"])), argv(json!(["b", "a"]))), [r#"argv: ["a","b"] -> ["b","a"]"#]);
        assert_eq!(lines(argv(json!(["a"])), argv(json!(["a", "a"]))), [r#"argv: added "a""#]);
    }

    #[test]
    fn values_of_variables_and_headers_are_not_shown() {
        let old = json!({"executor": {"env": {"A": "secret-1", "B": "secret-2"}}});
        let new = json!({"executor": {"env": {"A": "secret-3"}, "headers": {"Authorization": "secret-4"}}});
        let expected = ["executor.env.A: changed", "executor.env.B: removed", "executor.headers.Authorization: added"];
        assert_eq!(lines(old.clone(), new.clone()), expected);
        let for_programs = json!(diff(&old, &new));
        assert_eq!(for_programs[0], json!({"pointer": "/executor/env/A", "change": "changed"}));
        assert!(!for_programs.to_string().contains("secret"), "{for_programs}");
    }

    #[test]
    fn programs_get_pointers_and_both_values() {
        let changes = json!(diff(&json!({"labels": {"a/b": "1"}, "x": 1}), &json!({"labels": {"a/b": "2"}, "y": 2})));
        let expected = json!([
            {"pointer": "/labels/a~1b", "change": "changed", "from": "1", "to": "2"},
            {"pointer": "/x", "change": "removed", "from": 1},
            {"pointer": "/y", "change": "added", "to": 2},
        ]);
        assert_eq!(changes, expected);
    }
}
