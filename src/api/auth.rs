//! Who sends a request, and whether they may. The scope of each route is in the route table of `api/mod.rs`, from where it gets into
//! the OpenAPI document; what is asked for here is what the document says.
//!
//! All good keys are in memory, read anew every few seconds while requests come: a request costs no statement, and neither does
//! guessing. They are read by the pool of what workers say, so that a heartbeat never waits behind lists and blocked enqueues.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use tokio::sync::RwLock;
use tokio::time::sleep;
use url::form_urlencoded;
use utoipa::openapi::path::{Operation, Parameter, ParameterIn};
use utoipa::openapi::{OpenApi, RefOr};

use super::problem::{Place, Problem};
use super::usage::Usage;
use super::{Api, guard};
use crate::domain::{Patterns, Scope, Token, WorkflowId};
use crate::store::{Db, keys};

/// How long what was read is relied on: so long a revoked key may go on elsewhere than where it was revoked.
const FRESH: Duration = Duration::from_secs(5);
/// The same where somebody shows a key that is not among them: it may be new.
const NEW: Duration = Duration::from_secs(1);
/// How often it is looked whether those who listen still may.
const STREAMS: Duration = Duration::from_secs(5);

/// What routes need, by their path and method, as the document has it.
#[derive(Debug)]
struct Needs(HashMap<String, HashMap<Method, Need>>);

/// What an operation needs, and what it takes.
#[derive(Clone, Copy, Debug, Default)]
struct Need {
    /// `None` where it needs no key.
    scope: Option<Scope>,
    /// It has parameters in the query, and looks at them itself.
    takes_query: bool,
}

impl Needs {
    /// What `document` says.
    fn of(document: &OpenApi) -> Self {
        let scope = |operation: &Operation| {
            // {"api_key": ["read"]}: the type keeps its members to itself.
            let said = serde_json::to_value(&operation.security).unwrap_or_default();
            said.as_array().into_iter().flatten().find_map(|one| one["api_key"][0].as_str()?.parse().ok())
        };
        let need = |operation: &Operation| {
            let parameters = operation.parameters.iter().flatten();
            let in_query = |parameter: &RefOr<Parameter>| matches!(parameter, RefOr::T(one) if one.parameter_in == ParameterIn::Query);
            Need { scope: scope(operation), takes_query: { parameters }.any(in_query) }
        };
        let paths = document.paths.paths.iter().map(|(path, item)| {
            let operations = [
                (Method::GET, &item.get),
                (Method::PUT, &item.put),
                (Method::POST, &item.post),
                (Method::DELETE, &item.delete),
            ];
            let needs =
                operations.into_iter().filter_map(|(method, operation)| Some((method, need(operation.as_ref()?))));
            (path.clone(), needs.collect())
        });
        Self(paths.collect())
    }

    /// What a request needs.
    fn of_request(&self, method: &Method, path: Option<&MatchedPath>) -> Need {
        let open = Need { scope: None, takes_query: true };
        let Some(path) = path else { return open }; // no route: that may be known
        let Some(methods) = self.0.get(path.as_str()) else {
            // What is not documented is not for everybody.
            return Need { scope: path.as_str().starts_with("/api/").then_some(Scope::Admin), ..open };
        };
        // A method that the route does not have is refused as that.
        *methods.get(if method == Method::HEAD { &Method::GET } else { method }).unwrap_or(&open)
    }
}

/// A good key.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) id: String,
    pub(super) name: String,
    hash: Vec<u8>,
    scopes: Vec<Scope>,
    workflows: Option<Patterns>,
    expires: Option<Instant>,
}

impl Key {
    fn of(good: keys::Good, now: Instant) -> Option<Self> {
        Some(Self {
            id: good.id,
            name: good.name,
            hash: good.secret_hash,
            // What another version may give besides means nothing here.
            scopes: good.scopes.iter().filter_map(|scope| scope.parse().ok()).collect(),
            workflows: good.workflows.map(Patterns::new).transpose().ok()?,
            expires: good.seconds.and_then(|seconds| now.checked_add(Duration::try_from_secs_f64(seconds).ok()?)),
        })
    }

    fn may(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope) || self.scopes.contains(&Scope::Admin)
    }
}

/// Who sends a request.
#[derive(Clone, Debug)]
pub(super) enum Caller {
    /// No keys are asked for.
    Anybody,
    /// Keys are, and this call needs none.
    Nobody,
    /// Who has this key.
    Key(Arc<Key>),
}

impl Caller {
    fn key(&self) -> Option<&Key> {
        match self {
            Self::Key(key) => Some(key),
            Self::Anybody | Self::Nobody => None,
        }
    }

    /// The key's name, where there is one.
    pub(super) fn name(&self) -> Option<&str> {
        self.key().map(|key| key.name.as_str())
    }

    /// The key's id, where there is one; empty otherwise.
    pub(super) fn key_id(&self) -> &str {
        self.key().map_or("", |key| &key.id)
    }

    /// Whether it is known who this is, or does not matter.
    pub(super) fn is_let_in(&self) -> bool {
        !matches!(self, Self::Nobody)
    }

    fn patterns(&self) -> Option<&Patterns> {
        self.key()?.workflows.as_ref()
    }

    /// Whether this workflow is there for them.
    pub(super) fn sees(&self, workflow_id: &str) -> bool {
        self.patterns().is_none_or(|patterns| patterns.matches(workflow_id))
    }

    /// The workflows that are there for them, as a regular expression of Postgres; `None` for all.
    pub(super) fn bound(&self) -> Option<String> {
        self.patterns().map(Patterns::regex)
    }

    /// Refuses a workflow that is not there for them as one that is not there.
    pub(super) fn check(&self, id: &WorkflowId) -> Result<(), Problem> {
        if self.sees(id.as_str()) { Ok(()) } else { Err(Problem::no_workflow(id)) }
    }

    /// Refuses who may not act on what belongs to all workflows.
    pub(super) fn check_unbound(&self) -> Result<(), Problem> {
        if self.patterns().is_none() { Ok(()) } else { Err(Problem::bound_key()) }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Ok(parts.extensions.get().cloned().unwrap_or(Self::Nobody))
    }
}

/// What was read of the keys.
struct Book {
    read: Instant,
    /// `None` where none was ever made.
    keys: Option<HashMap<String, Arc<Key>>>,
}

/// What is known of the keys.
#[derive(Default)]
struct Shelf {
    book: Option<Book>,
    /// When they could not be read last.
    failed: Option<Instant>,
}

/// The keys of the service.
pub struct Keys {
    always: bool,
    shelf: RwLock<Shelf>,
    /// Which of them were used.
    pub(super) usage: Usage,
}

impl Keys {
    /// Keys that are asked for as soon as one was made, or `always`. `rate` is how many requests per second one of them may send;
    /// `None`: any number.
    pub fn new(always: bool, rate: Option<u32>) -> Self {
        Self { always, shelf: RwLock::default(), usage: Usage::new(rate) }
    }

    /// Reads them anew with the next request.
    pub(super) async fn forget(&self) {
        self.shelf.write().await.book = None;
    }

    /// Whose request it is, by its header; a problem where keys are asked for and it has no good one.
    async fn caller(&self, db: &Db, headers: &HeaderMap) -> Result<Caller, Problem> {
        let token = bearer(headers);
        let mut found = self.look(db, FRESH, token.as_ref()).await?;
        if let (Look::Unknown, Some(_)) = (&found, &token) {
            found = self.look(db, NEW, token.as_ref()).await?;
        }
        match found {
            Look::Off => Ok(Caller::Anybody),
            Look::Unknown => Err(Problem::no_key(headers.contains_key(header::AUTHORIZATION))),
            Look::Good(key) => Ok(Caller::Key(key)),
        }
    }

    /// Looks for a key in what was read within `fresh`, by one request for all that wait for it: where that one fails, it fails for all of
    /// them, or each would wait as long again for a database that hangs.
    async fn look(&self, db: &Db, fresh: Duration, token: Option<&Token>) -> Result<Look, Problem> {
        let is_fresh = |book: &&Book| book.read.elapsed() < fresh;
        let came = Instant::now();
        if let Some(book) = self.shelf.read().await.book.as_ref().filter(is_fresh) {
            return Ok(self.find(book, token));
        }
        let mut shelf = self.shelf.write().await;
        if shelf.book.as_ref().filter(is_fresh).is_none() {
            if shelf.failed.is_some_and(|failed| failed > came) {
                return Err(Problem::keys_unread());
            }
            let read = Instant::now();
            let good = db.with(async |connection| keys::good(connection).await).await;
            let good = good.inspect_err(|_| shelf.failed = Some(Instant::now()))?;
            let keys = good.map(|good| {
                let keys = good.into_iter().filter_map(|good| Key::of(good, read));
                keys.map(|key| (key.id.clone(), Arc::new(key))).collect()
            });
            shelf.book = Some(Book { read, keys });
        }
        Ok(shelf.book.as_ref().map_or(Look::Unknown, |book| self.find(book, token)))
    }

    /// Waits until somebody who was let in would not be any more: what is sent to them for long ends then. While the database can't be
    /// asked there is nothing to send.
    pub(super) async fn until_refused(&self, db: &Db, caller: &Caller) {
        loop {
            sleep(STREAMS).await;
            if self.look(db, FRESH, None).await.is_err() {
                continue;
            }
            let shelf = self.shelf.read().await;
            let Some(book) = &shelf.book else { continue };
            let goes_on = match (&book.keys, caller) {
                (None, _) => !self.always,
                (Some(keys), Caller::Key(key)) => {
                    keys.get(&key.id).is_some_and(|key| key.expires.is_none_or(|expires| Instant::now() < expires))
                }
                (Some(_), Caller::Anybody | Caller::Nobody) => false,
            };
            if !goes_on {
                return;
            }
        }
    }

    fn find(&self, book: &Book, token: Option<&Token>) -> Look {
        let keys = match &book.keys {
            None if self.always => return Look::Unknown,
            None => return Look::Off,
            Some(keys) => keys,
        };
        let Some(token) = token else { return Look::Unknown };
        let key = keys.get(&token.id).filter(|key| token.is_of(&key.hash));
        let key = key.filter(|key| key.expires.is_none_or(|expires| Instant::now() < expires));
        key.map_or(Look::Unknown, |key| Look::Good(key.clone()))
    }
}

enum Look {
    Off,
    Unknown,
    Good(Arc<Key>),
}

fn bearer(headers: &HeaderMap) -> Option<Token> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") { token.trim().parse().ok() } else { None }
}

/// What stands before all routes.
#[derive(Clone)]
pub(super) struct Gate(Arc<(Api, Needs)>);

impl Gate {
    /// One that asks for what `document` says.
    pub(super) fn new(api: Api, document: &OpenApi) -> Self {
        Self(Arc::new((api, Needs::of(document))))
    }
}

/// Lets in who may do what they ask for.
pub(super) async fn admit(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    let (api, needs) = &*gate.0;
    let (mut parts, body) = request.into_parts();
    let need = needs.of_request(&parts.method, parts.extensions.get());
    let admitted = check(api, need.scope, &parts).await;
    match admitted.and_then(|caller| check_query(need, &parts).map(|()| caller)) {
        Ok(caller) => {
            parts.extensions.insert(caller);
            next.run(Request::from_parts(parts, body)).await
        }
        Err(problem) => problem.into_response(),
    }
}

/// Refuses parameters where there are none: whoever wrote `?on_conflict=wait` would believe that it is heeded. The two routes of the
/// replaced server, and probes, ignore what they do not know.
fn check_query(need: Need, request: &Parts) -> Result<(), Problem> {
    let query = request.uri.query().filter(|_| !need.takes_query && request.uri.path().starts_with("/api/v1/"));
    match query.and_then(|query| form_urlencoded::parse(query.as_bytes()).next()) {
        None => Ok(()),
        Some((name, _)) => Err(Problem::invalid_at(
            Place::Parameter(name.into_owned()),
            "is not a parameter of this call, which has none in its query: what it takes is in its body and headers",
        )),
    }
}

async fn check(api: &Api, scope: Option<Scope>, request: &Parts) -> Result<Caller, Problem> {
    guard::check_origin(&api.facts, request)?;
    if request.uri.path().starts_with("/api/") {
        guard::check_accept(request)?;
    }
    let Some(scope) = scope else {
        if !request.uri.path().starts_with("/api/") {
            // Probes depend on nothing, and come by an address where others can come too.
            let is_local = api.facts.listen.ip().is_loopback();
            return if is_local {
                guard::check_host(&api.facts, request).map(|()| Caller::Nobody)
            } else {
                Ok(Caller::Nobody)
            };
        }
        guard::check_host(&api.facts, request)?;
        let caller = api.keys.caller(&api.flights, &request.headers).await;
        return caller.or_else(|problem| if problem.is_of_caller() { Ok(Caller::Nobody) } else { Err(problem) });
    };
    if request.headers.get(header::AUTHORIZATION).is_none() {
        guard::check_host(&api.facts, request)?;
    }
    let caller = api.keys.caller(&api.flights, &request.headers).await?;
    match &caller {
        Caller::Key(key) => {
            // A worker that is not let in would lose what it holds.
            let counted = !request.uri.path().starts_with("/api/v1/leases/");
            let noted = api.keys.usage.note(&key.id, counted, Instant::now());
            noted.map_err(|seconds| Problem::too_many_requests(&key.name, seconds))?;
            if key.may(scope) { Ok(caller) } else { Err(Problem::not_allowed(&key.name, scope)) }
        }
        // A page that was led here by another name can send any header, and there is no key that it would have to know.
        Caller::Anybody | Caller::Nobody => guard::check_host(&api.facts, request).map(|()| caller),
    }
}
