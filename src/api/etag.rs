//! Which state of a workflow a request is about (RFC 9110, section 13): `ETag`, `If-Match`, `If-None-Match`.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use super::problem::{Place, Problem};
use crate::store::workflows::{Expected, Workflow};

/// Of a revision, and of what else its workflow says.
pub(super) fn of_revision(revision: i32) -> String {
    format!("\"{revision}\"")
}

/// Of a workflow: begins as that of its revision, and is another one while it is paused.
pub(super) fn of_workflow(workflow: &Workflow) -> String {
    let revision = workflow.revision.revision;
    match &workflow.pause {
        None => of_revision(revision),
        Some(pause) => format!("\"{revision}-{:x}\"", pause.paused_at.timestamp_micros()),
    }
}

/// As a header.
pub(super) fn header(etag: &str) -> (HeaderName, HeaderValue) {
    (header::ETAG, HeaderValue::try_from(etag).unwrap_or(HeaderValue::from_static("")))
}

/// Whether the client has this state already.
pub(super) fn is_known(headers: &HeaderMap, etag: &str) -> bool {
    // What is compared weakly here is none of its strong tags.
    tags(headers, header::IF_NONE_MATCH).any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
}

/// What the client says must be so for its edit.
pub(super) fn expected(headers: &HeaderMap) -> Result<Expected, Problem> {
    let (matches, others) = (headers.contains_key(header::IF_MATCH), headers.contains_key(header::IF_NONE_MATCH));
    if others {
        let mut tags = tags(headers, header::IF_NONE_MATCH);
        if matches || tags.next() != Some("*") || tags.next().is_some() {
            let detail = "must be *, without If-Match: then the workflow is made, but not changed";
            return Err(Problem::invalid_at(Place::Header("If-None-Match".into()), detail));
        }
        return Ok(Expected::Unused);
    }
    if !matches {
        return Ok(Expected::Anything);
    }
    if tags(headers, header::IF_MATCH).any(|tag| tag == "*") {
        return Ok(Expected::Defined);
    }
    // A pause is no edit: what was read before it may be edited.
    let revision = |tag: &str| tag.strip_prefix('"')?.strip_suffix('"')?.split('-').next()?.parse().ok();
    Ok(Expected::Revision(tags(headers, header::IF_MATCH).filter_map(revision).collect()))
}

fn tags(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_must_be_so_is_read_as_the_standard_says() {
        let read = |name: &'static str, value: &'static str| {
            expected(&HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])).ok()
        };
        assert_eq!(expected(&HeaderMap::new()).ok(), Some(Expected::Anything));
        assert_eq!(read("if-match", "*"), Some(Expected::Defined));
        assert_eq!(read("if-match", "\"3\" , \"4-5f\""), Some(Expected::Revision(vec![3, 4])));
        assert_eq!(read("if-match", "W/\"3\""), Some(Expected::Revision(vec![])), "compared strongly");
        assert_eq!(read("if-match", "3"), Some(Expected::Revision(vec![])));
        assert_eq!(read("if-none-match", "*"), Some(Expected::Unused));
        assert_eq!(read("if-none-match", "\"3\""), None);
    }
}
