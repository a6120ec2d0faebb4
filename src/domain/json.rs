//! JSON as somebody wrote it, read as what it should be: a mistake is told with its place and in the words of JSON.

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::Segment;

use super::text::{escaped, pointer_to_nul};

/// Reads an object.
///
/// # Errors
/// The first mistake: where it is, as a JSON pointer, and what is wrong there.
pub fn read<T: DeserializeOwned>(value: Value) -> Result<T, (String, String)> {
    if let Some(pointer) = pointer_to_nul(&value) {
        return Err((pointer, "has a NUL character (\\u0000), which Postgres can't hold: leave it out".into()));
    }
    if !value.is_object() {
        // Else its entries would be taken for the fields in their order.
        return Err((String::new(), "must be a JSON object".into()));
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let mut pointer: String = error.path().iter().map(reference).collect();
        let detail = error.inner().to_string();
        // Where a member is not known, some readers stop at it and some after all of them.
        let unknown = detail.strip_prefix("unknown field `").and_then(|rest| rest.split_once('`'));
        if let Some(step) =
            unknown.map(|(name, _)| format!("/{}", escaped(name))).filter(|step| !pointer.ends_with(step))
        {
            pointer.push_str(&step);
        }
        (pointer, in_words(&detail))
    })
}

/// What chrono says of a text that is no time.
const TIME_MISTAKES: [&str; 6] = [
    "input contains invalid characters",
    "premature end of input",
    "input is out of range",
    "trailing input",
    "input is not enough for unique date and time",
    "no possible date and time matching input",
];

/// What serde says of a wrong value, in the words of JSON. A string is not repeated: it may be a token.
fn in_words(detail: &str) -> String {
    let parts = |what| detail.strip_prefix(what).and_then(|rest| rest.rsplit_once(", expected "));
    if let Some((given, wanted)) = parts("invalid type: ") {
        let wanted = match wanted {
            "i16" | "i32" | "i64" | "u64" => "a whole number",
            "f64" => "a number",
            "a sequence" => "an array",
            "a map" => "an object",
            "string or map" => "a string",
            other => other,
        };
        let given = match given.split([' ', '`']).next() {
            Some("string") => "a string",
            Some("sequence") => "an array",
            Some("map") => "an object",
            _ => given.split('`').nth(1).unwrap_or(given), // a number or a boolean itself, or null
        };
        return format!("must be {wanted}, not {given}");
    }
    if let Some((given, _)) = parts("invalid value: integer ") {
        return format!("{given} is out of range: /openapi.json has the bounds");
    }
    if TIME_MISTAKES.contains(&detail) {
        return "is not a time such as 2026-01-31T08:00:00Z".to_owned();
    }
    match detail.strip_prefix("unknown variant ") {
        Some(rest) => rest.replacen("`, expected", "` is not known, expected", 1),
        None => detail.to_owned(),
    }
}

/// A step into a body, as a JSON pointer has it.
fn reference(step: &Segment) -> String {
    match step {
        Segment::Seq { index } => format!("/{index}"),
        Segment::Map { key } => format!("/{}", escaped(key)),
        // The name of an enum's variant stands nowhere in the body as a step.
        Segment::Enum { .. } | Segment::Unknown => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Body {
        _count: Option<i16>,
        _texts: Option<Vec<String>>,
        _status: Option<crate::domain::RetryOn>,
    }

    #[test]
    fn wrong_values_are_named_in_the_words_of_json_and_strings_are_not_repeated() {
        let cases = [
            (json!({"_count": "st1_secret, expected a map"}), "must be a whole number, not a string"),
            (json!({"_count": 1.5}), "must be a whole number, not 1.5"),
            (json!({"_count": 40_000}), "`40000` is out of range: /openapi.json has the bounds"),
            (json!({"_texts": {"a": 1}}), "must be an array, not an object"),
            (json!({"_texts": [null]}), "must be a string, not null"),
            (json!({"_status": true}), "must be a string, not true"),
            (json!({"_status": "stael"}), "`stael` is not known, expected one of `failed`, `timed_out`, `stale`"),
        ];
        for (body, words) in cases {
            let (_, detail) = read::<Body>(body.clone()).expect_err("a mistake");
            assert_eq!(detail, words, "{body}");
        }
    }
}
