//! Extractors parse, so that handlers start with good values.

use std::fmt::Display;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;

use super::enqueue::{KEY_FORM, is_key};
use super::problem::{Mistake, Place, Problem};
use crate::domain::text::{escaped, pointer_to_nul};

/// A body of JSON. An empty body with the right content type is `{}`.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            return Err(Problem::not_json());
        }
        let body = Bytes::from_request(request, state).await.map_err(unreadable)?;
        parse(&body).map(Self)
    }
}

/// A body that may be left out: none at all, or JSON. A form, which any web page can send, is refused.
pub(super) struct Optional<T>(pub(super) T);

/// For a call that takes nothing: no body, or `{}` as JSON.
pub(super) type Nothing = Optional<Empty>;

/// An object without members.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Empty {}

impl<S: Send + Sync, T: Default + DeserializeOwned> FromRequest<S> for Optional<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let (untyped, json) = (!request.headers().contains_key(header::CONTENT_TYPE), is_json(request.headers()));
        let body = Bytes::from_request(request, state).await.map_err(unreadable)?;
        if untyped && body.is_empty() {
            return Ok(Self(T::default()));
        }
        if !json {
            return Err(Problem::not_json());
        }
        parse(&body).map(Self)
    }
}

pub(super) fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

fn unreadable(rejection: BytesRejection) -> Problem {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return Problem::too_large();
    }
    Problem::malformed("The body did not arrive whole.")
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let in_body = |pointer: String, detail: String| Problem::invalid_at(Place::Pointer(pointer), detail);
    let text = match std::str::from_utf8(body) {
        Ok("") => "{}",
        Ok(text) => text,
        Err(error) => return Err(in_body(String::new(), format!("is not UTF-8 from byte {} on", error.valid_up_to()))),
    };
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|error| Problem::malformed(format!("The body is not JSON: {error}.")))?;
    if let Some(pointer) = pointer_to_nul(&value) {
        return Err(in_body(pointer, "has a NUL character (\\u0000), which Postgres can't hold: leave it out".into()));
    }
    if !value.is_object() {
        // Else its entries would be taken for the fields in their order.
        return Err(in_body(String::new(), "must be a JSON object".into()));
    }
    read_value(value, "").map_err(|mistake| Problem::invalid(vec![mistake]))
}

/// What a part of a body says; `at` is the JSON pointer to that part.
pub(super) fn read_value<T: DeserializeOwned>(value: serde_json::Value, at: &str) -> Result<T, Mistake> {
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
        Mistake { place: Place::Pointer(format!("{at}{pointer}")), detail: in_words(&detail) }
    })
}

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

/// The one parameter of the path, parsed.
pub(super) struct Id<T>(pub(super) T);

impl<S: Send + Sync, T: FromStr<Err: Display> + Send> FromRequestParts<S> for Id<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let wrong = |detail: String| Problem::invalid_at(Place::Parameter("id".into()), detail);
        let Path(text) =
            Path::<String>::from_request_parts(parts, state).await.map_err(|error| wrong(error.body_text()))?;
        text.parse().map(Self).map_err(|error: T::Err| wrong(error.to_string()))
    }
}

/// The parameters of the query, taken one by one; what is left over in the end is refused by name.
pub(super) struct Params(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(pairs) = Query::from_request_parts(parts, state)
            .await
            .map_err(|error| Problem::malformed(format!("The query can't be read: {}", error.body_text())))?;
        Ok(Self(pairs))
    }
}

impl Params {
    /// Every value given under `name`, parsed.
    pub(super) fn all<T: FromStr<Err: Display>>(&mut self, name: &str) -> Result<Vec<T>, Problem> {
        let (these, others) = std::mem::take(&mut self.0).into_iter().partition(|(given, _)| given == name);
        self.0 = others;
        let parse = |(_, value): (String, String)| -> Result<T, Problem> {
            let wrong = |detail: String| Problem::invalid_at(Place::Parameter(name.into()), detail);
            if value.contains('\0') {
                return Err(wrong("has a NUL character".into()));
            }
            value.parse().map_err(|error: T::Err| wrong(error.to_string()))
        };
        Vec::into_iter(these).map(parse).collect()
    }

    /// The value given under `name`, parsed; one that is given twice is refused.
    pub(super) fn one<T: FromStr<Err: Display>>(&mut self, name: &str) -> Result<Option<T>, Problem> {
        let mut values = self.all(name)?;
        if values.len() > 1 {
            return Err(Problem::invalid_at(Place::Parameter(name.into()), "is given more than once"));
        }
        Ok(values.pop())
    }

    /// Refuses what nobody took.
    pub(super) fn finish(self, known: &[&str]) -> Result<(), Problem> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(Problem::invalid_at(
                Place::Parameter(name.clone()),
                format!("is not a parameter of this call; its parameters are {}", known.join(", ")),
            )),
        }
    }
}

/// Who sends the request: the name in `Singletrack-Actor`, on trust, else the peer's address.
pub(super) struct Actor(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Actor {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        const HEADER: &str = "singletrack-actor";
        let Some(name) = parts.headers.get(HEADER) else {
            let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
            return Ok(Self(peer.map_or_else(|| "unknown".to_owned(), |peer| peer.ip().to_string())));
        };
        match std::str::from_utf8(name.as_bytes()) {
            Ok(name) if (1..=128).contains(&name.chars().count()) => Ok(Self(name.to_owned())),
            _ => Err(Problem::invalid_at(
                Place::Header("Singletrack-Actor".into()),
                "must be 1 to 128 characters of UTF-8",
            )),
        }
    }
}

/// Refuses headers that mean something in this API and that this call does not heed: ignoring them would break a promise
/// that the caller relies on.
pub(super) fn refuse_headers(headers: &HeaderMap, names: &[&str]) -> Result<(), Problem> {
    match names.iter().find(|name| headers.contains_key(**name)) {
        None => Ok(()),
        Some(name) => Err(Problem::invalid_at(
            Place::Header((*name).to_owned()),
            "is not supported by this version for this call: leave it out",
        )),
    }
}

/// The key under which a repetition of this request is known, where there is one.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    const HEADER: &str = "Idempotency-Key";
    let mut keys = headers.get_all(HEADER).iter().map(|key| std::str::from_utf8(key.as_bytes()).unwrap_or_default());
    match (keys.next(), keys.next()) {
        (None, _) => Ok(None),
        (Some(key), None) if is_key(key) => Ok(Some(key.to_owned())),
        (Some(_), None) => Err(Problem::invalid_at(Place::Header(HEADER.into()), KEY_FORM)),
        (Some(_), Some(_)) => Err(Problem::invalid_at(Place::Header(HEADER.into()), "is given more than once")),
    }
}

/// Says in an answer that it may have been held for so long.
pub(super) fn apply_wait(mut response: Response, wait: Duration) -> Response {
    if let Ok(applied) = HeaderValue::try_from(format!("wait={}", wait.as_secs())) {
        response.headers_mut().insert("preference-applied", applied);
    }
    response
}

/// The seconds of `Prefer: wait=N` (RFC 7240), at most `longest`.
pub(super) fn preferred_wait(headers: &HeaderMap, longest: Duration) -> Result<Option<Duration>, Problem> {
    let mut wait = None;
    for value in headers.get_all("prefer") {
        let text = value.to_str().unwrap_or_default();
        for preference in text.split([',', ';']).map(str::trim) {
            let Some((name, seconds)) = preference.split_once('=') else { continue };
            if !name.trim().eq_ignore_ascii_case("wait") {
                continue;
            }
            let seconds: u64 = seconds.trim().trim_matches('"').parse().map_err(|_| {
                Problem::invalid_at(Place::Header("Prefer".into()), "wait must be a number of whole seconds")
            })?;
            wait.get_or_insert(Duration::from_secs(seconds).min(longest));
        }
    }
    Ok(wait)
}

#[cfg(test)]
mod tests {
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
            let problem = parse::<Body>(body.to_string().as_bytes()).expect_err("a mistake").line();
            assert_eq!(problem.split_once(": ").map(|(_, detail)| detail), Some(words), "{body}");
        }
    }
}
