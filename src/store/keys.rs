//! API keys. Rows are never deleted: that there is one is what makes every request need a key.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;

use crate::domain::{Scope, Token};

/// A key as people see it.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct Key {
    /// The part of the key that is no secret: `st_<id>_<secret>`.
    #[schema(example = "3f6d2a1b4c5d")]
    pub id: String,
    /// The actor of what is done with it.
    #[schema(example = "ci")]
    pub name: String,
    /// What it may.
    #[schema(value_type = Vec<Scope>)]
    pub scopes: Vec<String>,
    /// Patterns of full workflow ids: others do not exist for it. Null: all workflows.
    #[schema(example = json!(["deploy@*"]))]
    pub workflows: Option<Vec<String>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// By whom.
    pub created_by: String,
    /// From then on it is refused; null: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// Since when it is refused; null: it is not.
    pub revoked_at: Option<DateTime<Utc>>,
    /// By whom.
    pub revoked_by: Option<String>,
    /// When it was last used, to within a few minutes; null: never.
    pub last_used_at: Option<DateTime<Utc>>,
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Its name: 1 to 128 characters, and no other good key's.
    pub name: String,
    /// What it may: at least one.
    pub scopes: Vec<Scope>,
    /// Patterns of workflow ids; `None` for all.
    pub workflows: Option<Vec<String>>,
    /// In how many seconds it expires, by the database's clock; `None` for never.
    pub seconds: Option<f64>,
}

/// Makes a key of `token`, in the name of `by`, or of the database user. `None` where a key that is not revoked has the name.
pub async fn create(
    connection: &mut PgConnection,
    token: &Token,
    new: &NewKey,
    by: Option<&str>,
) -> sqlx::Result<Option<Key>> {
    let scopes: Vec<String> = new.scopes.iter().map(|scope| scope.as_str().to_owned()).collect();
    let hash = token.hash();
    let made = sqlx::query_as!(
        Key,
        r#"
        with made as (
            insert into api_keys (id, name, secret_hash, scopes, workflows, created_by, expires_at)
            values ($1, $2, $3, $4, $5, coalesce($6, session_user::text), now() + make_interval(secs => $7::float8))
            on conflict (name) where revoked_at is null do nothing
            returning *
        ),
        audited as (
            insert into audit_log (actor, action, object, detail)
            select created_by, 'key-created', id,
                   jsonb_build_object('name', name, 'scopes', scopes, 'workflows', workflows, 'expires_at', expires_at)
            from made
        )
        select id as "id!", name as "name!", scopes as "scopes!", workflows, created_at as "created_at!",
               created_by as "created_by!", expires_at, revoked_at, revoked_by, last_used_at
        from made
        "#,
        token.id,
        new.name,
        hash.as_slice(),
        &scopes,
        new.workflows.as_deref(),
        by,
        new.seconds,
    )
    .fetch_optional(connection)
    .await?;
    Ok(made)
}

/// All keys, newest first; those that were revoked or have expired too.
pub async fn list(connection: &mut PgConnection) -> sqlx::Result<Vec<Key>> {
    sqlx::query_as!(
        Key,
        "select id, name, scopes, workflows, created_at, created_by, expires_at, revoked_at, revoked_by, last_used_at
         from api_keys order by created_at desc, id"
    )
    .fetch_all(connection)
    .await
}

/// Revokes a key, in the name of `by`, or of the database user; once revoked it stays as it is. Whether there is such a key.
pub async fn revoke(connection: &mut PgConnection, id: &str, by: Option<&str>) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"
        with revoked as (
            update api_keys
            set revoked_at = now(), revoked_by = coalesce($2, session_user::text)
            where id = $1 and revoked_at is null
            returning id, name, revoked_by
        ),
        audited as (
            insert into audit_log (actor, action, object, detail)
            select revoked_by, 'key-revoked', id, jsonb_build_object('name', name) from revoked
        )
        select exists (select from api_keys where id = $1) as "known!"
        "#,
        id,
        by,
    )
    .fetch_one(connection)
    .await
}

/// A key that opens something.
#[derive(Clone, Debug)]
pub struct Good {
    /// What it is known by.
    pub id: String,
    /// The actor of what is done with it.
    pub name: String,
    /// SHA-256 of its secret.
    pub secret_hash: Vec<u8>,
    /// What it may, as it is stored: another version may have written it.
    pub scopes: Vec<String>,
    /// Patterns of workflow ids; `None` for all.
    pub workflows: Option<Vec<String>>,
    /// In how many seconds it expires; `None` for never.
    pub seconds: Option<f64>,
}

/// The keys that are good now; `None` where none was ever made.
pub async fn good(connection: &mut PgConnection) -> sqlx::Result<Option<Vec<Good>>> {
    let rows = sqlx::query!(
        r#"
        select id, name, secret_hash, scopes, workflows,
               extract(epoch from expires_at - clock_timestamp())::float8 as seconds,
               revoked_at is null and coalesce(expires_at > clock_timestamp(), true) as "good!"
        from api_keys
        "#
    )
    .fetch_all(connection)
    .await?;
    if rows.is_empty() {
        return Ok(None);
    }
    let good = rows.into_iter().filter(|row| row.good).map(|row| Good {
        id: row.id,
        name: row.name,
        secret_hash: row.secret_hash,
        scopes: row.scopes,
        workflows: row.workflows,
        seconds: row.seconds,
    });
    Ok(Some(good.collect()))
}

/// Whether a key is good now, of whatever scope.
pub async fn any_good(connection: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar!(
        r#"
        select exists (select from api_keys where revoked_at is null and coalesce(expires_at > now(), true)) as "any!"
        "#
    )
    .fetch_one(connection)
    .await
}

/// These keys were used.
pub async fn used(connection: &mut PgConnection, ids: &[String]) -> sqlx::Result<()> {
    sqlx::query!(
        "with used as (select id from api_keys where id = any($1) order by id for update skip locked)
         update api_keys k set last_used_at = now() from used u where k.id = u.id",
        ids
    )
    .execute(connection)
    .await?;
    Ok(())
}
