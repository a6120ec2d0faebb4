//! What time does: rows are backdated, and whoever looks after them in the service looks.

use std::time::Instant;

use singletrack::domain::Status;
use singletrack::engine::sweeper::start_due;
use singletrack::store::reap::expire;
use uuid::Uuid;

use super::Subject;
use crate::model::Answer;
use crate::support::calls::LIMIT;
use crate::support::plant;

impl Subject {
    pub(super) async fn status(&self, run: Uuid) -> Status {
        plant::status(&self.sql, run).await
    }

    pub async fn workflow(&self, run: Uuid) -> String {
        sqlx::query_scalar("select workflow_id from test_runs where id = $1")
            .bind(run)
            .fetch_one(&self.sql)
            .await
            .unwrap()
    }

    async fn change(&self, statement: &'static str, run: Uuid) {
        sqlx::query(statement).bind(run).execute(&self.sql).await.unwrap();
    }

    pub(super) async fn due(&self, run: Uuid) -> Answer {
        self.change(
            "update test_runs set run_at = now() - interval '1 second', version = version + 1
             where id = $1 and status = 'scheduled'",
            run,
        )
        .await;
        // The replica may be at it, too.
        let since = Instant::now();
        while self.status(run).await == Status::Scheduled {
            assert!(since.elapsed() < LIMIT, "nobody started it");
            start_due(&self.db).await.unwrap();
        }
        Answer::Silence
    }

    pub(super) async fn backoff_over(&self, run: Uuid) -> Answer {
        self.change(
            "update test_runs set available_at = now(), version = version + 1
             where id = $1 and status = 'queued' and available_at > now()",
            run,
        )
        .await;
        Answer::Silence
    }

    pub(super) async fn expire(&self, run: Uuid) -> Answer {
        self.db.with(async |connection| expire(connection, 0, &[run]).await).await.unwrap();
        Answer::Silence
    }

    pub(super) async fn worker_lost(&mut self, run: Uuid) -> Answer {
        if self.status(run).await != Status::Running {
            return Answer::Silence;
        }
        self.change("update test_runs set heartbeat_timeout_seconds = 1, version = version + 1 where id = $1", run)
            .await;
        plant::silence(&self.sql, run, 3600).await;
        // No reaper believes in a silence that is longer than it has looked itself.
        let since = Instant::now();
        while self.status(run).await == Status::Running {
            assert!(since.elapsed() < LIMIT, "no reaper ended it");
            self.reaper.pass().await.unwrap();
        }
        self.change(
            "update test_runs set heartbeat_timeout_seconds = 60, version = version + 1
             where id = $1 and finished_at is null",
            run,
        )
        .await;
        Answer::Silence
    }
}
