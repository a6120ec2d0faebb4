//! The client half of the command line: one service, reached over HTTP as any program would reach it.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, RequestBuilder, redirect};
use serde_json::Value;
use url::{Host, Url};

use super::USAGE;
use crate::tls;

const DEFAULT_URL: &str = "http://127.0.0.1:7410";
/// How long the service may take to let somebody in, and to answer a call that does not wait for anything.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

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
    /// It was not reached, or it refused.
    #[error("{0}")]
    Failed(String),
}

impl Failure {
    /// What the process ends with.
    pub(super) fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Usage(_) => USAGE,
            Self::Unauthorised(_) => 4,
            Self::Failed(_) => 1,
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
struct Answer {
    status: u16,
    is_problem: bool,
    /// Null where it is not JSON.
    body: Value,
    location: Option<String>,
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
        let is_missing = answer.is_problem && answer.body["type"] == "urn:singletrack:problem:not-found";
        if is_missing { Ok(None) } else { self.good(answer).map(Some) }
    }

    /// Puts `body` at `path`; what the service answered.
    pub(super) async fn put(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let request = self.request(Method::PUT, path).header(CONTENT_TYPE, "application/json").body(body.to_string());
        let answer = self.ask(request).await?;
        self.good(answer)
    }

    /// Posts `body` to `path`; the status of the answer, and the answer, whatever it is.
    pub(super) async fn post(&self, path: &str, body: &Value) -> Result<(u16, Value), Failure> {
        let request = self.request(Method::POST, path).header(CONTENT_TYPE, "application/json").body(body.to_string());
        let answer = self.ask(request).await?;
        Ok((answer.status, answer.body))
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/api/v1{path}", self.base))
    }

    async fn ask(&self, request: RequestBuilder) -> Result<Answer, Failure> {
        let unreachable = |error: reqwest::Error| {
            Failure::Failed(format!(
                "no answer from {}: {}. Is the service running there? SINGLETRACK_URL or --url says where it is.",
                self.base,
                root_cause(error)
            ))
        };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status().as_u16();
        let text = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let is_problem = text(CONTENT_TYPE).is_some_and(|kind| kind.starts_with("application/problem+json"));
        let location = text(LOCATION).map(str::to_owned);
        let body = response.bytes().await.map_err(unreachable)?;
        Ok(Answer { status, is_problem, body: serde_json::from_slice(&body).unwrap_or_default(), location })
    }

    /// The body of a good answer.
    fn good(&self, answer: Answer) -> Result<Value, Failure> {
        let base = &self.base;
        let told = ["detail", "title"].into_iter().find_map(|name| answer.body[name].as_str());
        let told = told.filter(|_| answer.is_problem);
        Err(match answer.status {
            200..=299 if answer.body.is_object() => return Ok(answer.body),
            401 | 403 => Failure::Unauthorised(told.map_or_else(
                || format!("{base} lets nobody in without a good key ({}): set SINGLETRACK_API_KEY", answer.status),
                str::to_owned,
            )),
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
