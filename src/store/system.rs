//! What there is to say about the database as a whole.

use serde::Serialize;
use sqlx::PgConnection;

/// The database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// The version of its server.
    #[schema(example = "17.2")]
    pub server_version: String,
    /// What it takes on disk.
    pub size_bytes: i64,
}

/// Asks it.
pub async fn database(connection: &mut PgConnection) -> sqlx::Result<Database> {
    sqlx::query_as!(
        Database,
        r#"
        select current_database()::text as "name!", current_setting('server_version') as "server_version!",
               pg_database_size(current_database()) as "size_bytes!"
        "#
    )
    .fetch_one(connection)
    .await
}
