//! Extractors parse, so that handlers start with good values.

use std::fmt::Display;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, Query, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::auth::Caller;
use super::problem::{Mistake, Place, Problem};
use crate::domain::workflow::check_key;
use crate::domain::{TraceContext, json};

/// How long a body may take to arrive: 32 MiB over a line of 5 Mbit/s.
const BODY_TIME: Duration = Duration::from_secs(60);

/// A body of JSON. An empty body with the right content type is `{}`.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        Unread::from_request(request, state).await?.read().map(Self)
    }
}

/// A body of JSON that has arrived and is yet to be read: read, it may take many times the room.
pub(super) struct Unread(Bytes);

impl<S: Send + Sync> FromRequest<S> for Unread {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            return Err(Problem::not_json());
        }
        whole(request, state, BODY_TIME).await.map(Self)
    }
}

impl Unread {
    /// What it says.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        parse(&self.0)
    }

    /// How many values are in it at most, by what stands between them. Text is one value, whatever is in it.
    pub(super) fn values(&self) -> usize {
        let (mut in_text, mut escaped, mut count) = (false, false, 0);
        for byte in &self.0 {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = in_text,
                b'"' => in_text = !in_text,
                b',' | b'[' | b'{' if !in_text => count += 1,
                _ => {}
            }
        }
        count
    }
}

/// A body of any kind.
pub(super) struct Body(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        whole(request, state, BODY_TIME).await.map(Self)
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
        let body = whole(request, state, BODY_TIME).await?;
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

/// The body, when it arrives in time.
async fn whole<S: Send + Sync>(request: Request, state: &S, limit: Duration) -> Result<Bytes, Problem> {
    let arrived = timeout(limit, Bytes::from_request(request, state)).await;
    arrived.map_err(|_| Problem::body_too_slow(limit))?.map_err(unreadable)
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
    let value =
        serde_json::from_str(text).map_err(|error| Problem::malformed(format!("The body is not JSON: {error}.")))?;
    read_value(value, "").map_err(|mistake| Problem::invalid(vec![mistake]))
}

/// What an object in a body says; `at` is the JSON pointer to it.
pub(super) fn read_value<T: DeserializeOwned>(value: serde_json::Value, at: &str) -> Result<T, Mistake> {
    json::read(value).map_err(|(pointer, detail)| Mistake { place: Place::Pointer(format!("{at}{pointer}")), detail })
}

/// The one parameter of the path, parsed.
pub(super) struct Id<T>(pub(super) T);

impl<S: Send + Sync, T: FromStr<Err: Display> + Send> FromRequestParts<S> for Id<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let params = RawPathParams::from_request_parts(parts, state).await;
        let params = params.map_err(|error| Problem::invalid_at(Place::Parameter("id".into()), error.body_text()))?;
        let (name, text) = params.iter().next().unwrap_or_default();
        text.parse()
            .map(Self)
            .map_err(|error: T::Err| Problem::invalid_at(Place::Parameter(name.into()), error.to_string()))
    }
}

/// The parameters of the query, taken one by one; what is left over in the end is refused by name.
pub(super) struct Params {
    given: Vec<(String, String)>,
    left: Vec<(String, String)>,
}

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(pairs) = Query::<Vec<(String, String)>>::from_request_parts(parts, state)
            .await
            .map_err(|error| Problem::malformed(format!("The query can't be read: {}", error.body_text())))?;
        Ok(Self { given: pairs.clone(), left: pairs })
    }
}

impl Params {
    /// Every value given under `name`, parsed.
    pub(super) fn all<T: FromStr<Err: Display>>(&mut self, name: &str) -> Result<Vec<T>, Problem> {
        let (these, others) = std::mem::take(&mut self.left).into_iter().partition(|(given, _)| given == name);
        self.left = others;
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

    /// All of them, as they were given.
    pub(super) fn given(&self) -> &[(String, String)] {
        &self.given
    }

    /// Refuses what nobody took.
    pub(super) fn finish(self, known: &[&str]) -> Result<(), Problem> {
        match self.left.first() {
            None => Ok(()),
            Some((name, _)) => Err(Problem::invalid_at(
                Place::Parameter(name.clone()),
                format!("is not a parameter of this call; its parameters are {}", known.join(", ")),
            )),
        }
    }
}

/// Who sends the request: the key's name; without keys the name in `Singletrack-Actor`, on trust, else the peer's address.
pub(super) struct Actor(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Actor {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        const HEADER: &str = "singletrack-actor";
        if let Some(name) = parts.extensions.get().and_then(Caller::name) {
            return Ok(Self(name.to_owned()));
        }
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
        (Some(key), None) => match check_key(key) {
            Ok(()) => Ok(Some(key.to_owned())),
            Err(detail) => Err(Problem::invalid_at(Place::Header(HEADER.into()), detail)),
        },
        (Some(_), Some(_)) => Err(Problem::invalid_at(Place::Header(HEADER.into()), "is given more than once")),
    }
}

/// What asks, where that is part of a trace (W3C Trace Context): one that is ill-formed, or given more than once, is none.
pub(super) struct Traceparent(pub(super) Option<TraceContext>);

impl<S: Send + Sync> FromRequestParts<S> for Traceparent {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let mut given = parts.headers.get_all("traceparent").iter();
        Ok(Self(match (given.next(), given.next()) {
            (Some(context), None) => context.to_str().ok().and_then(|context| context.parse().ok()),
            _ => None,
        }))
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
    use super::*;

    #[test]
    fn values_are_counted_where_they_are_and_not_in_text() {
        for (text, values) in [("{}", 1), (r#"{"a": [0, 1], "b": {}}"#, 5), (r#"["a,b\",[{", "\\", 0]"#, 3), ("", 0)] {
            assert_eq!(Unread(Bytes::from_static(text.as_bytes())).values(), values, "{text}");
        }
    }

    #[tokio::test]
    async fn a_body_that_does_not_end_is_408() {
        let body = axum::body::Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        let refused = whole(Request::new(body), &(), Duration::from_millis(10)).await.expect_err("it does not arrive");
        assert_eq!((refused.status(), refused.cause()), (StatusCode::REQUEST_TIMEOUT, "body-too-slow"));
    }
}
