//! The workers of `examples/`, run as they are by somebody who copied them.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};

use crate::support::calls::{LIMIT, attempts, row};
use crate::support::database::TestDb;
use crate::support::replica::{Client, Replica};
use crate::support::scratch::{Scratch, gone};
use crate::support::wire::Wire;
use crate::support::{eventually, skipped};

/// What the command of these tests does with its input.
const SCRIPT: &str = r#"
    input=$(cat)
    printf 'input %s\n' "$input"
    echo "to standard error, ünïcödé" >&2
    case $input in
        *fail*) exit 3 ;;
        *wait*) echo $$ >"$FOLDER/pid"; sleep 1000 & echo $! >"$FOLDER/child"; wait ;;
    esac
    echo "{\"attempt\": $SINGLETRACK_ATTEMPT, \"workflow\": \"$SINGLETRACK_WORKFLOW_ID\"}"
"#;

/// A worker of `examples/`, killed when dropped, with all that it is made of.
struct Worker(Child);

impl Worker {
    fn start(example: &str, client: &Client, workflow: &str, scratch: &Scratch, command: &[&str]) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(example);
        let mut worker = Command::new(path);
        if example == "worker.py" {
            worker.args(["--workflow", workflow]);
            worker.args((!command.is_empty()).then_some("--"));
        }
        let environment = [("SINGLETRACK_URL", client.base.as_str()), ("WORKFLOWS", workflow)];
        worker.args(command).envs(environment).env("FOLDER", scratch.path("")).env_remove("http_proxy");
        Self(worker.stdin(Stdio::null()).process_group(0).spawn().unwrap())
    }

    async fn terminated(mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        let status = eventually("the worker has ended", LIMIT, || {
            let ended = self.0.try_wait().unwrap();
            async move { ended }
        });
        status.await.code()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}

/// Whether all of `tools` are here. Where one is not, the test is skipped.
pub fn has(tools: &[&str]) -> bool {
    let folders: Vec<_> = std::env::split_paths(&std::env::var_os("PATH").unwrap()).collect();
    let missing: Vec<_> =
        tools.iter().filter(|tool| !folders.iter().any(|folder| folder.join(tool).exists())).collect();
    if missing.is_empty() {
        return true;
    }
    skipped(&format!("this can't be tested without {missing:?}"));
    false
}

async fn enqueue(client: &Client, workflow: &str, input: &str) -> uuid::Uuid {
    let path = format!("/api/v1/workflows/{workflow}/runs");
    let answer = client.post(&path, json!({"input": {"do": input, "text": "line\nline"}})).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.run_id()
}

/// Success, failure, a cancel, the worker's own end, and a claim whose answer is lost.
async fn does_all_that_a_worker_must(example: &str) {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let (client, scratch) = (&replica.client, Scratch::new());
    client.define_pull("w", json!({})).await;
    let wire = Wire::to(client, r#""lease":"#).await;
    wire.lose();
    let worker = Worker::start(example, &wire.client, "w", &scratch, &["sh", "-c", SCRIPT]);

    let run_id = enqueue(client, "w", "succeed").await;
    let run = client.finished(run_id).await;
    wire.lost().await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("succeeded"), &json!(1)), "{run}");
    assert_eq!(run["output"], json!({"attempt": 1, "workflow": "w"}));
    let log = client.log(run_id).await;
    for line in [r#"input {"do":"succeed","text":"line\nline"}"#, "to standard error,ünïcödé\n"] {
        assert!(log.replace(": ", ":").replace(", ", ",").contains(line), "{log}");
    }
    assert_eq!(attempts(&test.sql, run_id).await.len(), 1, "what the lost answer gave was not waited for");

    let failed = client.finished(enqueue(client, "w", "fail").await).await;
    assert_eq!((&failed["status"], &failed["error"]), (&json!("failed"), &json!("exit code 3")), "{failed}");

    let to_cancel = enqueue(client, "w", "wait").await;
    let (leader, child) = (scratch.pid("pid").await, scratch.pid("child").await);
    client.post(&format!("/api/v1/runs/{to_cancel}/cancel"), json!({})).await;
    assert_eq!(client.finished(to_cancel).await["status"], "cancelled");
    gone(leader, LIMIT).await;
    gone(child, LIMIT).await;

    for name in ["pid", "child"] {
        std::fs::remove_file(scratch.path(name)).unwrap();
    }
    let to_give_back = enqueue(client, "w", "wait").await;
    let (leader, child) = (scratch.pid("pid").await, scratch.pid("child").await);
    assert_eq!(worker.terminated().await, Some(0));
    gone(leader, LIMIT).await;
    gone(child, LIMIT).await;
    let row = row(&test.sql, to_give_back).await;
    assert_eq!((&row["status"], &row["attempt"]), (&json!("queued"), &json!(0)), "{row}");
    test.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_in_python_does_all_that_a_worker_must() {
    if has(&["python3"]) {
        does_all_that_a_worker_must("worker.py").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_in_shell_does_all_that_a_worker_must() {
    if has(&["curl", "jq", "setsid"]) {
        does_all_that_a_worker_must("worker.sh").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_in_python_runs_a_function_where_no_command_is_given() {
    if !has(&["python3"]) {
        return;
    }
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let (client, scratch) = (&replica.client, Scratch::new());
    client.define_pull("w", json!({})).await;
    let _worker = Worker::start("worker.py", client, "w", &scratch, &[]);
    let run_id = enqueue(client, "w", "echo").await;
    let run = client.finished(run_id).await;
    let echo: Value = json!({"echo": {"do": "echo", "text": "line\nline"}});
    assert_eq!((&run["status"], &run["output"]), (&json!("succeeded"), &echo), "{run}");
    assert!(client.log(run_id).await.starts_with("w, attempt 1, fence "));
}
