//! A server that `http` executors call.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::Router;
use axum::http::HeaderMap;
use axum::response::Response;
use axum::routing::any;
use serde_json::{Value, json};
use singletrack::domain::Lease;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::calls::LIMIT;
use super::eventually;
use super::replica::Client;

/// A request as the target got it.
#[derive(Clone, Debug)]
pub struct Call {
    pub headers: HeaderMap,
    pub body: Value,
}

impl Call {
    /// A header; empty where there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub fn fence(&self) -> i64 {
        self.header("singletrack-fence").parse().unwrap()
    }

    /// What the target shows when it speaks of the run.
    pub fn token(&self) -> &str {
        self.body["callback"]["token"].as_str().unwrap()
    }

    /// The lease that the token stands for.
    pub fn lease(&self) -> Lease {
        Lease::of_token(self.token()).unwrap()
    }
}

/// A server on this machine's loopback, until it is dropped.
pub struct Target {
    url: String,
    calls: Arc<Mutex<Vec<Call>>>,
    hung_up: Arc<AtomicUsize>,
    _server: JoinSet<()>,
}

impl Target {
    /// A server that gives each call, counted from 0, the answer to it.
    pub async fn new<A: Future<Output = Response> + Send + 'static>(
        answer: impl Fn(usize, Call) -> A + Clone + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let (calls, hung_up) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let (seen, given_up) = (calls.clone(), hung_up.clone());
        let hook = move |headers: HeaderMap, Json(body): Json<Value>| async move {
            let call = Call { headers, body };
            let number = {
                let mut seen = seen.lock().unwrap();
                seen.push(call.clone());
                seen.len() - 1
            };
            // The server drops this when the client closes the connection.
            let mut unanswered = Unanswered(Some(given_up));
            let response = answer(number, call).await;
            unanswered.0 = None;
            response
        };
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, Router::new().route("/hook", any(hook))).await.unwrap() });
        Self { url, calls, hung_up, _server: server }
    }

    /// Defines a workflow that calls this server. `more` are fields of the definition, and of its executor.
    pub async fn define(&self, client: &Client, id: &str, more: Value) {
        let mut body = more;
        body["executor"]["type"] = json!("http");
        body["executor"]["url"] = json!(self.url);
        let answer = client.put(&format!("/api/v1/workflows/{id}"), body).await;
        assert!(matches!(answer.status, 200 | 201), "{answer:?}");
    }

    /// What came so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// The call with this number, once it has come.
    pub async fn call(&self, number: usize) -> Call {
        eventually("the target is called", LIMIT, async || self.calls().get(number).cloned()).await
    }

    /// Waits until the clients of so many calls have gone without an answer.
    pub async fn hung_up(&self, calls: usize) {
        let seen = async || (self.hung_up.load(Ordering::SeqCst) == calls).then_some(());
        eventually("the connection is closed", LIMIT, seen).await;
    }
}

/// Counts a call whose client has gone, when it is dropped.
struct Unanswered(Option<Arc<AtomicUsize>>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(hung_up) = &self.0 {
            hung_up.fetch_add(1, Ordering::SeqCst);
        }
    }
}
