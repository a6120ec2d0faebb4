//! The example of a program with a worker inside, as its reader would run it.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::task::block_in_place;
use uuid::Uuid;

use crate::support::calls::{LIMIT, attempts, row};
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::process::GUARD;

/// Where Cargo puts the example beside the binary, if it was asked to build examples.
fn example() -> Option<PathBuf> {
    let path = Path::new(GUARD).with_file_name("examples").join("embedded");
    if path.exists() {
        return Some(path);
    }
    assert!(std::env::var_os("CI").is_none(), "{} is missing", path.display());
    eprintln!("SKIPPED: {} is missing: cargo build --example embedded", path.display());
    None
}

/// The example on a database, killed when dropped.
struct Program(Child);

impl Program {
    fn start(example: &Path, url: &str) -> Self {
        let mut command = Command::new(example);
        Self(command.env("DATABASE_URL", url).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// The line it prints, which is all.
    fn says(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_starts_a_run_does_it_and_leaves_when_it_is_interrupted() {
    let Some(example) = example() else { return };
    let test = TestDb::new().await;
    let mut program = Program::start(&example, &test.url);
    let said = block_in_place(|| program.says());
    let id: Uuid = said.trim_end().strip_prefix("started ").unwrap_or_else(|| panic!("{said:?}")).parse().unwrap();
    eventually("the run is over", LIMIT, async || row(&test.sql, id).await["finished_at"].is_string().then_some(()))
        .await;
    let run = row(&test.sql, id).await;
    assert_eq!((&run["status"], &run["output"]), (&json!("succeeded"), &json!({"tables": 2})), "{run}");
    assert_eq!(attempts(&test.sql, id).await.len(), 1);
    let log: String = sqlx::query_scalar("select string_agg(text, '' order by seq) from run_logs where fence = $1")
        .bind(run["fence"].as_i64())
        .fetch_one(&test.sql)
        .await
        .unwrap();
    assert_eq!(log, format!("copying orders, fence {0}\ncopying customers, fence {0}\n", run["fence"]));

    kill_process(Pid::from_child(&program.0), Signal::INT).unwrap();
    let ended = || {
        let status = program.0.try_wait().unwrap();
        async move { status }
    };
    let status = eventually("it leaves", LIMIT, ended).await;
    assert!(status.success(), "{status}");
    // It says goodbye on each connection before it ends; the server may take a moment to hear it.
    eventually("the server has ended its connections", LIMIT, async || {
        let left: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'singletrack'",
        )
        .fetch_one(&test.sql)
        .await
        .unwrap();
        (left == 0).then_some(())
    })
    .await;
    test.check().await;
}
