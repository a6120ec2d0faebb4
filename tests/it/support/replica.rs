//! A replica inside the test's process, and a client of it.

use std::path::PathBuf;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use singletrack::app::{self, Role, Stop};
use singletrack::config::{Config, Settings};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::database::TestDb;
use super::process::GUARD;

/// A replica that runs in this process until it is dropped.
pub struct Replica {
    pub client: Client,
    pub stop: Stop,
    task: Option<JoinHandle<anyhow::Result<()>>>,
}

/// Settings with the short lease of the tests.
pub fn short_lease() -> Settings {
    let text = |text: &str| Some(text.to_owned());
    Settings {
        listen: text("127.0.0.1:0"),
        workers: text("4"),
        heartbeat_interval: text("500ms"),
        heartbeat_timeout: text("5s"),
        kill_grace: text("200ms"),
        reap_interval: text("200ms"),
        drain_timeout: text("5s"),
        ..Settings::default()
    }
}

impl Replica {
    /// API and workers.
    pub async fn start(test: &TestDb) -> Self {
        Self::with(test, short_lease()).await
    }

    /// API alone: nothing that is enqueued is started.
    pub async fn api_only(test: &TestDb) -> Self {
        Self::with(test, Settings { workers: Some("0".into()), ..short_lease() }).await
    }

    /// With settings of the test's own.
    pub async fn with(test: &TestDb, settings: Settings) -> Self {
        Self::guarded_by(test, settings, GUARD.into()).await
    }

    /// The same, with another program as the guard.
    pub async fn guarded_by(test: &TestDb, settings: Settings, guard: PathBuf) -> Self {
        let mut config: Config = settings.resolve(Some(test.url.clone())).unwrap();
        config.worker.guarding.program = guard;
        let listener = app::bind(&config).unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let stop = Stop::default();
        let task = tokio::spawn(app::run(config, test.options(), listener, Role::Serve, stop.clone()));
        Self { client: Client::new(base), stop, task: Some(task) }
    }

    /// Asks it to stop and waits until it has.
    pub async fn finish(mut self) {
        self.stop.ask();
        if let Some(task) = self.task.take() {
            task.await.unwrap().unwrap();
        }
    }
}

/// Speaks to a replica as any client would.
#[derive(Clone)]
pub struct Client {
    pub base: String,
    pub http: reqwest::Client,
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: Value,
}

impl Answer {
    /// The answer to `request`; a body that is not JSON is a string.
    pub async fn of(request: RequestBuilder) -> reqwest::Result<Self> {
        let response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await?;
        Ok(Self { status, headers, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) })
    }

    /// The id in the body: of a run, or of the holder that a problem names.
    pub fn run_id(&self) -> Uuid {
        let id = self.body.get("run_id").or(self.body.get("id")).and_then(Value::as_str);
        id.unwrap_or_else(|| panic!("no run id in {self:?}")).parse().unwrap()
    }

    /// The cause in a problem's type.
    pub fn cause(&self) -> &str {
        assert_eq!(self.headers["content-type"], "application/problem+json", "{self:?}");
        assert_eq!(self.body["status"], self.status, "{self:?}");
        assert_eq!(self.body["request_id"], self.headers["x-request-id"].to_str().unwrap(), "{self:?}");
        self.body["type"].as_str().unwrap().strip_prefix("urn:singletrack:problem:").unwrap()
    }

    /// Where a request that was refused as 422 is wrong: `pointer /priority`, `parameter limit`, `header Prefer`.
    pub fn mistakes(&self) -> Vec<String> {
        assert_eq!((self.status, self.cause()), (422, "invalid-request"), "{self:?}");
        let place = |error: &Value| {
            let named = ["pointer", "parameter", "header"].map(|kind| (kind, error[kind].as_str()));
            let (kind, name) = named.into_iter().find(|(_, name)| name.is_some()).unwrap();
            assert!(error["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{error}");
            format!("{kind} {}", name.unwrap())
        };
        self.body["errors"].as_array().unwrap().iter().map(place).collect()
    }

    /// The names of the members of the body, in alphabetical order.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.body.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }
}

impl Client {
    pub fn new(base: String) -> Self {
        // The service brings its own TLS to its clients; one without must be told of one, though it never uses it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { base, http: reqwest::Client::builder().no_proxy().build().unwrap() }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(self.request(Method::GET, path)).await.unwrap()
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        Answer::of(self.request(Method::POST, path).json(&body)).await.unwrap()
    }

    pub async fn put(&self, path: &str, body: Value) -> Answer {
        Answer::of(self.request(Method::PUT, path).json(&body)).await.unwrap()
    }

    /// Defines a workflow that runs `script` in a shell.
    pub async fn define(&self, id: &str, script: &str) {
        let body = json!({"executor": {"type": "command", "argv": ["sh", "-c", script]}});
        let answer = self.put(&format!("/api/v1/workflows/{id}"), body).await;
        assert!(matches!(answer.status, 200 | 201), "{answer:?}");
    }

    /// Enqueues a run without input.
    pub async fn enqueue(&self, id: &str) -> Answer {
        self.post(&format!("/api/v1/workflows/{id}/runs"), json!({})).await
    }

    /// The run, once it is final.
    pub async fn finished(&self, run_id: Uuid) -> Value {
        let request = self.request(Method::GET, &format!("/api/v1/runs/{run_id}")).header("Prefer", "wait=60");
        let answer = Answer::of(request).await.unwrap();
        assert!(answer.body["finished_at"].is_string(), "not final within a minute: {answer:?}");
        answer.body
    }

    /// The run's whole log.
    pub async fn log(&self, run_id: Uuid) -> String {
        let mut text = String::new();
        let mut cursor = String::new();
        loop {
            let page = self.get(&format!("/api/v1/runs/{run_id}/logs?limit=200{cursor}")).await.body;
            text.extend(page["items"].as_array().unwrap().iter().map(|entry| entry["text"].as_str().unwrap()));
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return text,
            }
        }
    }
}
