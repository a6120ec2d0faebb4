//! Files of workflow definitions: YAML 1.2, read whole, and everything that is wrong with one told at once, by its line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use saphyr::{LoadableYamlNode as _, MarkedYaml, Scalar, YamlData};
use serde_json::{Map, Number, Value, json};

use crate::domain::text::escaped;
use crate::domain::{Definition, WorkflowId, json};

/// A workflow as a file has it.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) id: WorkflowId,
    /// What the file says, to be sent as it is.
    pub(super) body: Value,
    /// The same with all defaults.
    pub(super) definition: Definition,
}

/// Something wrong in a file, in a line of it that counts from 1.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mistake {
    line: usize,
    what: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.line, self.what)
    }
}

/// Reads a file, in the order of which the workflows are returned.
///
/// # Errors
/// All mistakes, by line. A file that is not YAML has one: the first.
pub(super) fn read(text: &str) -> Result<Vec<Wanted>, Vec<Mistake>> {
    let documents = MarkedYaml::load_from_str(text)
        .map_err(|error| vec![Mistake { line: error.marker().line(), what: error.info().to_owned() }])?;
    let [document] = documents.as_slice() else {
        let line = documents.get(1).map_or(1, |second| second.span.start.line());
        return Err(vec![Mistake { line, what: "a file holds one document, with all workflows in it".into() }]);
    };
    let mut tree = Tree::default();
    let content = tree.value(document, "");
    if tree.mistakes.is_empty()
        && let Some(content) = content
    {
        let found = tree.workflows(content);
        if tree.mistakes.is_empty() {
            return Ok(found);
        }
    }
    tree.mistakes.sort();
    Err(tree.mistakes)
}

/// Where everything stands, and what is wrong.
#[derive(Default)]
struct Tree {
    /// By JSON pointer.
    lines: BTreeMap<String, usize>,
    mistakes: Vec<Mistake>,
}

impl Tree {
    /// A node as JSON; `None` where it is none, which is a mistake.
    fn value(&mut self, node: &MarkedYaml<'_>, pointer: &str) -> Option<Value> {
        let what = match &node.data {
            YamlData::Value(Scalar::Null) => return Some(Value::Null),
            YamlData::Value(Scalar::Boolean(value)) => return Some(json!(value)),
            YamlData::Value(Scalar::Integer(value)) => return Some(json!(value)),
            YamlData::Value(Scalar::String(text)) => return Some(json!(text)),
            YamlData::Value(Scalar::FloatingPoint(value)) => match Number::from_f64(value.0) {
                Some(number) => return Some(Value::Number(number)),
                None => "is a number that JSON does not have: quote it if it is text".to_owned(),
            },
            YamlData::Sequence(entries) => {
                let entries = entries.iter().enumerate().filter_map(|(index, entry)| {
                    let pointer = format!("{pointer}/{index}");
                    self.lines.insert(pointer.clone(), entry.span.start.line());
                    self.value(entry, &pointer)
                });
                return Some(entries.collect());
            }
            YamlData::Mapping(members) => {
                let mut object = Map::new();
                for (key, value) in members {
                    let line = key.span.start.line();
                    let YamlData::Value(Scalar::String(name)) = &key.data else {
                        self.mistakes.push(Mistake { line, what: "a name must be text: quote it".into() });
                        continue;
                    };
                    let pointer = format!("{pointer}/{}", escaped(name));
                    self.lines.insert(pointer.clone(), line);
                    object.extend(self.value(value, &pointer).map(|value| (name.to_string(), value)));
                }
                return Some(Value::Object(object));
            }
            YamlData::Tagged(tag, _) => format!("the tag {tag} means nothing here: leave it out"),
            YamlData::Representation(..) | YamlData::Alias(_) | YamlData::BadValue => "is not what its tag says".into(),
        };
        self.mistakes.push(Mistake { line: node.span.start.line(), what });
        None
    }

    /// The line of what a pointer names, or else of what it would be in.
    fn line(&self, mut pointer: &str) -> usize {
        loop {
            match (self.lines.get(pointer), pointer.rfind('/')) {
                (Some(line), _) => return *line,
                (None, Some(end)) => pointer = &pointer[..end],
                (None, None) => return 1,
            }
        }
    }

    fn mistake(&mut self, pointer: &str, what: impl Into<String>) {
        self.mistakes.push(Mistake { line: self.line(pointer), what: what.into() });
    }

    /// The workflows of a whole file.
    fn workflows(&mut self, content: Value) -> Vec<Wanted> {
        const FORM: &str = "must begin with `workflows:`, and below it each id with its definition";
        let Value::Object(mut content) = content else {
            self.mistake("", format!("the file {FORM}"));
            return Vec::new();
        };
        let workflows = content.remove("workflows");
        for name in content.keys() {
            self.mistake(
                &format!("/{}", escaped(name)),
                format!("`{name}` is not known: the file has `workflows:` alone"),
            );
        }
        let Some(Value::Object(workflows)) = workflows else {
            self.mistake("/workflows", format!("the file {FORM}"));
            return Vec::new();
        };
        let mut workflows: Vec<_> = workflows.into_iter().collect();
        workflows.sort_by_key(|(id, _)| self.line(&format!("/workflows/{}", escaped(id))));
        workflows.into_iter().filter_map(|(id, body)| self.workflow(&id, body)).collect()
    }

    fn workflow(&mut self, id: &str, body: Value) -> Option<Wanted> {
        let place = format!("/workflows/{}", escaped(id));
        let id = id.parse::<WorkflowId>().map_err(|mistake| self.mistake(&place, mistake));
        match (definition(body.clone()), id) {
            (Ok(definition), Ok(id)) => Some(Wanted { id, body, definition }),
            (Err(mistakes), Ok(id)) => {
                for (pointer, detail) in mistakes {
                    let wanted = if pointer.is_empty() { "the definition" } else { &pointer };
                    let what = format!("{id}: {wanted}: {}", hinted(detail));
                    self.mistake(&format!("{place}{pointer}"), what);
                }
                None
            }
            (_, Err(())) => None,
        }
    }
}

/// YAML reads `1.10`, `true` and `~` as what they look like.
fn hinted(detail: String) -> String {
    match detail.strip_prefix("must be a string, not ") {
        Some("an array" | "an object") | None => detail,
        Some(_) => format!("{detail}: quote it"),
    }
}

/// Reads a definition.
///
/// # Errors
/// Every mistake, as a JSON pointer and what is wrong there: what is wrong is taken out, and the rest read again.
fn definition(mut body: Value) -> Result<Definition, Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut taken_out = BTreeSet::new();
    loop {
        match json::read::<Definition>(body.clone()) {
            Ok(definition) => {
                found.extend(definition.mistakes());
                return if found.is_empty() { Ok(definition) } else { Err(found) };
            }
            Err((pointer, detail)) => {
                let missing = detail.strip_prefix("missing field `").map(|name| name.trim_end_matches('`'));
                let is_ours = missing.is_some_and(|name| taken_out.contains(&format!("{pointer}/{name}")));
                if !is_ours {
                    found.push((pointer.clone(), detail.clone()));
                }
                match take_out(&mut body, &pointer) {
                    Some(taken) => drop(taken_out.insert(taken)),
                    None => return Err(found),
                }
            }
        }
    }
}

/// Takes the member at `pointer` out of a definition, or the array that it is an entry of; returns the pointer to what is
/// gone. What runs the workflow has to be there: something stands in for it, in which nothing is wrong.
fn take_out(body: &mut Value, pointer: &str) -> Option<String> {
    const EXECUTOR: &str = "/executor";
    if pointer.is_empty() || pointer == EXECUTOR {
        let stand_in = json!({"type": "pull"});
        let members = body.as_object_mut()?;
        return (members.insert("executor".into(), stand_in.clone()) != Some(stand_in)).then(|| EXECUTOR.into());
    }
    let (parent, step) = pointer.rsplit_once('/')?;
    match body.pointer_mut(parent)? {
        Value::Object(members) => {
            members.remove(&step.replace("~1", "/").replace("~0", "~"))?;
            Some(pointer.to_owned())
        }
        _ => take_out(body, parent),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistakes(text: &str) -> Vec<String> {
        read(text).expect_err("mistakes").iter().map(ToString::to_string).collect()
    }

    /// The labels of a workflow that has these lines for them.
    fn labels(lines: &str) -> Result<BTreeMap<String, String>, Vec<String>> {
        let text = format!("workflows:\n  w:\n    executor: {{type: pull}}\n    labels: {lines}\n");
        match read(&text) {
            Ok(found) => Ok(found[0].definition.labels.clone()),
            Err(mistakes) => Err(mistakes.iter().map(ToString::to_string).collect()),
        }
    }

    #[test]
    fn a_file_is_read_in_its_order_with_all_defaults() {
        let found = read("workflows:\n  z: {executor: {type: pull}}\n  a@b:\n    executor: {type: handler}\n")
            .expect("a good file");
        let ids: Vec<&str> = found.iter().map(|wanted| wanted.id.as_str()).collect();
        assert_eq!(ids, ["z", "a@b"]);
        assert_eq!(found[0].body, json!({"executor": {"type": "pull"}}), "what is sent is what was written");
        assert_eq!((found[0].definition.max_attempts, found[0].definition.queue.as_str()), (1, "default"));
        assert!(read("workflows: {}").expect("a good file").is_empty());
    }

    #[test]
    fn everything_that_is_wrong_is_told_at_once_by_its_line() {
        let text = "\
workflows:
  e2e:
    executor: {type: command, argv: [npm, 1.10], colour: red}
    timeout_seconds: soon
    priority: 1000
    labels:
      team: true
  no executor: {}
  later:
    max_attempts: 0
    retry_on: [stale, often]
  gone:
  http:
    executor:
      type: http
      url: ftp://host
      argv: [x]
    backoff: {factor: 0}
other: 1
";
        let expected = [
            "3: e2e: /executor/argv/1: must be a string, not 1.1: quote it",
            "3: e2e: /executor/colour: unknown field `colour`, expected one of `type`, `argv`, `cwd`, `env`, `env_pass`, \
             `user`, `limits`, `url`, `method`, `headers`, `callback_timeout_seconds`",
            "4: e2e: /timeout_seconds: must be a whole number, not a string",
            "5: e2e: /priority: 1000 is out of range: -100 to 100, higher first",
            "7: e2e: /labels/team: must be a string, not true: quote it",
            "8: `no executor` is not a workflow id: ",
            "9: later: the definition: missing field `executor`",
            "10: later: /max_attempts: 0 is out of range: 1 to 1000",
            "11: later: /retry_on/1: `often` is not known, expected one of `failed`, `timed_out`, `stale`",
            "12: gone: the definition: must be a JSON object",
            "16: http: /executor/url: must begin with http:// or https://",
            "17: http: /executor/argv: unknown field `argv`, it is of another type of executor",
            "18: http: /backoff/factor: 0 is out of range: 1 to 100",
            "19: `other` is not known: the file has `workflows:` alone",
        ];
        let found = mistakes(text);
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{found}\n{expected}");
        }
    }

    #[test]
    fn words_are_read_as_yaml_1_2_reads_them() {
        let text = labels("{a: no, b: on, c: 12:30:00, d: 1_000, e: '0755', f: \"1.10\", g: 2026-11-22}")
            .expect("a good file");
        let expected = [
            ("a", "no"),
            ("b", "on"),
            ("c", "12:30:00"),
            ("d", "1_000"),
            ("e", "0755"),
            ("f", "1.10"),
            ("g", "2026-11-22"),
        ];
        assert_eq!(text, expected.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect());
        for (written, shown) in [("0755", "755"), ("0o17", "15"), ("1.10", "1.1"), ("true", "true"), ("~", "null")] {
            let expected = format!("4: w: /labels/a: must be a string, not {shown}: quote it");
            assert_eq!(labels(&format!("{{a: {written}}}")), Err(vec![expected]), "{written}");
        }
        assert_eq!(labels("{1: a}"), Err(vec!["4: a name must be text: quote it".into()]));
    }

    #[test]
    fn what_yaml_has_and_json_has_not_is_told() {
        let tagged = Err(vec!["4: the tag !secret means nothing here: leave it out".into()]);
        assert_eq!(labels("{a: !secret b}"), tagged);
        assert_eq!(labels("!secret {a: b}"), tagged);
        assert_eq!(labels("{a: .nan}").expect_err("mistakes").len(), 1);
        assert_eq!(labels("{a: !!int b}"), Err(vec!["4: is not what its tag says".into()]));
        assert_eq!(labels("{a: \"\\0\"}").expect_err("mistakes").len(), 1);
    }

    #[test]
    fn a_name_that_is_given_twice_is_a_mistake_of_its_line() {
        let twice = |text| assert_eq!(mistakes(text), ["4: duplicated key in mapping"], "{text}");
        twice("workflows:\n  a:\n    executor: {type: pull}\n  a:\n    executor: {type: pull}\n");
        twice("workflows:\n  a:\n    executor: {type: pull}\n    executor: {type: pull}\n");
        twice("workflows:\n  a:\n    labels: {\n      x: '1', 'x': '2'}\n    executor: {type: pull}\n");
    }

    #[test]
    fn a_file_that_is_none_says_what_it_should_be() {
        let form = "1: the file must begin with `workflows:`, and below it each id with its definition";
        for text in ["null", "[]", "{}", "workflows:", "workflows: []"] {
            assert_eq!(mistakes(text), [form], "{text}");
        }
        for text in ["", "# nothing\n"] {
            assert_eq!(mistakes(text), ["1: a file holds one document, with all workflows in it"], "{text:?}");
        }
        assert_eq!(
            mistakes("workflows: {}\n---\nworkflows: {}\n"),
            ["3: a file holds one document, with all workflows in it"]
        );
        let broken = mistakes("workflows:\n  a: {executor\n");
        assert!(broken.len() == 1 && broken[0].starts_with("3: "), "{broken:?}");
    }

    #[test]
    fn anchors_repeat_and_cannot_explode() {
        let shared = "workflows:\n  a: {executor: &e {type: command, argv: ['true']}}\n  b: {executor: *e}\n";
        let found = read(shared).expect("a good file");
        assert_eq!(found[0].definition, found[1].definition);
        let mut laughs = "workflows:\n  a0: &a0 [x, x]\n".to_owned();
        laughs.extend((1..40).map(|n| format!("  a{n}: &a{n} [*a{0}, *a{0}]\n", n - 1)));
        let found = mistakes(&laughs);
        assert!(found.len() == 1 && found[0].contains("billion-laughs"), "{found:?}");
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    #[test]
    fn a_file_of_any_kind_is_read_or_refused_with_the_line() {
        const WORDS: [&str; 36] = [
            "workflows:",
            "\n",
            "\n",
            "\n  ",
            "\n    ",
            "\n      ",
            "- ",
            "a: ",
            "executor: ",
            "type: ",
            "command",
            "argv: ",
            "[",
            "]",
            "{",
            "}",
            ", ",
            ": ",
            "&x ",
            "*x",
            "<<: ",
            "!!int ",
            "| ",
            "> ",
            "'",
            "\"",
            "# ",
            "---\n",
            "...\n",
            "? ",
            "~",
            ".inf",
            "1e999",
            "0x7f",
            "\t",
            "é",
        ];
        bolero::check!().for_each(|bytes: &[u8]| {
            let text: String = bytes.iter().map(|byte| WORDS[usize::from(*byte) % WORDS.len()]).collect();
            for text in
                [text.clone(), format!("workflows:\n  w:\n    {text}"), String::from_utf8_lossy(bytes).into_owned()]
            {
                if let Err(mistakes) = read(&text) {
                    assert!(!mistakes.is_empty(), "{text:?}");
                    // A carriage return ends a line of YAML, too; the end of the file may count as a line of its own.
                    let lines = text.split(['\n', '\r']).count() + 1;
                    assert!(mistakes.iter().all(|mistake| mistake.line <= lines), "{text:?}: {mistakes:?}");
                }
            }
        });
    }
}
