//! What Postgres can't hold: NUL, in text and in jsonb.

use serde_json::Value;

/// Where in `value` the first NUL is, as a JSON pointer; `None` when there is none.
pub fn pointer_to_nul(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => text.contains('\0').then(String::new),
        Value::Array(items) => {
            items.iter().enumerate().find_map(|(index, item)| Some(format!("/{index}{}", pointer_to_nul(item)?)))
        }
        Value::Object(members) => members.iter().find_map(|(key, item)| {
            let name = escaped(key).replace('\0', "\u{fffd}");
            if key.contains('\0') {
                return Some(format!("/{name}"));
            }
            Some(format!("/{name}{}", pointer_to_nul(item)?))
        }),
        _ => None,
    }
}

/// A member's name as a step of a JSON pointer (RFC 6901).
pub fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}
