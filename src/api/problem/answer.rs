//! How a problem is answered.

use std::any::Any;

use axum::body::Body;
use axum::http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use axum::response::IntoResponse;
use serde::{Serialize, Serializer};
use tower_http::request_id::RequestId;

use super::Problem;
use crate::api::run_path;

tokio::task_local! {
    /// What the request is called that is being answered.
    static REQUEST: RequestId;
}

/// The answer to the request `id`; a problem says that this is what it is called.
pub(in crate::api) async fn answering<T>(id: Option<RequestId>, answer: impl Future<Output = T>) -> T {
    match id {
        Some(id) => REQUEST.scope(id, answer).await,
        None => answer.await,
    }
}

/// The name of the request that is being answered, whichever that is when a problem is written down.
#[derive(Debug)]
pub(super) struct RequestName;

impl RequestName {
    fn read<T>(then: impl FnOnce(&str) -> T) -> Option<T> {
        REQUEST.try_with(|id| id.header_value().to_str().ok().map(then)).ok()?
    }

    pub(super) fn is_unknown(&self) -> bool {
        Self::read(|_| ()).is_none()
    }
}

impl Serialize for RequestName {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match Self::read(ToOwned::to_owned) {
            Some(id) => out.serialize_str(&id),
            None => out.serialize_none(),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> axum::response::Response {
        self.log();
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after));
        }
        if let (Some(run_id), Some(_)) = (self.run_id, &self.holder)
            && let Ok(location) = HeaderValue::try_from(run_path(run_id))
        {
            headers.insert(header::LOCATION, location);
        }
        response
    }
}

/// Answers what no route matches.
pub(in crate::api) async fn no_such_route(uri: Uri) -> Problem {
    Problem::not_found(&format!("No route is at {}. /openapi.json lists them.", uri.path().escape_debug()))
}

/// Answers a method that a route does not have.
pub(in crate::api) async fn no_such_method(method: Method, uri: Uri) -> Problem {
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "The route does not have this method")
        .with_detail(format!("{method} {}: the header Allow names the methods it has.", uri.path().escape_debug()))
}

/// Answers a request whose handler panicked.
pub(in crate::api) fn of_panic(panic: Box<dyn Any + Send + 'static>) -> axum::response::Response {
    let text =
        panic.downcast_ref::<&str>().map(|text| (*text).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    Problem::internal(format!("panic: {}", text.unwrap_or_default())).into_response()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::routing::get;
    use tower::Service as _;

    use super::*;

    /// What was logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(line)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_panic_is_answered_without_its_text_and_logged_with_it_under_the_same_id() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let _logging = tracing::subscriber::set_default(subscriber);
        let panics = get(async || -> &'static str { panic!("the password is hunter2") });
        let mut service = crate::api::surround(Router::new().route("/", panics));
        let request = axum::http::Request::get("/").header("x-request-id", "mine-1").body(Body::empty()).unwrap();
        let answer = service.call(request).await.unwrap();
        assert_eq!((answer.status().as_u16(), &answer.headers()["x-request-id"]), (500, &"mine-1".parse().unwrap()));
        let body = axum::body::to_bytes(answer.into_body(), 1 << 16).await.unwrap();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            (&problem["type"], &problem["request_id"]),
            (&"urn:singletrack:problem:internal".into(), &"mine-1".into())
        );
        assert!(!problem.to_string().contains("hunter2"), "{problem}");
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let line = log.lines().find(|line| line.contains("hunter2")).unwrap_or_else(|| panic!("{log}"));
        assert!(line.contains("http.request_id=\"mine-1\""), "{line}");
    }
}
