//! Keys: who may use the API. The first one closes it to everybody who has none.

use std::str::FromStr;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use rand::random;
use serde::{Deserialize, Serialize};

use super::auth::Caller;
use super::extract::{Actor, Id, Json, refuse_headers};
use super::problem::{Mistake, Place, Problem};
use super::runs::Whole;
use super::{Api, to_its_end};
use crate::domain::{Patterns, Scope, Token};
use crate::store::Db;
use crate::store::keys::{self, Key};

const TAG: &str = "keys";
/// Longest time until a key expires, in seconds: a hundred years.
const LONGEST: f64 = 100.0 * 365.0 * 86_400.0;

/// A key to make.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "ci", "scopes": ["enqueue", "read"], "workflows": ["deploy@*"], "expires_in_seconds": 7776000}))]
pub(super) struct NewKey {
    /// The actor of what is done with it: 1 to 128 characters, and no other good key's name.
    #[schema(min_length = 1, max_length = 128, example = "ci")]
    name: String,
    /// What it may: at least one. `admin` has the others in it.
    #[schema(min_items = 1, max_items = 4)]
    scopes: Vec<Scope>,
    /// The workflows it is for, as patterns of full ids in which `*` stands for any characters: 1 to 100. Others do not exist for it.
    /// Without it, all.
    #[schema(min_items = 1, max_items = 100, example = json!(["deploy@*", "etl-*"]))]
    workflows: Option<Vec<String>>,
    /// In how many seconds it expires; without it, never.
    #[schema(minimum = 1, maximum = 3153600000_i64)]
    expires_in_seconds: Option<f64>,
}

impl NewKey {
    fn check(&self) -> Result<(), Problem> {
        let is_name = (1..=128).contains(&self.name.chars().count()) && !self.name.contains(char::is_control);
        let checks = [
            ("/name", (!is_name).then(|| "must be 1 to 128 characters, none of them a control character".to_owned())),
            (
                "/scopes",
                self.scopes.is_empty().then(|| "must name at least one of read, enqueue, work, admin".to_owned()),
            ),
            ("/workflows", self.workflows.clone().and_then(|list| Patterns::new(list).err())),
            (
                "/expires_in_seconds",
                self.expires_in_seconds
                    .filter(|seconds| !(1.0..=LONGEST).contains(seconds))
                    .map(|seconds| format!("{seconds} is out of range: 1 to {LONGEST} seconds")),
            ),
        ];
        let mistake =
            |(at, mistake): (&str, _)| Some(Mistake { place: Place::Pointer(at.to_owned()), detail: mistake? });
        let mistakes: Vec<_> = checks.into_iter().filter_map(mistake).collect();
        if mistakes.is_empty() { Ok(()) } else { Err(Problem::invalid(mistakes)) }
    }
}

/// A key that was made.
#[derive(Serialize, utoipa::ToSchema)]
pub(super) struct Made {
    #[serde(flatten)]
    key: Key,
    /// The key itself, for the header `Authorization: Bearer`. It is shown this once, and kept nowhere.
    #[schema(example = "st_3f6d2a1b4c5d_0f...")]
    token: String,
}

/// A key's id in a path.
pub(super) struct KeyId(String);

impl FromStr for KeyId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_id = text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_id { Ok(Self(text.to_owned())) } else { Err("is not a key's id such as 3f6d2a1b4c5d".into()) }
    }
}

/// Keys
///
/// All of them, newest first, also those that were revoked or have expired; none shows its secret.
#[utoipa::path(
    get, path = "/api/v1/keys", operation_id = "list_keys", tag = TAG,
    responses((status = 200, body = Whole<Key>), (status = 503, body = Problem)))]
pub(super) async fn list(State(db): State<Db>, caller: Caller) -> Result<axum::Json<Whole<Key>>, Problem> {
    caller.check_unbound()?;
    let items = db.with(async |connection| keys::list(connection).await).await?;
    Ok(axum::Json(Whole { items }))
}

/// Make a key
///
/// The answer is the only one that has the key. With the first key that is ever made the service begins to ask for one, within five
/// seconds on every replica, and goes on when all of them are revoked.
#[utoipa::path(
    post, path = "/api/v1/keys", operation_id = "create_key", tag = TAG,
    params(("Singletrack-Actor" = Option<String>, Header, description = "Who does it, on trust; else the peer's address")),
    request_body = NewKey,
    responses((status = 201, body = Made), (status = 400, body = Problem),
              (status = 409, body = Problem, description = "`key-name-taken`: a key that is not revoked has this name"),
              (status = 413, body = Problem), (status = 415, body = Problem), (status = 422, body = Problem),
              (status = 503, body = Problem)))]
pub(super) async fn create(
    State(api): State<Api>,
    caller: Caller,
    Actor(actor): Actor,
    headers: HeaderMap,
    Json(new): Json<NewKey>,
) -> Result<Response, Problem> {
    caller.check_unbound()?;
    refuse_headers(&headers, &["Idempotency-Key"])?;
    new.check()?;
    let NewKey { name, scopes, workflows, expires_in_seconds: seconds } = new;
    let token = Token::new(random(), random());
    let (db, named) = (api.db.clone(), name.clone());
    let wanted = keys::NewKey { name, scopes, workflows, seconds };
    let made = to_its_end(async move {
        let text = token.reveal();
        let made = db.with(async |connection| keys::create(connection, &token, &wanted, Some(&actor)).await).await?;
        Ok::<_, Problem>(made.map(|key| Made { key, token: text }))
    })
    .await??;
    api.keys.forget().await;
    let made = made.ok_or_else(|| Problem::key_name_taken(&named))?;
    tracing::info!(key.id = made.key.id, key.name = made.key.name, by = made.key.created_by, "key created");
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], axum::Json(made)).into_response())
}

/// Revoke a key
///
/// From now on this replica refuses it; the others within five seconds. To revoke what is revoked changes nothing.
#[utoipa::path(
    delete, path = "/api/v1/keys/{id}", operation_id = "revoke_key", tag = TAG,
    params(("id" = String, Path, description = "The key's id", example = "3f6d2a1b4c5d"),
           ("Singletrack-Actor" = Option<String>, Header, description = "Who does it, on trust; else the peer's address")),
    responses((status = 204), (status = 404, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn revoke(
    State(api): State<Api>,
    caller: Caller,
    Id(KeyId(id)): Id<KeyId>,
    Actor(actor): Actor,
) -> Result<StatusCode, Problem> {
    caller.check_unbound()?;
    let (db, key) = (api.db.clone(), id.clone());
    let revoke = async move { db.with(async |connection| keys::revoke(connection, &key, Some(&actor)).await).await };
    let known = to_its_end(revoke).await??;
    api.keys.forget().await;
    if known { Ok(StatusCode::NO_CONTENT) } else { Err(Problem::not_found(&format!("No key has the id {id}."))) }
}
