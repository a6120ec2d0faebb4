//! What a replica asks the database for while there is nothing to do, and how soon it notices that there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use singletrack::config::Settings;
use singletrack::domain::Status;
use singletrack::engine::lookout;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy, split};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::plant;
use crate::support::replica::Replica;
use crate::support::sse::Stream;

/// As many workflows as somebody may have, each with a schedule whose tick is not to come yet.
async fn workflows_with_schedules(test: &TestDb) {
    sqlx::raw_sql(
        r#"
        insert into workflows (id, revision) select 'w' || n, 1 from generate_series(1, 10000) n;
        insert into workflow_revisions (workflow_id, revision, executor_type, executor, created_by, schedule)
        select 'w' || n, 1, 'pull', '{"type": "pull"}', 'test', '{"cron": "0 4 * * *", "time_zone": "UTC"}'
        from generate_series(1, 10000) n;
        insert into workflow_schedules (workflow_id, revision, since, next_at)
        select 'w' || n, 1, now(), now() + interval '1 hour' + n * interval '1 second' from generate_series(1, 10000) n;
        "#,
    )
    .execute(&test.sql)
    .await
    .unwrap();
}

/// Counts the statements that go through a socket of its own to the database of `test`, whose URL it gives.
fn counted(test: &TestDb, folder: &std::path::Path, parts: &mut JoinSet<()>) -> (String, Arc<AtomicUsize>) {
    let socket = test.options().get_socket().unwrap().join(".s.PGSQL.5432");
    let listener = UnixListener::bind(folder.join(".s.PGSQL.5432")).unwrap();
    let (database, _) = test.url.split_once("host=").unwrap();
    let url = format!("{database}host={}&sslmode=disable", folder.display());
    let count = Arc::new(AtomicUsize::new(0));
    let counting = count.clone();
    parts.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            let server = UnixStream::connect(&socket).await.unwrap();
            let counting = counting.clone();
            connections.spawn(async move {
                let (asked, mut answered) = split(client);
                let (mut answers, asks) = split(server);
                tokio::select! {
                    _ = count_statements(asked, asks, &counting) => {}
                    _ = copy(&mut answers, &mut answered) => {}
                }
            });
        }
    });
    (url, count)
}

/// Passes on what a client sends, message by message, and counts what makes the server execute something.
async fn count_statements(
    mut asked: impl AsyncRead + Unpin,
    mut asks: impl AsyncWrite + Unpin,
    count: &AtomicUsize,
) -> std::io::Result<()> {
    let mut first = true;
    loop {
        // The first message has no type.
        let kind = if first { None } else { Some(asked.read_u8().await?) };
        first = false;
        let length = asked.read_u32().await?;
        let mut body = vec![0; length as usize - 4];
        asked.read_exact(&mut body).await?;
        if let Some(kind) = kind {
            if [b'E', b'Q'].contains(&kind) {
                count.fetch_add(1, Ordering::Relaxed);
            }
            asks.write_u8(kind).await?;
        }
        asks.write_u32(length).await?;
        asks.write_all(&body).await?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_replica_makes_fewer_than_three_statements_a_second() {
    let test = TestDb::new().await;
    workflows_with_schedules(&test).await;
    let folder = tempfile::tempdir().unwrap();
    let mut parts = JoinSet::new();
    let (url, count) = counted(&test, folder.path(), &mut parts);
    let settings = Settings { listen: Some("127.0.0.1:0".into()), workers: Some("4".into()), ..Settings::default() };
    let replica = Replica::with(&TestDb::at(url), settings).await;
    let since_start = async |seconds| {
        sleep(Duration::from_secs(seconds)).await;
        count.load(Ordering::Relaxed)
    };
    // Every part looks once by itself when it begins.
    let begun = since_start(3).await;
    let statements = since_start(20).await - begun;
    assert!(statements >= 30, "it must look: {statements} in 20 s");
    assert!(statements < 60, "{statements} in 20 s");
    drop(replica);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_listeners_cost_what_one_costs_and_nothing_when_they_have_gone() {
    let test = TestDb::new().await;
    let folder = tempfile::tempdir().unwrap();
    let mut parts = JoinSet::new();
    let (url, count) = counted(&test, folder.path(), &mut parts);
    let settings = Settings { listen: Some("127.0.0.1:0".into()), workers: Some("0".into()), ..Settings::default() };
    let replica = Replica::with(&TestDb::at(url), settings).await;
    let during = async |seconds| {
        let before = count.load(Ordering::Relaxed);
        sleep(Duration::from_secs(seconds)).await;
        count.load(Ordering::Relaxed) - before
    };
    let mut streams = Vec::new();
    for _ in 0..100 {
        streams.push(Stream::begun(&replica.client, "/api/v1/events").await);
    }
    let listening = during(5).await;
    assert!(listening < 50, "{listening} in 5 s");
    plant::run(&test, "w", Status::Succeeded).await;
    for stream in &mut streams {
        assert_eq!(stream.next().await.unwrap().data["workflow_id"], "w");
    }
    drop(streams);
    // That a client has gone is noticed when it is sent something.
    plant::run(&test, "v", Status::Succeeded).await;
    eventually("nobody listens", LIMIT, async || (during(2).await < 9).then_some(())).await;
}

#[tokio::test]
async fn a_glance_sees_what_there_is_for_each_part() {
    let test = TestDb::new().await;
    let signs = async || {
        let signs = lookout::pass(&test.db).await.unwrap().signs;
        (signs.held, signs.waiting, signs.due, signs.tick, signs.keys)
    };
    let nothing = (false, false, false, false, false);
    let _over = plant::run(&test, "over", Status::Succeeded).await;
    workflows_with_schedules(&test).await;
    assert_eq!(signs().await, nothing);
    let until = lookout::pass(&test.db).await.unwrap().signs.until_next.unwrap();
    assert!(until > Duration::from_secs(3500) && until < Duration::from_secs(3602), "{until:?}");

    let execute = async |sql: &'static str| {
        sqlx::query(sql).execute(&test.sql).await.unwrap();
    };
    for status in [Status::Queued, Status::Running] {
        let lease = plant::run(&test, "w", status).await;
        assert_eq!(signs().await, (true, false, false, false, false), "{status:?}");
        sqlx::query("select force_release_run($1, 'x')").bind(lease.run_id).execute(&test.sql).await.unwrap();
    }
    plant::run(&test, "w", Status::Waiting).await;
    assert_eq!(signs().await, (false, true, false, false, false));
    execute("delete from run_events").await;
    execute("update test_runs set status = 'cancelled', finished_at = now(), version = version + 1 where status = 'waiting'").await;
    plant::run(&test, "w", Status::Scheduled).await;
    assert_eq!(signs().await, nothing);
    execute("update test_runs set run_at = now() + interval '1 minute' where status = 'scheduled'").await;
    assert!(lookout::pass(&test.db).await.unwrap().signs.until_next.unwrap() <= Duration::from_secs(60));
    execute("update test_runs set run_at = now() where status = 'scheduled'").await;
    assert_eq!(signs().await, (false, false, true, false, false));
    execute("update test_runs set status = 'cancelled', finished_at = now(), version = version + 1 where status = 'scheduled'").await;
    for update in [
        "update workflow_schedules set next_at = null where workflow_id = 'w1'",
        "update workflow_schedules set next_at = now() where workflow_id = 'w1'",
    ] {
        execute("update workflow_schedules set next_at = now() + interval '1 hour'").await;
        execute(update).await;
        assert_eq!(signs().await, (false, false, false, true, false), "{update}");
    }
    execute("update workflows set revision = 2 where id = 'w1'").await;
    assert_eq!(signs().await, nothing, "of no current revision");
    execute(
        "insert into idempotency_keys (owner, workflow_id, key, fingerprint, run_id, expires_at)
             values ('', 'w', 'k', '', gen_random_uuid(), now())",
    )
    .await;
    assert_eq!(signs().await, (false, false, false, false, true));
}

#[tokio::test]
async fn a_part_is_called_by_each_glance_that_has_something_for_it_and_by_one_that_failed() {
    let test = TestDb::new().await;
    let (tell, mut looks) = lookout::looks();
    let mut look = lookout::pass(&test.db).await.unwrap();
    let mut is_called =
        async || timeout(Duration::from_millis(50), looks.call_for(|look| look.signs.due)).await.is_ok();
    assert!(!is_called().await, "nobody has looked");
    tell.send_replace(Some(look.clone()));
    assert!(!is_called().await, "there is nothing");
    look.signs.due = true;
    tell.send_replace(Some(look.clone()));
    assert!(is_called().await);
    assert!(!is_called().await, "that was heard of");
    tell.send_replace(Some(look));
    assert!(is_called().await, "there is still something");
    tell.send_replace(None);
    assert!(is_called().await, "nobody knows");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_for_later_starts_when_it_is_due_and_not_at_the_next_look() {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    let settings = Settings { listen: Some("127.0.0.1:0".into()), workers: Some("1".into()), ..Settings::default() };
    let replica = Replica::with(&test, settings).await;
    for _ in 0..3 {
        let body = serde_json::json!({"delay_seconds": 1});
        let run_id = replica.client.post("/api/v1/workflows/w/runs", body).await.run_id();
        timeout(LIMIT, replica.client.finished(run_id)).await.unwrap();
        let late: f64 =
            sqlx::query_scalar("select extract(epoch from started_at - run_at)::float8 from test_runs where id = $1")
                .bind(run_id)
                .fetch_one(&test.sql)
                .await
                .unwrap();
        assert!(late < 0.5, "{late} s late");
    }
}
