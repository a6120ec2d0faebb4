//! Worker and guard are killed and frozen, with real processes: nothing of a run outlives them, and no two commands of a
//! workflow overlap. Each scenario once more without the guard, where the same must be seen to go wrong.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use singletrack::domain::Status;
use uuid::Uuid;

use crate::support::database::TestDb;
use crate::support::process::{Process, SHORT_LEASE};
use crate::support::scratch::{Scratch, inside};
use crate::support::{eventually, not_allowed, plant};

/// Within which nothing of a run may be left.
const A_SECOND: Duration = Duration::from_secs(1);
/// The heartbeat timeout of the short lease, three times.
const FROZEN: Duration = Duration::from_secs(15);
const LIMIT: Duration = Duration::from_secs(30);
/// Between two lines of a journal.
const BEAT: Duration = Duration::from_millis(20);

/// No test: the program that the commands of this file run. It writes down that it is alive until it is killed, or its
/// journal is gone.
#[test]
#[ignore = "a program that tests start"]
fn journal() {
    let (Ok(fence), Ok(role)) = (std::env::var("SINGLETRACK_FENCE"), std::env::var("ROLE")) else { return };
    while let Ok(mut journal) = File::options().append(true).open("journal") {
        let line = format!("{fence} {role} {}\n", monotonic().as_nanos());
        journal.write_all(line.as_bytes()).unwrap();
        std::thread::sleep(BEAT);
    }
}

fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.try_into().unwrap())
}

/// A replica that runs a command which ignores TERM, with a child that has left its session and one that has also left its
/// parent.
struct Scene {
    test: TestDb,
    scratch: Scratch,
    replica: Process,
    run: Uuid,
    mode: &'static str,
    /// Whether its guard has made a PID namespace.
    namespace: bool,
}

/// Who can be frozen.
#[derive(Clone, Copy, PartialEq)]
enum Who {
    Worker,
    Guard,
    /// All processes of the run.
    Command,
}

/// What the processes under one fence have written: the first and the last time of each.
type Lives = BTreeMap<i64, BTreeMap<String, (Duration, Duration)>>;

impl Scene {
    async fn begin(mode: &'static str, timeout_seconds: u32) -> Self {
        let (test, scratch) = (TestDb::new().await, Scratch::new());
        let replica = serve(&test, mode);
        scratch.touch("journal");
        let journal =
            format!("{} --quiet --exact guard::journal --ignored", std::env::current_exe().unwrap().display());
        let script = format!(
            "trap '' TERM
             ROLE=session setsid {journal} &
             (ROLE=orphan setsid {journal} &)
             ROLE=command exec {journal}"
        );
        scratch.define_with(&replica.client, "w", &script, json!({"timeout_seconds": timeout_seconds})).await;
        let run = replica.client.enqueue("w").await.run_id();
        let mut this = Self { test, scratch, replica, run, mode, namespace: false };
        this.under_way(1).await;
        this.namespace = this.guards().len() == 2;
        this
    }

    /// Waits until the processes of the nth command are all there.
    async fn under_way(&self, count: usize) {
        eventually("the command and what it starts are under way", LIMIT, || async {
            let lives = self.lives();
            (lives.len() == count && lives.values().all(|roles| roles.len() == 3)).then_some(())
        })
        .await;
    }

    fn lives(&self) -> Lives {
        let mut lives = Lives::new();
        for line in self.scratch.read("journal").lines() {
            let [fence, role, at] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let at = Duration::from_nanos(at.parse().unwrap());
            let life = lives.entry(fence.parse().unwrap()).or_default().entry(role.to_owned()).or_insert((at, at));
            *life = (life.0.min(at), life.1.max(at));
        }
        lives
    }

    /// The guard, and the first process of its namespace if it has one.
    fn guards(&self) -> Vec<Pid> {
        let mut parents = vec![Pid::from_child(&self.replica.child)];
        let mut guards = Vec::new();
        while let Some(parent) = parents.pop() {
            let children = children(parent).into_iter().filter(|pid| {
                let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
                String::from_utf8_lossy(&line).contains("\0guard\0")
            });
            let found: Vec<Pid> = children.collect();
            parents.extend(&found);
            guards.extend(found);
        }
        guards
    }

    fn those(&self, who: Who) -> Vec<Pid> {
        match who {
            Who::Worker => vec![Pid::from_child(&self.replica.child)],
            Who::Guard => self.guards(),
            Who::Command => inside(&self.scratch.path(".")),
        }
    }

    /// The processes of the run that are left, after a second at most.
    async fn left(&self) -> Vec<Pid> {
        let since = Instant::now();
        loop {
            let left = inside(&self.scratch.path("."));
            if left.is_empty() || since.elapsed() > A_SECOND {
                eprintln!("{}: {} left after {:?}", self.mode, left.len(), since.elapsed());
                return left;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The run, as `witness` shows it when it is final.
    async fn finished(&self, witness: &Process) -> Value {
        witness.client.finished(self.run).await
    }

    /// How long commands of the two attempts were alive at the same time.
    fn overlap(&self) -> Duration {
        let lives: Vec<(Duration, Duration)> = self
            .lives()
            .into_values()
            .map(|roles| {
                (roles.values().map(|life| life.0).min().unwrap(), roles.values().map(|life| life.1).max().unwrap())
            })
            .collect();
        let [first, second] = lives[..] else { panic!("{lives:?}") };
        let overlap = first.1.saturating_sub(second.0);
        let gap = second.0.saturating_sub(first.1);
        eprintln!("{}: overlap {overlap:?}, gap {gap:?}", self.mode);
        overlap
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for pid in self.guards() {
            let _ = kill_process(pid, Signal::KILL);
        }
        for pid in inside(&self.scratch.path(".")) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn serve(test: &TestDb, mode: &str) -> Process {
    Process::serve(&test.url, &[SHORT_LEASE, &[("SINGLETRACK_GUARD", mode), ("SINGLETRACK_POOL_SIZE", "3")]].concat())
}

fn children(parent: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{}/task", parent.as_raw_nonzero())).into_iter().flatten().flatten();
    let lists = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    let pids: Vec<i32> =
        lists.flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect();
    pids.into_iter().filter_map(Pid::from_raw).collect()
}

fn signal(pids: &[Pid], signal: Signal) {
    for pid in pids {
        // A guard may have ended meanwhile.
        let _ = kill_process(*pid, signal);
    }
}

/// What is left of a run when these are killed: `worker`, and of the guards those with these numbers.
async fn killed(mode: &'static str, worker: bool, guards: &[usize]) -> (Scene, Vec<Pid>) {
    let mut scene = Scene::begin(mode, 600).await;
    let all = scene.guards();
    let victims: Vec<Pid> = guards.iter().filter_map(|number| all.get(*number).copied()).collect();
    if worker {
        // At the same moment, as far as that can be: nobody may notice the other's end.
        let worker = Pid::from_child(&scene.replica.child);
        signal(&victims, Signal::STOP);
        signal(&[worker], Signal::STOP);
        signal(&victims, Signal::KILL);
        scene.replica.kill();
    } else {
        signal(&victims, Signal::KILL);
    }
    let left = scene.left().await;
    (scene, left)
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_a_worker_leaves_nothing_of_its_runs() {
    for mode in ["auto", "subreaper"] {
        let (_scene, left) = killed(mode, true, &[]).await;
        assert!(left.is_empty(), "{mode}: {left:?}");
    }
    let (_scene, left) = killed("off", true, &[]).await;
    assert_eq!(left.len(), 3, "the control: without the guard all of it is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_a_worker_whose_guard_is_frozen_leaves_nothing_of_its_runs() {
    for mode in ["auto", "subreaper"] {
        let mut scene = Scene::begin(mode, 600).await;
        signal(&scene.guards(), Signal::STOP);
        scene.replica.kill();
        let left = scene.left().await;
        assert!(left.is_empty(), "{mode}: {left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_a_guard_leaves_nothing_of_its_run_which_is_stale() {
    // Of a namespace the outer guard, the first process, and both.
    for (mode, guards) in [("auto", &[0][..]), ("auto", &[1]), ("auto", &[0, 1]), ("subreaper", &[0])] {
        let (scene, left) = killed(mode, false, guards).await;
        if guards.contains(&1) && !scene.namespace {
            not_allowed("PID namespaces are not allowed here");
            continue;
        }
        assert!(left.is_empty(), "{mode} {guards:?}: {left:?}");
        let run = scene.finished(&scene.replica).await;
        assert_eq!((&run["status"], &run["reason"]), (&json!("stale"), &json!("guard_lost")), "{run}");
        assert_eq!(scene.replica.client.enqueue("w").await.status, 202, "the workflow is free");
    }
    let (_scene, left) = killed("off", false, &[0]).await;
    assert_eq!(left.len(), 3, "the control: without the guard all of it is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_can_not_look_for_what_a_dead_guard_has_left_does_not_take_it_for_gone() {
    let scene = Scene::begin("subreaper", 600).await;
    let worker = Some(Pid::from_child(&scene.replica.child));
    let none = Rlimit { current: Some(0), ..getrlimit(Resource::Nofile) };
    // It can open nothing any more, and so not read /proc.
    let before = prlimit(worker, Resource::Nofile, none).unwrap();
    signal(&scene.guards(), Signal::KILL);
    let left = scene.left().await;
    assert!(!left.is_empty() && left.iter().all(|pid| role(*pid) != "command"), "its own end is the kernel's work");
    assert_eq!(plant::status(&scene.test.sql, scene.run).await, Status::Running);

    prlimit(worker, Resource::Nofile, before).unwrap();
    let run = scene.finished(&scene.replica).await;
    assert_eq!((&run["status"], &run["reason"]), (&json!("stale"), &json!("guard_lost")), "{run}");
    assert!(inside(&scene.scratch.path(".")).is_empty(), "it was final before its processes were gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_worker_and_guard_at_once_leaves_nothing_of_a_namespace_and_else_not_the_command() {
    for guards in [&[0][..], &[1], &[0, 1]] {
        let (scene, left) = killed("auto", true, guards).await;
        if !scene.namespace {
            not_allowed("PID namespaces are not allowed here");
            break;
        }
        assert!(left.is_empty(), "{guards:?}: {left:?}");
    }
    // What is promised without a namespace: the command itself dies with its guard.
    let (scene, left) = killed("subreaper", true, &[0]).await;
    let roles: Vec<String> = left.iter().map(|pid| role(*pid)).collect();
    assert!(!roles.contains(&"command".to_owned()), "{roles:?}");
    drop(scene);
    let (_scene, left) = killed("off", true, &[0]).await;
    assert_eq!(left.len(), 3, "the control: without the guard all of it is left");
}

fn role(pid: Pid) -> String {
    let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
    let text = String::from_utf8_lossy(&environment).into_owned();
    text.split('\0').find_map(|variable| variable.strip_prefix("ROLE=")).unwrap_or_default().to_owned()
}

/// Freezes these for three heartbeat timeouts while another replica takes the workflow over as soon as it may.
/// The scene, and when it thawed.
async fn frozen(mode: &'static str, who: &[Who]) -> (Scene, Duration) {
    // A frozen guard alone loses no lease: there it is the time limit that brings the next run.
    let worker = who.contains(&Who::Worker);
    let scene = Scene::begin(mode, if worker { 600 } else { 6 }).await;
    let heir = serve(&scene.test, mode);
    let victims: Vec<Pid> = who.iter().flat_map(|who| scene.those(*who)).collect();
    let since = Instant::now();
    signal(&victims, Signal::STOP);

    let run = scene.finished(&heir).await;
    let status = if worker { ("stale", "worker_lost") } else { ("timed_out", "timeout") };
    assert_eq!((&run["status"], &run["reason"]), (&json!(status.0), &json!(status.1)), "{run}");
    assert_eq!(heir.client.enqueue("w").await.status, 202);
    scene.under_way(2).await;
    tokio::time::sleep(FROZEN.saturating_sub(since.elapsed())).await;
    let thaw = monotonic();
    signal(&victims, Signal::CONT);
    // Whoever thawed has had its time to do harm, or to end what it should have ended.
    tokio::time::sleep(2 * A_SECOND).await;
    (scene, thaw)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_two_commands_of_a_workflow_overlap_while_a_worker_is_frozen() {
    let ((auto, _), (subreaper, _), (off, _)) = tokio::join!(
        frozen("auto", &[Who::Worker]),
        frozen("subreaper", &[Who::Worker]),
        frozen("off", &[Who::Worker])
    );
    assert_eq!((auto.overlap(), subreaper.overlap()), (Duration::ZERO, Duration::ZERO));
    assert!(off.overlap() > A_SECOND, "the control: without the guard they overlap");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_two_commands_of_a_workflow_overlap_while_a_guard_is_frozen() {
    let ((auto, _), (subreaper, _), (off, _)) =
        tokio::join!(frozen("auto", &[Who::Guard]), frozen("subreaper", &[Who::Guard]), frozen("off", &[Who::Guard]));
    assert_eq!((auto.overlap(), subreaper.overlap()), (Duration::ZERO, Duration::ZERO));
    assert!(off.overlap() > A_SECOND, "the control: without the guard they overlap");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_worker_and_guard_are_both_frozen_the_overlap_ends_with_their_thaw() {
    const BOTH: [Who; 2] = [Who::Worker, Who::Guard];
    // As the pause of a virtual machine does it.
    const ALL: [Who; 3] = [Who::Worker, Who::Guard, Who::Command];
    let (auto, subreaper, off, all_auto, all_subreaper) = tokio::join!(
        frozen("auto", &BOTH),
        frozen("subreaper", &BOTH),
        frozen("off", &BOTH),
        frozen("auto", &ALL),
        frozen("subreaper", &ALL)
    );
    // What the first command did after the thaw, at the longest.
    let after = |(scene, thaw): &(Scene, Duration)| {
        let (_, roles) = scene.lives().pop_first().unwrap();
        let after = roles.values().map(|life| life.1.saturating_sub(*thaw)).max().unwrap();
        eprintln!("{}: {after:?} after the thaw; {:?} in all", scene.mode, scene.overlap());
        after
    };
    for scene in [&auto, &subreaper, &all_auto, &all_subreaper] {
        assert!(after(scene) < A_SECOND);
    }
    assert!(after(&off) > A_SECOND, "the control: without the guard it does not end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_guard_is_frozen_can_be_cancelled() {
    for mode in ["auto", "subreaper"] {
        let scene = Scene::begin(mode, 600).await;
        signal(&scene.guards(), Signal::STOP);
        let asked = Instant::now();
        let cancelled = scene.replica.client.post(&format!("/api/v1/runs/{}/cancel", scene.run), json!({})).await;
        assert_eq!(cancelled.status, 202, "{cancelled:?}");
        let run = scene.finished(&scene.replica).await;
        assert_eq!((&run["status"], &run["reason"]), (&json!("cancelled"), &json!("requested")), "{run}");
        assert!(inside(&scene.scratch.path(".")).is_empty(), "{mode}: it was final before its processes were gone");
        assert!(asked.elapsed() < Duration::from_secs(5), "{mode}: {:?}", asked.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_that_can_not_be_started_is_said() {
    let test = TestDb::new().await;
    let settings = crate::support::replica::short_lease();
    let replica =
        crate::support::replica::Replica::guarded_by(&test, settings, PathBuf::from("/nonexistent/guard")).await;
    replica.client.define("w", "true").await;
    let run = replica.client.finished(replica.client.enqueue("w").await.run_id()).await;
    assert_eq!((&run["status"], &run["exit_code"]), (&json!("failed"), &Value::Null), "{run}");
    let error = run["error"].as_str().unwrap();
    assert!(error.contains("cannot start the guard of the command, \"/nonexistent/guard\""), "{error}");
    replica.finish().await;
    test.check().await;
}
