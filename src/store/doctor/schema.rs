//! The schema as it is: each object with what it says, in words that are the same under every supported version of Postgres.

use sqlx::PgConnection;

/// A migration that was applied.
#[derive(Clone, Debug)]
pub struct Applied {
    /// Its number.
    pub version: i64,
    /// What its text was, as a checksum.
    pub checksum: Vec<u8>,
    /// It was carried out to the end.
    pub success: bool,
}

/// The migrations that were applied, in order; `None` where there never was one.
pub async fn applied(connection: &mut PgConnection) -> sqlx::Result<Option<Vec<Applied>>> {
    let there: bool =
        sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null").fetch_one(&mut *connection).await?;
    if !there {
        return Ok(None);
    }
    // A table of sqlx's own, which the checked queries do not know.
    let rows: Vec<(i64, Vec<u8>, bool)> =
        sqlx::query_as("select version, checksum, success from _sqlx_migrations order by version")
            .fetch_all(connection)
            .await?;
    Ok(Some(rows.into_iter().map(|(version, checksum, success)| Applied { version, checksum, success }).collect()))
}

/// Something in the schema of our tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// `table`, `column`, `constraint`, `index`, `trigger`, `function`, `view` or `sequence`.
    pub kind: String,
    /// Its name; of a part of a table with the table's before it, of a function with its arguments.
    pub name: String,
    /// What it says, without the schema's name. Of a view, and of the body of a function, a checksum.
    pub definition: String,
    /// Why it does not do what it says: `invalid`, `being built`, `disabled`; empty where it does.
    pub state: String,
}

/// Everything in the schema of our tables, by kind and name.
pub async fn objects(connection: &mut PgConnection) -> sqlx::Result<Vec<Object>> {
    sqlx::query_file_as!(Object, "src/store/sql/doctor/objects.sql").fetch_all(connection).await
}

/// What changes the meaning of statements on our tables without being part of them, in words.
pub async fn interferences(connection: &mut PgConnection) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"
        with ours as (
            select c.oid, c.relname, c.relrowsecurity, c.relforcerowsecurity
            from pg_class c
            where c.relnamespace = (select t.relnamespace from pg_class t where t.oid = to_regclass('test_runs'))
              and c.relkind in ('r', 'p', 'v') and c.relname <> '_sqlx_migrations'
        ),
        found as (
            select 'table ' || o.relname || ': row level security is on' || case when o.relforcerowsecurity then ', also for its owner' else '' end as line
            from ours o
            where o.relrowsecurity
            union all
            select 'policy ' || p.polname || ' on ' || o.relname
            from ours o
            join pg_policy p on p.polrelid = o.oid
            union all
            select 'rule ' || w.rulename || ' on ' || o.relname
            from ours o
            join pg_rewrite w on w.ev_class = o.oid and w.rulename <> '_RETURN'
            union all
            select 'table ' || i.inhrelid::regclass || ' inherits from ' || o.relname || ': no unique index reaches across the two'
            from ours o
            join pg_inherits i on i.inhparent = o.oid
        )
        select f.line as "line!" from found f order by f.line
        "#
    )
    .fetch_all(connection)
    .await
}
