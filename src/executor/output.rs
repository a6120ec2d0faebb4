//! What an attempt hands back: a JSON object that Postgres can hold.

use serde_json::{Map, Value};

/// The JSON object that these bytes are, NUL and invalid UTF-8 in it replaced by U+FFFD.
pub(super) fn object(bytes: &[u8]) -> Option<Value> {
    let text = String::from_utf8_lossy(bytes).replace('\0', "\u{fffd}");
    match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => Some(Value::Object(storable_object(object))),
        Ok(_) | Err(_) => None,
    }
}

/// jsonb refuses NUL, also as `\u0000`, and the whole row with it.
pub(super) fn storable(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(text.replace('\0', "\u{fffd}")),
        Value::Array(values) => Value::Array(values.into_iter().map(storable).collect()),
        Value::Object(object) => Value::Object(storable_object(object)),
        other => other,
    }
}

fn storable_object(object: Map<String, Value>) -> Map<String, Value> {
    object.into_iter().map(|(key, value)| (key.replace('\0', "\u{fffd}"), storable(value))).collect()
}
