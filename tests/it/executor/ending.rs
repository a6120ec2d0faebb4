//! How a command ends, or is ended, and what is left of it.

use rustix::process::{Pid, setpgid};
use std::os::unix::process::CommandExt as _;

use super::*;

#[tokio::test]
async fn the_exit_status_decides() {
    let seen = program(&["true"]).run().await;
    assert!(seen.succeeded() && seen.outcome.exit_code == Some(0) && seen.outcome.error.is_none());
    let seen = shell("exit 3").run().await;
    assert!(seen.failed() && seen.outcome.exit_code == Some(3));
    assert_eq!(seen.error(), "exited with status 3");
    let seen = shell("kill -9 $$").run().await;
    assert!(seen.failed() && seen.outcome.exit_code.is_none());
    assert_eq!(seen.error(), "killed by signal 9 (SIGKILL)");
}

#[tokio::test]
async fn a_time_limit_ends_a_command_and_its_children() {
    let mut bench = shell("sleep 60 & echo $! > $1/child; echo $$ > $1/pid; wait");
    bench.time_limit = Duration::from_millis(500);
    let seen = bench.run().await;
    assert!(matches!(seen.outcome.verdict, Verdict::TimedOut), "{}", seen.error());
    assert_eq!((seen.reason(), seen.error()), ("timeout", "ran longer than its time limit of 0.5 s"));
    assert!(seen.took < SOON && !bench.is_alive("child") && !bench.is_alive("pid"));
}

#[tokio::test]
async fn each_cause_has_its_verdict() {
    for (cause, reason) in
        [(StopCause::Cancel, "requested"), (StopCause::Shutdown, "shutdown"), (StopCause::LeaseLost, "worker_lost")]
    {
        let bench = shell("echo up; exec sleep 60");
        let seen = bench.stop_once_it_speaks(cause).await;
        let cancelled = matches!(seen.outcome.verdict, Verdict::Cancelled);
        assert!(cancelled == (cause == StopCause::Cancel), "{reason}");
        assert!(cancelled || matches!(seen.outcome.verdict, Verdict::Stale), "{reason}");
        assert_eq!(seen.reason(), reason);
        assert!(seen.outcome.exit_code.is_none() && seen.outcome.error.is_some() && seen.took < SOON);
    }
}

#[tokio::test]
async fn a_stop_that_came_first_starts_nothing() {
    let bench = shell("touch $1/started");
    let (log, _chunks) = mpsc::channel(1);
    let (_stopper, stop) = watch::channel(Some(StopCause::Shutdown));
    let outcome = bench.attempt(log, stop).await;
    assert!(matches!(outcome.verdict, Verdict::Stale) && !bench.path("started").exists());
}

#[tokio::test]
async fn exit_0_after_a_stop_is_no_success_but_its_output_and_code_are_kept() {
    let bench = shell("trap 'echo \"{\\\"half\\\": true}\"; exit 0' TERM; echo up; while :; do sleep 0.02; done");
    let seen = bench.stop_once_it_speaks(StopCause::Cancel).await;
    assert!(matches!(seen.outcome.verdict, Verdict::Cancelled));
    assert_eq!((seen.outcome.exit_code, &seen.outcome.output), (Some(0), &Some(json!({"half": true}))));
}

#[tokio::test]
async fn a_command_that_ignores_term_is_killed_after_the_grace() {
    let bench = shell("trap '' TERM; echo $$ > $1/pid; echo up; while :; do sleep 0.02; done");
    let seen = bench.stop_once_it_speaks(StopCause::Cancel).await;
    assert!(matches!(seen.outcome.verdict, Verdict::Cancelled) && seen.outcome.exit_code.is_none());
    assert!(seen.took >= GRACE && seen.took < SOON && !bench.is_alive("pid"), "{:?}", seen.took);
}

#[tokio::test]
async fn a_command_that_is_suspended_still_gets_to_handle_term() {
    let bench = shell("trap 'touch $1/handled; exit 1' TERM; echo up; kill -STOP $$; sleep 60");
    bench.stop_once_it_speaks(StopCause::Cancel).await;
    assert!(bench.path("handled").exists());
}

#[tokio::test]
async fn a_lost_lease_kills_without_term_even_during_a_grace() {
    let script = "trap 'touch $1/termed; echo termed' TERM; echo up; while :; do sleep 0.02; done";
    let bench = shell(script);
    bench.stop_once_it_speaks(StopCause::LeaseLost).await;
    assert!(!bench.path("termed").exists());

    let bench = shell(script);
    let (log, mut chunks) = mpsc::channel::<LogChunk>(4);
    let (stopper, stop) = watch::channel(None);
    let invocation = Invocation { kill_grace: Duration::from_secs(60), ..bench.invocation() };
    let lose = async {
        while let Some(chunk) = chunks.recv().await {
            // The shell itself says a word too when its `sleep` is terminated.
            let cause = match chunk.text.as_str() {
                "up\n" => StopCause::Cancel,
                "termed\n" => StopCause::LeaseLost,
                _ => continue,
            };
            let _ = stopper.send(Some(cause));
        }
    };
    let began = Instant::now();
    let (outcome, ()) = tokio::join!(run(invocation, log, stop), lose);
    assert!(matches!(outcome.verdict, Verdict::Cancelled));
    assert!(bench.path("termed").exists() && began.elapsed() < SOON);
}

#[tokio::test]
async fn grandchildren_that_hold_the_pipe_do_not_outlive_the_run() {
    for stubborn in ["", "trap '' TERM;"] {
        let bench = shell(&format!(
            "sh -c '{stubborn} echo $$ > $1/child; touch $1/up; while :; do sleep 0.02; done' sh $1 & \
             until [ -e $1/up ]; do sleep 0.02; done; echo '{{\"a\": 1}}'; exit 0"
        ));
        let seen = bench.run().await;
        assert!(seen.succeeded(), "{}", seen.error());
        assert_eq!(seen.outcome.output, Some(json!({"a": 1})));
        assert!(seen.took < SOON && !bench.is_alive("child"), "{stubborn}");
    }
}

#[tokio::test]
async fn a_grandchild_left_behind_may_finish_within_the_grace() {
    let bench = shell(
        "sh -c 'trap \"echo bye; touch $1/tidied; exit\" TERM; touch $1/up; while :; do sleep 0.02; done' sh $1 & \
         until [ -e $1/up ]; do sleep 0.02; done",
    );
    let seen = bench.run().await;
    assert!(seen.succeeded() && bench.path("tidied").exists());
    assert_eq!(seen.text(Stream::Stdout), "bye\n");
}

#[tokio::test]
async fn what_left_the_group_the_session_and_its_parent_ends_with_the_run() {
    for mode in [Mode::Auto, Mode::Subreaper] {
        // Also one that ignores TERM, and writes to the log for ever.
        for (what, after) in [("trap '' TERM PIPE", "while :; do echo noise; done 2>&1"), (":", "exec sleep 60")] {
            let bench = shell(&format!(
                "(setsid sh -c '{what}; echo $$ > $1/escaped; touch $1/up; {after}' sh $1 &) & \
                 until [ -e $1/up ]; do sleep 0.02; done; echo done"
            ));
            let bench = bench.guarded(mode);
            let seen = bench.run().await;
            assert!(seen.succeeded() && seen.text(Stream::Stdout).contains("done\n"), "{}", seen.error());
            assert!(seen.took < SOON && !bench.is_alive("escaped"), "{mode} {what}: {:?}", seen.took);
        }
    }
}

#[tokio::test]
async fn a_zombie_that_its_parent_neglects_does_not_hang_the_run() {
    for mode in [Mode::Auto, Mode::Subreaper] {
        // The shell has become a `sleep`, which waits for no child.
        let bench = shell(
            "sh -c 'sleep 0.1 & echo $! > $1/zombie; echo $$ > $1/escaped; exec setsid sleep 20' sh $1 & \
             until [ -s $1/escaped ] && grep -q ') Z ' /proc/$(cat $1/zombie)/stat; do sleep 0.02; done; sleep 0.1",
        );
        let bench = bench.guarded(mode);
        let seen = bench.run().await;
        assert!(seen.succeeded() && seen.took < SOON && !bench.is_alive("escaped"), "{mode}: {:?}", seen.took);
    }
}

#[tokio::test]
async fn a_leader_that_closed_its_pipes_is_still_waited_for() {
    let bench = shell("exec >&- 2>&- <&-; sleep 0.3; touch $1/finished; exit 5");
    let seen = bench.run().await;
    assert!(bench.path("finished").exists() && seen.outcome.exit_code == Some(5));
}

#[tokio::test]
async fn a_dropped_run_is_killed() {
    let bench = shell("setsid sleep 60 & echo $! > $1/child; echo $$ > $1/pid; echo up; wait");
    let (log, mut chunks) = mpsc::channel(4);
    let (_stopper, stop) = watch::channel(None);
    tokio::select! {
        _ = bench.attempt(log, stop) => panic!("it ended early"),
        _ = chunks.recv() => {}
    }
    let began = Instant::now();
    while bench.is_alive("pid") || bench.is_alive("child") {
        assert!(began.elapsed() < SOON);
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn neither_command_nor_guard_is_left_as_a_zombie() {
    let text = shell("echo $$ $PPID").guarded(Mode::Subreaper).run().await.text(Stream::Stdout);
    for pid in text.split_whitespace() {
        let pid = rustix::process::Pid::from_raw(pid.parse().expect("a number")).expect("not zero");
        assert!(rustix::process::test_kill_process(pid).is_err(), "{text}");
    }
}

/// No test: a program that hides from the worker where that does not look, in its own group.
#[test]
#[ignore = "a program that a test starts"]
fn hide() {
    let Some(group) = std::env::var("GROUP").ok().and_then(|group| Pid::from_raw(group.parse().ok()?)) else { return };
    let _ = setpgid(None, Some(group));
    fs::write("hidden", std::process::id().to_string()).expect("write");
    fs::write("up", "").expect("write");
    std::thread::sleep(SOON);
}

#[tokio::test]
async fn nothing_hides_in_the_workers_own_group_from_the_death_of_its_guard() {
    let (program, group) = (std::env::current_exe().expect("a path"), own_stat(4));
    if group == "0" {
        return not_allowed("nobody can join the group of this process: its leader is outside of the container");
    }
    let script = format!(
        "(GROUP={group} {} --quiet --exact executor::ending::hide --ignored &); \
         until [ -e up ]; do sleep 0.02; done; kill -9 $PPID; sleep 60",
        program.display()
    );
    let bench = shell(&script).guarded(Mode::Subreaper);
    let seen = bench.run().await;
    assert_eq!(seen.reason(), "guard_lost", "{}", seen.error());
    assert!(!bench.is_alive("hidden"));
}

#[tokio::test]
async fn many_runs_at_once_keep_their_results_apart() {
    let mut runs = tokio::task::JoinSet::new();
    for code in 0..40 {
        runs.spawn(async move {
            let seen = shell(&format!("echo {code}; sleep 0.1; exit {code}")).run().await;
            assert_eq!(seen.text(Stream::Stdout), format!("{code}\n"));
            assert_eq!(seen.outcome.exit_code, Some(code));
        });
    }
    while let Some(result) = runs.join_next().await {
        result.expect("as it should");
    }
}

/// A child that this process has started itself, in a group of its own, while the run was under way.
struct Bystander(std::sync::mpsc::Sender<()>, std::thread::JoinHandle<bool>);

impl Bystander {
    /// Its thread stays: the kernel would give the children of one that has ended to the first.
    fn start() -> Self {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let mut child = std::process::Command::new("sleep").arg("60").process_group(0).spawn().expect("sleep");
            ready.send(()).expect("somebody waits");
            let _ = ended.recv();
            let lived = child.try_wait().is_ok_and(|ended| ended.is_none());
            let _ = child.kill();
            let _ = child.wait();
            lived
        });
        is_ready.recv().expect("it has started");
        Self(end, thread)
    }

    fn lived(self) -> bool {
        drop(self.0);
        self.1.join().expect("its thread")
    }
}

#[tokio::test]
async fn what_a_dead_guard_leaves_behind_is_killed_and_no_other_child_of_this_process() {
    let bench = shell(
        "echo up; until [ -e $1/go ]; do sleep 0.02; done
         (setsid sh -c 'echo $$ > $1/escaped; exec sleep 60' sh $1 &); until [ -s $1/escaped ]; do sleep 0.02; done
         kill -9 $PPID; sleep 60",
    );
    let bench = bench.guarded(Mode::Subreaper);
    let go = bench.path("go");
    let mut bystander = None;
    let seen = bench
        .run_and(|_, _| {
            bystander = Some(Bystander::start());
            fs::write(&go, "").expect("write");
        })
        .await;
    assert_eq!((seen.outcome.verdict, seen.reason()), (Verdict::Stale, "guard_lost"), "{}", seen.error());
    assert!(!bench.is_alive("escaped") && seen.took < SOON);
    assert!(bystander.expect("the command spoke").lived(), "it was taken for an orphan");
}

#[tokio::test]
async fn a_guard_that_may_make_no_namespace_is_a_subreaper() {
    if !is_root() {
        return not_allowed("only root can take the right to make namespaces away");
    }
    if !has_namespaces().await {
        return;
    }
    let mut bench = shell(
        "(setsid sh -c 'echo $$ > $1/escaped; exec sleep 60' sh $1 &); until [ -s $1/escaped ]; do sleep 0.02; done
         echo $PPID",
    );
    let guard = format!("#!/bin/sh\nexec setpriv --bounding-set -sys_admin {GUARD} \"$@\"\n");
    bench.guarding.program = bench.file("guard", guard.as_bytes(), 0o755).into();
    let seen = bench.run().await;
    assert!(seen.succeeded(), "{} {}", seen.error(), seen.text(Stream::Stderr));
    assert_ne!(seen.text(Stream::Stdout), "1\n", "it has a namespace");
    assert!(!bench.is_alive("escaped"));
}
