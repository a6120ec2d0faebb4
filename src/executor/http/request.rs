//! The request: the run as JSON, and headers for those who read no body.

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Request, Response};
use serde::Serialize;
use url::Url;

use super::Call;
use crate::domain::executor::Method;
use crate::domain::run::Run;

/// Why there is no answer.
pub(super) enum Unsent {
    /// The lease may be somebody else's by now.
    TooLate,
    Other(String),
}

impl From<String> for Unsent {
    fn from(error: String) -> Self {
        Self::Other(error)
    }
}

#[derive(Serialize)]
struct Body<'a> {
    run: &'a Run,
    callback: Callback<'a>,
}

#[derive(Serialize)]
struct Callback<'a> {
    url: &'a str,
    token: &'a str,
    timeout_seconds: Option<i32>,
}

/// Makes the request and sends it.
pub(super) async fn send(call: &Call<'_>) -> Result<Response, Unsent> {
    let theirs = own_headers(call)?;
    let request = request(call, &theirs)?;
    if !(call.may_start)() {
        return Err(Unsent::TooLate);
    }
    Ok(call.client.send(request, &theirs).await?)
}

fn request(call: &Call<'_>, theirs: &HeaderMap) -> Result<Request, String> {
    let method = match call.http.method.unwrap_or(Method::Post) {
        Method::Post => reqwest::Method::POST,
        Method::Put => reqwest::Method::PUT,
        Method::Patch => reqwest::Method::PATCH,
    };
    let url = Url::parse(&call.http.url).map_err(|error| format!("executor.url: {error}"))?;
    let mut request = Request::new(method, url);
    *request.headers_mut() = theirs.clone();
    for (name, value) in service_headers(call.run) {
        let value = HeaderValue::try_from(value).map_err(|error| format!("{name}: {error}"))?;
        request.headers_mut().insert(HeaderName::from_static(name), value);
    }
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let timeout_seconds = call.http.callback_timeout_seconds.or(call.run.timeout_seconds);
    let callback = Callback { url: call.callback_url, token: call.token, timeout_seconds };
    let body = serde_json::to_vec(&Body { run: call.run, callback }).map_err(|error| error.to_string())?;
    *request.body_mut() = Some(body.into());
    Ok(request)
}

/// What the service says about the run in headers.
fn service_headers(run: &Run) -> impl Iterator<Item = (&'static str, String)> {
    [
        // The same attempt is never sent twice on purpose; who gets it twice has met a proxy that repeats requests.
        ("idempotency-key", format!("{}:{}", run.id, run.attempt)),
        ("singletrack-run-id", run.id.to_string()),
        ("singletrack-workflow-id", run.workflow_id.clone()),
        ("singletrack-attempt", run.attempt.to_string()),
        ("singletrack-fence", run.fence.to_string()),
    ]
    .into_iter()
    .chain(run.traceparent.clone().map(|context| ("traceparent", context)))
}

/// The headers that the workflow names.
fn own_headers(call: &Call<'_>) -> Result<HeaderMap, String> {
    let header = |(name, value): (&String, &String)| {
        let mistake = |error: &dyn std::fmt::Display| format!("executor.headers: `{name}`: {error}");
        let value = HeaderValue::from_bytes(value.as_bytes()).map_err(|error| mistake(&error))?;
        Ok((name.parse::<HeaderName>().map_err(|error| mistake(&error))?, value))
    };
    call.http.headers.iter().map(header).collect()
}
