//! The server around the tables: its settings, and who keeps it from its work.

use sqlx::PgConnection;

/// A setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// Its value, in the unit of `pg_settings`.
    pub value: String,
    /// For whom: empty for the server; `database x`, `role y`, `role y in database x` where it was set for those only; `this connection`
    /// where the URL says it.
    pub scope: String,
}

/// The settings `names`: the server's, unless this account or database has its own, and all that were set for this database or a role.
pub async fn settings(connection: &mut PgConnection, names: &[&str]) -> sqlx::Result<Vec<Setting>> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    sqlx::query_as!(
        Setting,
        r#"
        select s.name as "name!", s.setting as "value!", case s.source when 'client' then 'this connection' else '' end as "scope!"
        from pg_settings s
        where s.name = any($1::text[]) and s.source not in ('database', 'user', 'database user', 'session')
        union all
        select split_part(c.line, '=', 1), substr(c.line, strpos(c.line, '=') + 1),
               concat_ws(' in ', 'role ' || nullif(d.setrole, 0)::regrole::text, 'database ' || b.datname)
        from pg_db_role_setting d
        left join pg_database b on b.oid = d.setdatabase
        cross join lateral unnest(d.setconfig) as c (line)
        where (d.setdatabase = 0 or b.datname = current_database()) and split_part(c.line, '=', 1) = any($1::text[])
        order by 1, 3
        "#,
        &names,
    )
    .fetch_all(connection)
    .await
}

/// Tables of ours that autovacuum is told to leave alone.
pub async fn tables_without_autovacuum(connection: &mut PgConnection) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"
        select c.relname::text as "name!"
        from pg_class c
        where c.relnamespace = (select t.relnamespace from pg_class t where t.oid = to_regclass('test_runs'))
          and c.relkind = 'r' and c.relname <> '_sqlx_migrations'
          and exists (select from pg_options_to_table(c.reloptions) o
                      where o.option_name = 'autovacuum_enabled' and lower(o.option_value) in ('off', 'false', 'no', '0', 'f', 'n', 'of'))
        order by c.relname
        "#
    )
    .fetch_all(connection)
    .await
}

/// A session, or a transaction without one, that keeps dead rows from being removed.
#[derive(Clone, Debug)]
pub struct Pin {
    /// Its process id, or the name of the prepared transaction.
    pub who: String,
    /// Account, program and state, in words.
    pub what: String,
    /// Seconds since its transaction began.
    pub seconds: i64,
    /// How many transactions have begun since the oldest that it may still look at.
    pub age: i64,
}

/// Transactions of this database that are open for longer than `seconds` and look at what is gone, or have written, the oldest first. Of
/// other accounts only those that may be seen.
pub async fn sessions(connection: &mut PgConnection, seconds: i32) -> sqlx::Result<Vec<Pin>> {
    sqlx::query_as!(
        Pin,
        r#"
        select a.pid::text as "who!",
               coalesce(a.usename::text, '?') || ' by ' || coalesce(nullif(a.application_name, ''), 'an unnamed program')
               || coalesce(' from ' || host(a.client_addr), '') || ', ' || coalesce(a.state, '?') as "what!",
               floor(extract(epoch from clock_timestamp() - a.xact_start))::bigint as "seconds!",
               greatest(age(a.backend_xmin), age(a.backend_xid))::bigint as "age!"
        from pg_stat_activity a
        where a.datname = current_database() and a.backend_type = 'client backend' and a.pid <> pg_backend_pid()
          and coalesce(a.backend_xmin, a.backend_xid) is not null
          and a.xact_start < clock_timestamp() - make_interval(secs => $1::integer)
        order by a.xact_start
        limit 100
        "#,
        seconds,
    )
    .fetch_all(connection)
    .await
}

/// Prepared transactions of this database that are older than `seconds`.
pub async fn prepared(connection: &mut PgConnection, seconds: i32) -> sqlx::Result<Vec<Pin>> {
    sqlx::query_as!(
        Pin,
        r#"
        select p.gid as "who!", p.owner::text as "what!",
               floor(extract(epoch from clock_timestamp() - p.prepared))::bigint as "seconds!",
               age(p.transaction)::bigint as "age!"
        from pg_prepared_xacts p
        where p.database = current_database() and p.prepared < clock_timestamp() - make_interval(secs => $1::integer)
        order by p.prepared
        limit 100
        "#,
        seconds,
    )
    .fetch_all(connection)
    .await
}

/// Sessions that are idle inside a transaction for longer than `seconds` and hold locks on our tables that others wait for.
pub async fn idle_lockers(connection: &mut PgConnection, seconds: i32) -> sqlx::Result<Vec<Pin>> {
    sqlx::query_as!(
        Pin,
        r#"
        select a.pid::text as "who!",
               coalesce(a.usename::text, '?') || ' by ' || coalesce(nullif(a.application_name, ''), 'an unnamed program')
               || coalesce(' from ' || host(a.client_addr), '') || ', locks on '
               || string_agg(distinct c.relname::text, ', ' order by c.relname::text) as "what!",
               floor(extract(epoch from clock_timestamp() - a.state_change))::bigint as "seconds!",
               coalesce(max(greatest(age(a.backend_xmin), age(a.backend_xid))), 0)::bigint as "age!"
        from pg_locks l
        join pg_class c on c.oid = l.relation and c.relkind = 'r'
        join pg_stat_activity a on a.pid = l.pid
        where l.database = (select b.oid from pg_database b where b.datname = current_database())
          and c.relnamespace = (select t.relnamespace from pg_class t where t.oid = to_regclass('test_runs'))
          -- who has only read keeps nobody from writing
          and l.granted and l.mode <> 'AccessShareLock'
          and a.state like 'idle in transaction%' and a.state_change < clock_timestamp() - make_interval(secs => $1::integer)
        group by a.pid, a.usename, a.application_name, a.client_addr, a.state_change
        order by a.state_change
        limit 100
        "#,
        seconds,
    )
    .fetch_all(connection)
    .await
}

/// A replication slot.
#[derive(Clone, Debug)]
pub struct ReplicationSlot {
    /// Its name.
    pub name: String,
    /// Somebody reads from it now.
    pub active: bool,
    /// How many transactions have begun since the oldest whose rows it keeps; `None` where it keeps none.
    pub age: Option<i64>,
    /// Bytes of WAL that it keeps; `None` where it keeps none.
    pub kept_bytes: Option<i64>,
}

/// All replication slots.
pub async fn replication_slots(connection: &mut PgConnection) -> sqlx::Result<Vec<ReplicationSlot>> {
    sqlx::query_as!(
        ReplicationSlot,
        r#"
        select s.slot_name::text as "name!", s.active as "active!", age(s.xmin)::bigint as age,
               -- a standby has no present end of its WAL
               case when not pg_is_in_recovery() then pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::bigint end as kept_bytes
        from pg_replication_slots s
        order by s.slot_name
        "#
    )
    .fetch_all(connection)
    .await
}

/// A standby that is connected.
#[derive(Clone, Debug)]
pub struct Standby {
    /// As it calls itself.
    pub name: String,
    /// `sync`, `quorum`, `potential` or `async`; `None` where this account may not know.
    pub sync_state: Option<String>,
    /// Bytes of WAL that it has not replayed yet.
    pub behind_bytes: Option<i64>,
    /// Milliseconds until it had replayed what was committed last; `None` where nothing was lately.
    pub lag_ms: Option<i64>,
    /// How many transactions have begun since the oldest that its queries may still look at (`hot_standby_feedback`, no slot).
    pub age: Option<i64>,
}

/// Standbys of a primary that stream.
pub async fn standbys(connection: &mut PgConnection) -> sqlx::Result<Vec<Standby>> {
    sqlx::query_as!(
        Standby,
        r#"
        select coalesce(nullif(r.application_name, ''), 'without a name') as "name!", r.sync_state,
               case when not pg_is_in_recovery() then pg_wal_lsn_diff(pg_current_wal_lsn(), r.replay_lsn)::bigint end as behind_bytes,
               ceil(extract(epoch from r.replay_lag) * 1000)::bigint as lag_ms,
               age(r.backend_xmin)::bigint as age
        from pg_stat_replication r
        -- Only a standby replays: neither a base backup that is under way does, nor an archive; a subscription does, of rows. Of what may
        -- not be seen there is no state.
        where (r.state is null or r.replay_lsn is not null)
          and not exists (select from pg_replication_slots s where s.active_pid = r.pid and s.slot_type = 'logical')
        order by 1
        "#
    )
    .fetch_all(connection)
    .await
}

/// How much room is left of what runs out.
#[derive(Clone, Debug)]
pub struct Room {
    /// Connections in use, of all databases.
    pub connections: i64,
    /// Connections there may be, less those reserved.
    pub connections_limit: i64,
    /// Replicas that were seen in the last minute, of those that execute runs.
    pub replicas: i64,
    /// How many transactions have begun since the oldest that this database still has to freeze; likewise of row locks.
    pub wraparound_age: i64,
    /// Its collation is not of the version that its indexes of text were built with, in words; `None` where it is.
    pub collation: Option<String>,
}

/// Looks at what runs out.
pub async fn room(connection: &mut PgConnection) -> sqlx::Result<Room> {
    sqlx::query_as!(
        Room,
        r#"
        select (select sum(s.numbackends) from pg_stat_database s)::bigint as "connections!",
               current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
               -- from 16 on
               - coalesce(current_setting('reserved_connections', true), '0')::bigint as "connections_limit!",
               (select count(*) from workers w
                where w.seen_at > now() - interval '1 minute' and 'pull' <> all(w.executor_types)) as "replicas!",
               greatest(age(b.datfrozenxid), mxid_age(b.datminmxid))::bigint as "wraparound_age!",
               -- from 15 on
               case when to_jsonb(b) ->> 'datcollversion' <> pg_collation_actual_version(100)
                    then b.datcollate || ' was of version ' || (to_jsonb(b) ->> 'datcollversion') || ', and is of '
                         || pg_collation_actual_version(100)
               end as collation
        from pg_database b
        where b.datname = current_database()
        "#
    )
    .fetch_one(connection)
    .await
}
