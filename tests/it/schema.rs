//! What the schema says about itself: constraints that tie columns together, and a comment on everything.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use singletrack::domain::Status::{self, *};

use crate::support::database::TestDb;
use crate::support::plant;

/// Rows that must not be: a good row in a status, what is changed in it, and the constraint that says no.
fn bad_runs() -> Vec<(Status, Value, &'static str)> {
    let secret = "00000000-0000-4000-8000-000000000000";
    let mut rows = vec![
        (Queued, json!({"workflow_id": "no spaces"}), "test_runs_workflow_id_form"),
        (Queued, json!({"status": "lost"}), "test_runs_status_known"),
        (Queued, json!({"on_conflict": "steal"}), "test_runs_on_conflict_known"),
        (Queued, json!({"labels": []}), "test_runs_labels_object"),
        (Queued, json!({"labels": {"count": 1}}), "test_runs_labels_object"),
        (Queued, json!({"available_at": "infinity"}), "test_runs_times_sayable"),
        (Queued, json!({"created_at": "0044-03-15T00:00:00Z BC"}), "test_runs_times_sayable"),
        (Queued, json!({"attempt": 1}), "test_runs_startable"),
        (Queued, json!({"started_at": "2026-01-01T00:00:00Z"}), "test_runs_unstarted_without_start"),
        (Queued, json!({"priority": 101}), "test_runs_priority_range"),
        (Queued, json!({"priority": -101}), "test_runs_priority_range"),
        (Queued, json!({"attempt": -1}), "test_runs_attempt_range"),
        (Queued, json!({"max_attempts": 0}), "test_runs_attempt_range"),
        (Running, json!({"attempt": 2}), "test_runs_attempt_range"),
        (Queued, json!({"timeout_seconds": 0}), "test_runs_limits_positive"),
        (Queued, json!({"heartbeat_timeout_seconds": 0}), "test_runs_limits_positive"),
        (Scheduled, json!({"run_at": null}), "test_runs_scheduled_has_run_at"),
        (Queued, json!({"available_at": null}), "test_runs_queued_has_available_at"),
        (Running, json!({"fence": 0}), "test_runs_running_has_lease"),
        (Running, json!({"lease_secret": null}), "test_runs_running_has_lease"),
        (Running, json!({"worker": null}), "test_runs_running_has_lease"),
        (Running, json!({"started_at": null}), "test_runs_running_has_lease"),
        (Running, json!({"attempt": 0}), "test_runs_running_has_lease"),
        (Running, json!({"timeout_seconds": null}), "test_runs_running_has_lease"),
        (Running, json!({"heartbeat_timeout_seconds": null}), "test_runs_running_has_lease"),
        (Succeeded, json!({"finished_at": "2000-01-01T00:00:00Z"}), "test_runs_finish_after_start"),
        (Running, json!({"settled_fence": i64::MAX}), "test_runs_settled_fence_known"),
        (Skipped, json!({"attempt": 1}), "test_runs_skipped_never_started"),
    ];
    for status in [Scheduled, Waiting, Queued, Skipped] {
        rows.push((status, json!({"worker": "somebody"}), "test_runs_unstarted_without_worker"));
        rows.push((status, json!({"lease_secret": secret}), "test_runs_unstarted_without_lease"));
    }
    for status in [Succeeded, Failed, TimedOut] {
        for change in [json!({"started_at": null}), json!({"attempt": 0}), json!({"fence": 0, "settled_fence": null})] {
            rows.push((status, change, "test_runs_ended_attempt_had_start"));
        }
    }
    for status in Status::ALL {
        let finish = if status.is_final() { Value::Null } else { json!("2100-01-01T00:00:00Z") };
        rows.push((status, json!({"finished_at": finish}), "test_runs_final_has_finished_at"));
    }
    rows
}

/// The same for the other tables, as the statement and the constraint.
const BAD_ROWS: &[(&str, &str)] = &[
    ("insert into workflows (id, revision) values ('a b', 1)", "workflows_id_form"),
    ("insert into workflows (id, revision) values ('a@', 1)", "workflows_id_form"),
    ("insert into workflows (id, revision) values ('a', 0)", "workflows_revision_positive"),
    ("update workflow_revisions set timeout_seconds = 0", "workflow_revisions_timeout"),
    ("update workflow_revisions set heartbeat_timeout_seconds = 0", "workflow_revisions_heartbeat_timeout"),
    ("update workflow_revisions set start_within_seconds = 0", "workflow_revisions_start_within"),
    ("update workflow_revisions set priority = 101", "workflow_revisions_priority"),
    ("update workflow_revisions set labels = '[]'", "workflow_revisions_labels"),
    ("update workflow_revisions set labels = '{\"count\": 1}'", "workflow_revisions_labels"),
    ("update workflow_revisions set max_attempts = 0", "workflow_revisions_max_attempts"),
    ("update workflow_revisions set max_attempts = 1001", "workflow_revisions_max_attempts"),
    ("update workflow_revisions set retry_on = '{succeeded}'", "workflow_revisions_retry_on"),
    ("update workflow_revisions set retry_on = '{null}'", "workflow_revisions_retry_on"),
    ("update workflow_revisions set backoff = '{}'", "workflow_revisions_backoff"),
    ("update workflow_revisions set backoff = jsonb_build_array(backoff)", "workflow_revisions_backoff"),
    ("update workflow_revisions set backoff = backoff - 'jitter'", "workflow_revisions_backoff"),
    ("update workflow_revisions set backoff = backoff || '{\"factor\": \"2\"}'", "workflow_revisions_backoff"),
    ("update workflow_revisions set backoff = backoff || '{\"factor\": [2]}'", "workflow_revisions_backoff"),
    ("update workflow_revisions set backoff = backoff || '{\"factor\": 0.9}'", "workflow_revisions_backoff"),
    ("update workflow_revisions set backoff = backoff || '{\"initial_seconds\": -1}'", "workflow_revisions_backoff"),
    ("update workflow_revisions set backoff = backoff || '{\"max_seconds\": 604801}'", "workflow_revisions_backoff"),
    ("update workflow_revisions set backoff = backoff || '{\"jitter\": 1.1}'", "workflow_revisions_backoff"),
    ("update workflow_revisions set on_conflict = 'steal'", "workflow_revisions_on_conflict_known"),
    ("update workflow_revisions set max_waiting = 0", "workflow_revisions_max_waiting"),
    ("update workflow_revisions set schedule = '{\"cron\": \"* * * * *\"}'", "workflow_revisions_schedule"),
    ("insert into pauses (kind, name, paused_by) values ('run', 'x', 'me')", "pauses_kind_known"),
    ("update events_forgotten set one = false", "events_forgotten_one"),
    ("update run_attempts set status = 'running'", "run_attempts_status_known"),
    ("update run_attempts set finished_at = started_at - interval '1 s'", "run_attempts_finish_after_start"),
    ("insert into run_logs (fence, stream, seq, text) values (1, 'stdin', 1, '')", "run_logs_stream_known"),
    (
        "insert into api_keys (id, name, secret_hash, scopes, workflows, created_by, revoked_at) values ('x', '', sha256('x'), '{read}', null, 'me', null)",
        "api_keys_name_length",
    ),
    (
        "insert into api_keys (id, name, secret_hash, scopes, workflows, created_by, revoked_at) values ('x', 'n', 'x', '{read}', null, 'me', null)",
        "api_keys_secret_hash_is_sha256",
    ),
    (
        "insert into api_keys (id, name, secret_hash, scopes, workflows, created_by, revoked_at) values ('x', 'n', sha256('x'), '{}', null, 'me', null)",
        "api_keys_scopes_known",
    ),
    (
        "insert into api_keys (id, name, secret_hash, scopes, workflows, created_by, revoked_at) values ('x', 'n', sha256('x'), '{read,write}', null, 'me', null)",
        "api_keys_scopes_known",
    ),
    (
        "insert into api_keys (id, name, secret_hash, scopes, workflows, created_by, revoked_at) values ('x', 'n', sha256('x'), '{null}', null, 'me', null)",
        "api_keys_scopes_known",
    ),
    (
        "insert into api_keys (id, name, secret_hash, scopes, workflows, created_by, revoked_at) values ('x', 'n', sha256('x'), '{read}', '{}', 'me', null)",
        "api_keys_workflows_some",
    ),
    (
        "insert into api_keys (id, name, secret_hash, scopes, workflows, created_by, revoked_at) values ('x', 'n', sha256('x'), '{read}', null, 'me', now())",
        "api_keys_revoked_by_somebody",
    ),
    ("insert into audit_log (actor, action, object) values ('me', 'looked', 'x')", "audit_log_action_known"),
];

#[tokio::test]
async fn every_constraint_has_a_row_that_it_refuses() {
    let test = TestDb::new().await;
    let mut proved = BTreeSet::new();
    for (status, change, constraint) in bad_runs() {
        let workflow = format!("w{}", proved.len());
        let good = plant::run(&test, &workflow, status).await;
        // The copy is refused for the change alone: without it, it goes in.
        for (change, expected) in [(json!({}), None), (change, Some(constraint))] {
            let done = sqlx::query(
                "insert into test_runs
                 select (jsonb_populate_record(r, jsonb_build_object('id', gen_random_uuid(),
                             'workflow_id', 'copy-' || gen_random_uuid()) || $2)).*
                 from test_runs r where id = $1",
            )
            .bind(good.run_id)
            .bind(&change)
            .execute(&mut *test.sql.begin().await.unwrap())
            .await;
            assert_eq!(refused_by(done).as_deref(), expected, "{status:?} {change}");
        }
        sqlx::query("select cancel_run($1), force_release_run($1, 'done with it')")
            .bind(good.run_id)
            .execute(&test.sql)
            .await
            .unwrap();
        proved.insert(constraint.to_owned());
    }
    for (statement, constraint) in BAD_ROWS {
        let done = sqlx::query(*statement).execute(&test.sql).await;
        assert_eq!(refused_by(done).as_deref(), Some(*constraint), "{statement}");
        proved.insert((*constraint).to_owned());
    }
    let all: Vec<String> = sqlx::query_scalar(
        // The rules of a run are in a function.
        "select conname::text from pg_constraint
         where contype = 'c' and connamespace = current_schema::regnamespace and conrelid <> 0 and conname <> 'test_runs_sound'
         union
         select found[1] from pg_proc, regexp_matches(prosrc, '''(test_runs_[a-z_]+)''', 'g') found where proname = 'run_is_sound'",
    )
    .fetch_all(&test.sql)
    .await
    .unwrap();
    assert_eq!(proved, BTreeSet::from_iter(all), "a constraint without a row that it refuses, or the other way round");
}

fn refused_by(done: sqlx::Result<sqlx::postgres::PgQueryResult>) -> Option<String> {
    done.err().map(|error| error.into_database_error().unwrap().constraint().unwrap_or_default().to_owned())
}

/// What has no comment: columns of tables, and everything a person may meet in psql.
async fn uncommented(test: &TestDb) -> Vec<String> {
    sqlx::query_scalar(
        "select found.name from (
             select c.relname || '.' || a.attname as name, col_description(c.oid, a.attnum) as comment
             from pg_class c join pg_attribute a on a.attrelid = c.oid
             where c.relnamespace = current_schema::regnamespace and c.relkind in ('r', 'p', 'v')
               and c.relname <> '_sqlx_migrations' and a.attnum > 0 and not a.attisdropped
             union all
             select c.relname, obj_description(c.oid, 'pg_class')
             from pg_class c
             where c.relnamespace = current_schema::regnamespace and c.relkind in ('r', 'p', 'v', 'm', 'S')
               and c.relname <> '_sqlx_migrations'
               -- the sequence of an identity column is part of its column
               and not exists (select from pg_depend d where d.objid = c.oid and d.deptype = 'i' and c.relkind = 'S')
             union all
             select p.proname || '()', obj_description(p.oid, 'pg_proc')
             from pg_proc p
             where p.pronamespace = current_schema::regnamespace
         ) as found
         where coalesce(found.comment, '') = '' order by 1",
    )
    .fetch_all(&test.sql)
    .await
    .unwrap()
}

#[tokio::test]
async fn everything_in_the_schema_has_a_comment() {
    let test = TestDb::new().await;
    assert_eq!(uncommented(&test).await, [""; 0]);
    // The query itself would notice.
    sqlx::raw_sql(
        "alter table run_logs add column bare integer;
         create view bare_view as select 1 as nothing;
         create sequence bare_sequence;
         create function bare_function() returns integer language sql as 'select 1'",
    )
    .execute(&test.sql)
    .await
    .unwrap();
    assert_eq!(
        uncommented(&test).await,
        ["bare_function()", "bare_sequence", "bare_view", "bare_view.nothing", "run_logs.bare"]
    );
}
