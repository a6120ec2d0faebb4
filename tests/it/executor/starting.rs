//! What a command is given, and what is said when it cannot start.

use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::Mode as FileMode;
use nix::unistd::mkfifo;

use super::*;

#[tokio::test]
async fn a_command_sees_its_own_variables_and_none_of_the_service() {
    let mut bench = program(&["env"]);
    bench.command.env.insert("COLOUR".to_owned(), "blue".to_owned());
    bench.command.env.insert("SINGLETRACK_FENCE".to_owned(), "forged".to_owned());
    let seen = bench.run().await;
    let text = seen.text(Stream::Stdout);
    let mut names: Vec<_> = text.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
    names.retain(|name| !["HOME", "LANG", "TMPDIR"].contains(name));
    names.sort_unstable();
    let own = ["SINGLETRACK_ATTEMPT", "SINGLETRACK_FENCE", "SINGLETRACK_RUN_ID", "SINGLETRACK_WORKFLOW_ID"];
    assert_eq!(names, [&["COLOUR", "PATH"], &own[..]].concat());
    assert!(text.contains("SINGLETRACK_FENCE=77\n") && text.contains("SINGLETRACK_ATTEMPT=2\n"), "{text}");
    assert!(text.contains("SINGLETRACK_WORKFLOW_ID=deploy@prod\n") && text.contains("COLOUR=blue\n"), "{text}");
    assert!(text.contains(&format!("SINGLETRACK_RUN_ID={}\n", Uuid::nil())), "{text}");
    for name in ["PATH", "HOME", "LANG", "TMPDIR"] {
        if let Ok(value) = std::env::var(name) {
            assert!(text.contains(&format!("{name}={value}\n")), "{text}");
        }
    }
    // Else this test would prove nothing.
    assert!(std::env::vars_os().any(|(name, _)| !text.contains(&*name.to_string_lossy())));
}

#[tokio::test]
async fn a_path_of_the_command_decides_where_its_program_is_found() {
    let mut bench = shell("");
    bench.file("only-here", b"#!/bin/sh\necho found\n", 0o755);
    bench.command.argv = vec!["only-here".to_owned()];
    bench.command.env.insert("PATH".to_owned(), format!("/nowhere:{}", bench.folder.display()));
    assert_eq!(bench.run().await.text(Stream::Stdout), "found\n");
}

#[tokio::test]
async fn no_descriptor_of_the_service_is_inherited() {
    let bench = shell("ls -l /proc/self/fd");
    let held = fs::File::create(bench.path("held-by-the-service")).expect("create");
    fcntl_setfd(&held, FdFlags::empty()).expect("as if left by whoever started the service");
    let seen = bench.run().await;
    let text = seen.text(Stream::Stdout);
    assert!(seen.succeeded() && text.contains(" 1 -> pipe:"), "{text}");
    assert!(!text.contains("held-by-the-service") && !text.contains("socket:") && !text.contains("anon"), "{text}");
}

#[tokio::test]
async fn a_command_leads_its_own_process_group_with_signals_as_new() {
    let text = program(&["cut", "-d ", "-f1,5", "/proc/self/stat"]).run().await.text(Stream::Stdout);
    let (pid, group) = text.trim().split_once(' ').expect("two ids");
    assert_eq!(pid, group);

    // Rust programs ignore SIGPIPE, and whoever started the service may have had others ignored.
    // SAFETY: it runs no code.
    unsafe { signal(Signal::SIGTTOU, SigHandler::SigIgn) }.expect("ignored");
    let text = program(&["grep", "-E", "SigBlk|SigIgn", "/proc/self/status"]).run().await.text(Stream::Stdout);
    let mask = |line: &str| u64::from_str_radix(line.split_once('\t')?.1, 16).ok();
    let masks: Vec<u64> = text.lines().filter_map(mask).collect();
    // 32 and 33 belong to glibc: whatever `make` starts ignores them.
    assert!(masks.len() == 2 && masks[0] == 0 && masks[1] & 0x7fff_ffff == 0, "{text}");
}

#[tokio::test]
async fn a_command_has_no_terminal_on_which_to_wait_for_a_password() {
    let text = program(&["cut", "-d ", "-f6,7", "/proc/self/stat"]).guarded(Mode::Subreaper).run().await;
    let text = text.text(Stream::Stdout);
    let own = own_stat(5);
    let (session, terminal) = text.trim().split_once(' ').expect("two numbers");
    assert!(session != own && session != "0" && terminal == "0", "{text}");
}

#[tokio::test]
async fn input_is_one_line_of_json_and_null_without() {
    let mut bench = shell("read -r line && printf 'got %s\\n' \"$line\" && cat");
    assert_eq!(bench.run().await.text(Stream::Stdout), "got null\n");
    bench.input = Some(to_raw_value(&json!({"a": "b\nc"})).expect("it is JSON"));
    assert_eq!(bench.run().await.text(Stream::Stdout), "got {\"a\":\"b\\nc\"}\n");
}

#[tokio::test]
async fn a_big_input_that_is_never_read_neither_hangs_nor_fails_the_run() {
    for script in ["exit 0", "exec <&-; echo closed", "exec 3<&0; setsid sleep 5 <&3 >/dev/null 2>&1 & exit 0"] {
        let mut bench = shell(script);
        bench.input = Some(to_raw_value(&"x".repeat(4 << 20)).expect("it is JSON"));
        let seen = bench.run().await;
        assert!(seen.succeeded(), "{script}: {}", seen.error());
        assert!(seen.took < Duration::from_secs(4), "{script}: {:?}", seen.took);
    }
}

#[tokio::test]
async fn a_big_input_is_read_while_the_command_prints_as_much() {
    let mut bench = program(&["cat"]);
    bench.input = Some(to_raw_value(&"y".repeat(4 << 20)).expect("it is JSON"));
    bench.limits.log_bytes = 8 << 20;
    let seen = bench.run().await;
    assert_eq!(seen.text(Stream::Stdout).len(), (4 << 20) + 3);
}

/// The error of a command that must not have started.
async fn refusal(bench: &Bench) -> String {
    let seen = bench.run().await;
    assert!(seen.failed() && seen.outcome.exit_code.is_none(), "{}", seen.error());
    assert!(seen.chunks.is_empty());
    seen.error().to_owned()
}

#[tokio::test]
async fn a_missing_program_is_told_from_a_missing_folder() {
    let mut bench = shell("");
    bench.command.argv[0] = "no-such-program".to_owned();
    let error = refusal(&bench).await;
    assert!(error.contains("\"no-such-program\" was not found on PATH=/"), "{error}");

    bench.command.argv[0] = "./no-such-program".to_owned();
    let error = refusal(&bench).await;
    assert!(error.contains("/./no-such-program\" does not exist"), "{error}");

    bench.command.argv[0] = "sh".to_owned();
    bench.command.cwd = Some(bench.path("gone").display().to_string());
    let error = refusal(&bench).await;
    assert!(error.contains("working directory") && error.contains("gone\" does not exist"), "{error}");

    bench.command.cwd = Some(bench.file("a-file", b"", 0o644));
    let error = refusal(&bench).await;
    assert!(error.contains("a-file\" is not a directory"), "{error}");

    bench.command.cwd = None;
    bench.command.argv[0] = bench.file("orphan", b"#!/no/such/interpreter\n", 0o755);
    let error = refusal(&bench).await;
    assert!(error.contains("orphan\" exists, but the interpreter"), "{error}");
}

#[tokio::test]
async fn what_may_not_or_cannot_be_executed_is_said() {
    let mut bench = shell("");
    for (name, content, mode, expected) in [
        ("plain", &b"#!/bin/sh\n"[..], 0o644, "is not executable"),
        ("garbage", b"\0\x01\x02", 0o755, "exec format error"),
        ("no-first-line", b"echo hello\n", 0o755, "exec format error"),
        ("other-machine", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x16\0", 0o755, "exec format error"),
    ] {
        bench.command.argv[0] = bench.file(name, content, mode);
        let error = refusal(&bench).await;
        assert!(error.contains(name) && error.contains(expected), "{name}: {error}");
    }
    bench.command.argv[0] = bench.folder.display().to_string();
    let error = refusal(&bench).await;
    assert!(error.contains("is a directory"), "{error}");
    bench.command.argv[0] = bench.path("pipe").display().to_string();
    mkfifo(&bench.path("pipe"), FileMode::S_IRWXU).expect("a named pipe");
    let error = refusal(&bench).await;
    assert!(error.contains("is no regular file"), "{error}");
}

#[tokio::test]
async fn arguments_no_process_can_be_given_are_said() {
    let mut bench = program(&["echo", &"x".repeat(200 << 10)]);
    let error = refusal(&bench).await;
    assert!(error.contains("argument list too long"), "{error}");

    bench.command.argv[1] = "a\0b".to_owned();
    let error = refusal(&bench).await;
    assert!(error.contains("`argv[1]` contains a NUL byte"), "{error}");

    bench.command.argv.pop();
    bench.command.env.insert("A=B".to_owned(), String::new());
    let error = refusal(&bench).await;
    assert!(error.contains("`env` has the name \"A=B\""), "{error}");

    bench.command.argv.clear();
    bench.command.env.clear();
    let error = refusal(&bench).await;
    assert!(error.contains("the command is empty"), "{error}");
}

#[tokio::test]
async fn a_relative_program_is_looked_for_below_its_working_directory() {
    let mut bench = shell("");
    bench.file("here", b"#!/bin/sh\npwd\n", 0o755);
    bench.command.argv = vec!["./here".to_owned()];
    bench.command.cwd = Some(bench.folder.display().to_string());
    let seen = bench.run().await;
    assert_eq!(seen.text(Stream::Stdout).trim(), bench.folder.to_str().expect("UTF-8"), "{}", seen.error());
}

#[tokio::test]
async fn a_program_that_is_being_replaced_is_waited_for() {
    let mut bench = shell("");
    bench.command.argv = vec![bench.file("busy", b"#!/bin/sh\necho ran\n", 0o755)];
    let mut writer = shell("exec 3>>\"$0\"; echo open; sleep 0.1");
    writer.command.argv[3] = bench.command.argv[0].clone();
    let open = tokio::sync::Notify::new();
    let run = async {
        open.notified().await;
        bench.run().await
    };
    let (_, seen) = tokio::join!(writer.run_and(|_, _| open.notify_one()), run);
    assert_eq!(seen.text(Stream::Stdout), "ran\n", "{}", seen.error());
}

#[tokio::test]
async fn nothing_is_started_for_a_worker_that_may_have_lost_the_run() {
    let mut bench = shell("touch $1/started");
    bench.may_start = false;
    let seen = bench.run().await;
    assert_eq!((seen.outcome.verdict, seen.outcome.reason.as_deref()), (Verdict::Stale, Some("worker_lost")));
    assert!(!bench.folder.join("started").exists());
}
