//! The client half of the command line: one service, reached over HTTP as any program would reach it.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, RequestBuilder, Response, redirect};
use serde_json::Value;
use url::{Host, Url};

use super::USAGE;
use crate::tls;

const DEFAULT_URL: &str = "http://127.0.0.1:7410";
/// How long the service may take to let somebody in, and to answer a call that does not wait for anything.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a stream may last; whoever reads it comes back.
const STREAM_TIMEOUT: Duration = Duration::from_hours(24);
/// Entries of a page of a list.
const PAGE: usize = 200;

/// Where the service is. The key has no flag: everybody on a machine sees the flags of its processes.
#[derive(Args, Debug)]
pub(super) struct Connection {
    /// Where the service is; the variable SINGLETRACK_API_KEY is its key. [default: http://127.0.0.1:7410]
    #[arg(long, env = "SINGLETRACK_URL", value_name = "URL")]
    url: Option<String>,
}

/// Why a command failed, in words that say what to do.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The command line, the environment or a file is wrong.
    #[error("{0}")]
    Usage(String),
    /// The service does not let us.
    #[error("{0}")]
    Unauthorised(String),
    /// The slot is taken or its workflow is paused, and nothing was enqueued.
    #[error("{0}")]
    Conflict(String),
    /// Nobody was there; nothing was sent.
    #[error("{0}")]
    Unreached(String),
    /// No answer came; whether the request did, nobody knows.
    #[error("{0}")]
    NoAnswer(String),
    /// It refused.
    #[error("{0}")]
    Failed(String),
}

impl Failure {
    /// What the process ends with.
    pub(super) fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Usage(_) => USAGE,
            Self::Conflict(_) => 3,
            Self::Unauthorised(_) => 4,
            Self::Unreached(_) | Self::NoAnswer(_) | Self::Failed(_) => 1,
        })
    }
}

/// One service.
#[derive(Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
}

/// What it answered.
pub(super) struct Answer {
    pub(super) status: u16,
    is_problem: bool,
    /// Null where it is not JSON.
    pub(super) body: Value,
    location: Option<String>,
}

impl Answer {
    /// The cause of a problem; none where the answer is no problem of this service.
    pub(super) fn problem(&self) -> Option<&str> {
        self.body["type"].as_str()?.strip_prefix("urn:singletrack:problem:").filter(|_| self.is_problem)
    }
}

impl Connection {
    /// A client of the service that flag and environment name. Nothing is sent yet.
    pub(super) fn client(&self) -> Result<Client, Failure> {
        let given = self.url.as_deref().map(str::trim).filter(|url| !url.is_empty());
        let url = base(given.unwrap_or(DEFAULT_URL))
            .map_err(|mistake| Failure::Usage(format!("SINGLETRACK_URL: {mistake}")))?;
        let key = std::env::var("SINGLETRACK_API_KEY").unwrap_or_default();
        Client::new(&url, key.trim())
    }
}

fn base(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    // Not repeated: it may hold a password.
    let url = url.ok_or(format!("is not a URL such as {DEFAULT_URL} or https://runs.example.com"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must not hold a user or password: the key is SINGLETRACK_API_KEY".into());
    }
    if url.query().is_some() || url.fragment().is_some() || url.path().trim_end_matches('/').ends_with("/api/v1") {
        return Err("leave out what comes after the host, such as /api/v1: it is added".into());
    }
    Ok(url)
}

impl Client {
    /// A client of the service at `url`; no key where `key` is empty.
    pub(super) fn new(url: &Url, key: &str) -> Result<Self, Failure> {
        let mut headers = HeaderMap::new();
        if !key.is_empty() {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .map_err(|_| Failure::Usage("SINGLETRACK_API_KEY: has a character that no key has".into()))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls::trusting(tls::roots()))
            .user_agent(concat!("singletrack/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT)
            // The key is for this URL only, and a PUT must not become a GET on the way.
            .redirect(redirect::Policy::none());
        // HTTPS_PROXY and its like are heeded, as by other tools, but no proxy reaches this machine's loopback for us.
        let builder = if is_loopback(url) { builder.no_proxy() } else { builder };
        let http =
            builder.build().map_err(|error| Failure::Failed(format!("can't set up HTTP: {}", root_cause(error))))?;
        Ok(Self { http, base: url.as_str().trim_end_matches('/').to_owned() })
    }

    /// What is at `path`, below `/api/v1`; `None` where the service has no such thing.
    pub(super) async fn get(&self, path: &str) -> Result<Option<Value>, Failure> {
        let answer = self.ask(self.request(Method::GET, path)).await?;
        if answer.problem() == Some("not-found") { Ok(None) } else { self.good(answer).map(Some) }
    }

    /// The entries of the list at `path`, at most `limit`, from as many pages as it takes; and whether there are more.
    pub(super) async fn list(
        &self,
        path: &str,
        query: &[(&str, String)],
        limit: usize,
    ) -> Result<(Vec<Value>, bool), Failure> {
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let page = (limit - items.len()).min(PAGE).to_string();
            let request = self.request(Method::GET, path).query(query).query(&[("limit", page)]);
            let request = match &cursor {
                Some(cursor) => request.query(&[("cursor", cursor)]),
                None => request,
            };
            let mut answer = self.good(self.ask(request).await?)?;
            if let Value::Array(entries) = answer["items"].take() {
                items.extend(entries);
            }
            cursor = answer["next_cursor"].as_str().map(str::to_owned);
            if cursor.is_none() || items.len() >= limit {
                return Ok((items, cursor.is_some()));
            }
        }
    }

    /// Puts `body` at `path`; what the service answered.
    pub(super) async fn put(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.good(self.send(Method::PUT, path, body, &[]).await?)
    }

    /// Deletes what is at `path`.
    pub(super) async fn delete(&self, path: &str) -> Result<Value, Failure> {
        self.good(self.ask(self.request(Method::DELETE, path)).await?)
    }

    /// Posts `body` to `path`; what the service answered.
    pub(super) async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.good(self.send(Method::POST, path, body, &[]).await?)
    }

    /// Posts `body` to `path`; the status of the answer, and the answer, whatever it is.
    pub(super) async fn ask_for(&self, path: &str, body: &Value) -> Result<(u16, Value), Failure> {
        let answer = self.send(Method::POST, path, body, &[]).await?;
        Ok((answer.status, answer.body))
    }

    /// Sends `body` to `path`; the answer, whatever it is.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        body: &Value,
        headers: &[(&str, &str)],
    ) -> Result<Answer, Failure> {
        let request = self.request(method, path).header(CONTENT_TYPE, "application/json").body(body.to_string());
        self.ask(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))).await
    }

    /// The run, when it is final, or at most `seconds` from now.
    pub(super) async fn run_once_over(&self, id: &str, seconds: u64) -> Result<Option<Value>, Failure> {
        let request = self.request(Method::GET, &format!("/runs/{id}")).header("Prefer", format!("wait={seconds}"));
        let answer = self.ask(request).await?;
        if answer.problem() == Some("not-found") { Ok(None) } else { self.good(answer).map(Some) }
    }

    /// A stream of server-sent events at `path`, after the event `last`; `None` where all of it was told.
    pub(super) async fn open(
        &self,
        path: &str,
        query: &[(&str, String)],
        last: Option<&str>,
    ) -> Result<Option<Response>, Failure> {
        let request = self.request(Method::GET, path).query(query).header(ACCEPT, "text/event-stream");
        let request = last.into_iter().fold(request, |request, id| request.header("Last-Event-ID", id));
        let response = request.timeout(STREAM_TIMEOUT).send().await.map_err(|error| self.unreachable(error))?;
        match response.status().as_u16() {
            200 => Ok(Some(response)),
            204 => Ok(None),
            _ => Err(match self.good(self.answer(response).await?) {
                Ok(_) => Failure::Failed(format!("{} gave no stream of events", self.base)),
                Err(failure) => failure,
            }),
        }
    }

    /// Where people look at a run.
    pub(super) fn page_of_run(&self, id: &str) -> String {
        format!("{}/#/runs/{id}", self.base)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/api/v1{path}", self.base))
    }

    fn unreachable(&self, error: reqwest::Error) -> Failure {
        let kind = if error.is_connect() { Failure::Unreached } else { Failure::NoAnswer };
        kind(format!(
            "no answer from {}: {}. Is the service running there? SINGLETRACK_URL or --url says where it is.",
            self.base,
            root_cause(error)
        ))
    }

    async fn ask(&self, request: RequestBuilder) -> Result<Answer, Failure> {
        self.answer(request.send().await.map_err(|error| self.unreachable(error))?).await
    }

    async fn answer(&self, response: Response) -> Result<Answer, Failure> {
        let status = response.status().as_u16();
        let text = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let is_problem = text(CONTENT_TYPE).is_some_and(|kind| kind.starts_with("application/problem+json"));
        let location = text(LOCATION).map(str::to_owned);
        let body = response.bytes().await.map_err(|error| self.unreachable(error))?;
        Ok(Answer { status, is_problem, body: serde_json::from_slice(&body).unwrap_or_default(), location })
    }

    /// The body of a good answer.
    pub(super) fn good(&self, answer: Answer) -> Result<Value, Failure> {
        let base = &self.base;
        let told = ["detail", "title"].into_iter().find_map(|name| answer.body[name].as_str());
        let told = told.filter(|_| answer.is_problem);
        let cause = answer.problem();
        Err(match answer.status {
            204 => return Ok(Value::Null),
            200..=299 if answer.body.is_object() => return Ok(answer.body),
            _ if matches!(cause, Some("slot-taken" | "workflow-paused" | "too-many-waiting")) => {
                Failure::Conflict(told.unwrap_or("the slot is taken").to_owned())
            }
            401 | 403 => Failure::Unauthorised(match told {
                Some(told) if answer.status == 401 => format!("{told} The key is taken from SINGLETRACK_API_KEY."),
                Some(told) => told.to_owned(),
                None => {
                    format!("{base} lets nobody in without a good key ({}): set SINGLETRACK_API_KEY", answer.status)
                }
            }),
            300..=399 => Failure::Failed(format!(
                "{base} leads to {}: set SINGLETRACK_URL to where the service itself is",
                answer.location.as_deref().unwrap_or("elsewhere")
            )),
            _ => Failure::Failed(told.map_or_else(
                || format!("{base} answered {}, and not as Singletrack does: is SINGLETRACK_URL right?", answer.status),
                str::to_owned,
            )),
        })
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(v4)) => v4.is_loopback(),
        Some(Host::Ipv6(v6)) => v6.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// What is at the bottom of it: what is above says no more than that there was a request.
fn root_cause(error: reqwest::Error) -> String {
    anyhow::Error::from(error).root_cause().to_string()
}
