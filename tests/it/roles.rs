//! The roles of `docs/roles/`: who may migrate, who may serve, who may look.

use reqwest::Method;
use serde_json::json;
use singletrack::app::{self, Role, Stop};
use singletrack::config::Settings;
use singletrack::domain::Status;
use singletrack::store::migrate;
use sqlx::postgres::{PgConnectOptions, PgPool};

use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::process::GUARD;
use crate::support::replica::{Answer, Client, short_lease};

const CREATE: &str = include_str!("../../docs/roles/create.sql");
const GRANT: &str = include_str!("../../docs/roles/grant.sql");

fn role(test: &TestDb, name: &str) -> PgConnectOptions {
    test.options().username(name)
}

/// A database that the owner has migrated, with all grants.
pub async fn granted() -> TestDb {
    let test = TestDb::bare().await;
    sqlx::raw_sql(CREATE).execute(&test.sql).await.unwrap();
    sqlx::raw_sql(CREATE).execute(&test.sql).await.unwrap(); // another database of the server did it before
    migrate::migrate(&role(&test, "singletrack_owner").into()).await.unwrap();
    let owner = PgPool::connect_with(role(&test, "singletrack_owner")).await.unwrap();
    sqlx::raw_sql(GRANT).execute(&owner).await.unwrap();
    sqlx::raw_sql(GRANT).execute(&owner).await.unwrap();
    owner.close().await;
    test
}

/// The code of the error that a statement meets.
async fn code(sql: &PgPool, statement: &'static str) -> String {
    match sqlx::query(statement).execute(sql).await {
        Ok(_) => "none".into(),
        Err(error) => error.as_database_error().unwrap().code().unwrap().into_owned(),
    }
}

/// insufficient_privilege
const REFUSED: &str = "42501";

#[tokio::test(flavor = "multi_thread")]
async fn the_service_does_all_of_its_work_under_its_own_role_and_can_change_no_table() {
    let test = granted().await;
    let settings = Settings { migrate: Some("off".into()), ..short_lease() };
    let mut config = settings.resolve(Some(test.url.clone())).unwrap();
    config.worker.guarding.program = GUARD.into();
    let listener = app::bind(&config).unwrap();
    let client = Client::new(format!("http://{}", listener.local_addr().unwrap()));
    let servers: app::Servers = role(&test, "singletrack_service").into();
    app::prepare_schema(&servers, config.migrate).await.unwrap();
    let stop = Stop::default();
    let serving = tokio::spawn(app::run(config, servers.clone(), listener, Role::Serve, stop.clone()));
    client.define("w", "echo hello").await;
    let run = client.enqueue("w").await.run_id();
    assert_eq!(client.finished(run).await["status"], "succeeded");
    assert_eq!(client.log(run).await, "hello\n");
    client.define("long", "sleep 60").await;
    let held = client.enqueue("long").await.run_id();
    let waiting = client.post("/api/v1/workflows/long/runs", json!({"on_conflict": "wait"})).await;
    assert_eq!(waiting.status, 202, "{waiting:?}");
    assert_eq!(client.enqueue("long").await.status, 409);
    for path in ["workflows/w/pause", "workflows/w/resume", "queues/default/pause", "queues/default/resume"] {
        assert_eq!(client.post(&format!("/api/v1/{path}"), json!({})).await.status, 200, "{path}");
    }
    let keyed = client.request(Method::POST, "/api/v1/workflows/w/runs").header("Idempotency-Key", "k");
    let keyed = Answer::of(keyed.json(&json!({"delay_seconds": 0.1}))).await.unwrap();
    assert_eq!(client.finished(keyed.run_id()).await["status"], "succeeded");
    let (id, token) = client.working("pull").await;
    assert_eq!(client.say_one("heartbeat", &token, json!({"progress": 1})).await["result"], "ok");
    assert_eq!(client.say_one("finish", &token, json!({"outcome": "succeeded"})).await["run"]["id"], json!(id));
    for id in [waiting.run_id(), held] {
        let cancelled = client.post(&format!("/api/v1/runs/{id}/cancel"), json!({})).await;
        assert!(matches!(cancelled.status, 200 | 202), "{cancelled:?}");
    }
    assert_eq!(client.finished(held).await["status"], "cancelled");
    let made = client.post("/api/v1/keys", json!({"name": "ci", "scopes": ["admin"]})).await;
    let keyed = client.having(made.body["token"].as_str().unwrap());
    let deleted = Answer::of(keyed.request(Method::DELETE, "/api/v1/workflows/w")).await.unwrap();
    assert_eq!(deleted.status, 204, "{deleted:?}");
    let refused = async || {
        let noted = sqlx::query("select from run_refusals").execute(&test.sql).await.unwrap().rows_affected();
        (noted > 0).then_some(())
    };
    eventually("the refusal is written down", LIMIT, refused).await;
    stop.ask();
    serving.await.unwrap().unwrap();

    let service = PgPool::connect_with(role(&test, "singletrack_service")).await.unwrap();
    for statement in [
        "create table mine (id int)",
        "drop trigger audit_log_append_only on audit_log",
        "alter table test_runs disable trigger all",
        "delete from api_keys",
        "delete from audit_log",
        "update audit_log set actor = 'x'",
        "truncate test_runs cascade",
        "delete from _sqlx_migrations",
    ] {
        assert_eq!(code(&service, statement).await, REFUSED, "{statement}");
    }
    assert!(migrate::migrate(&servers).await.is_ok(), "nothing is missing");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_sees_history_and_no_secret_and_changes_nothing() {
    let test = granted().await;
    plant::run(&test, "w", Status::Running).await;
    sqlx::raw_sql(
        "do $$ begin
             if to_regrole('singletrack_somebody') is null then create role singletrack_somebody login; end if;
         end $$;
         grant singletrack_reader to singletrack_somebody",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    let reader = PgPool::connect_with(role(&test, "singletrack_somebody")).await.unwrap();
    for statement in [
        "select * from active_runs",
        "select * from run_history",
        "select * from workflow_stats",
        "select * from invariant_violations",
        "select * from run_events",
        "select * from run_attempts",
        "select * from run_logs",
        "select * from run_refusals",
        "select * from run_leases",
        "select * from pauses",
        "select * from audit_log",
        "select id, workflow_id, status, reason, input, output, error, worker, fence from test_runs",
        "select workflow_id, revision, executor_type, created_by from workflow_revisions",
        "select id, name, scopes, last_used_at from api_keys",
    ] {
        assert_eq!(code(&reader, statement).await, "none", "{statement}");
    }
    for statement in [
        "select lease_secret from test_runs",
        "select claim_id from test_runs",
        "select * from test_runs",
        "select secret_hash from api_keys",
        "select executor from workflow_revisions",
        "select key from idempotency_keys",
        "insert into pauses (kind, name, paused_by) values ('queue', 'x', 'x')",
        "update test_runs set status = 'failed'",
        "delete from run_logs",
        "select cancel_run(id) from (select gen_random_uuid() as id) x",
        "select * from enqueue_run('w@free')",
        "create table mine (id int)",
    ] {
        assert_eq!(code(&reader, statement).await, REFUSED, "{statement}");
    }
    // Whatever a view shows, it shows to readers: none may show one of these.
    let shown: Vec<String> = sqlx::query_scalar(
        "select c.relname || '.' || a.attname from pg_class c join pg_attribute a on a.attrelid = c.oid
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('v', 'm')
           and a.attname in ('lease_secret', 'claim_id', 'secret_hash', 'executor')",
    )
    .fetch_all(&test.sql)
    .await
    .unwrap();
    assert_eq!(shown, [""; 0]);
}
