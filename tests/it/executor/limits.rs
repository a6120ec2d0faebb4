//! What a command may use, under which account, and what it gets of the service's environment.

use super::*;

#[tokio::test]
async fn memory_beyond_its_limit_is_refused_to_a_command() {
    // `tail` keeps the line whose end it waits for.
    let mut bench = shell("head -c 200000000 /dev/zero | tail -n 1 | wc -c");
    assert_eq!(bench.run().await.text(Stream::Stdout).trim(), "200000000");
    bench.command.limits.memory_bytes = Some(50 << 20);
    let seen = bench.run().await;
    assert_eq!(seen.text(Stream::Stdout).trim(), "0");
    assert!(seen.text(Stream::Stderr).contains("memory"), "{}", seen.text(Stream::Stderr));
}

#[tokio::test]
async fn files_beyond_the_limit_can_not_be_opened() {
    // `tee` holds them all open at once.
    let mut bench = shell("ulimit -n; ulimit -Hn; echo | tee $(seq 20)");
    assert!(bench.run().await.succeeded());
    bench.command.limits.open_files = Some(16);
    let seen = bench.run().await;
    assert!(seen.failed() && seen.text(Stream::Stdout) == "16\n16\n\n", "{}", seen.text(Stream::Stdout));
    assert!(seen.text(Stream::Stderr).contains("Too many open files"), "{}", seen.text(Stream::Stderr));
}

#[tokio::test]
async fn a_limit_above_what_the_service_may_have_is_the_services_own() {
    let own = shell("ulimit -Hn").run().await.text(Stream::Stdout);
    let mut bench = shell("ulimit -n");
    bench.command.limits.open_files = Some(u64::MAX);
    assert_eq!(bench.run().await.text(Stream::Stdout), own);
}

#[tokio::test]
async fn processes_of_root_can_not_be_limited_and_that_is_said() {
    let mut bench = shell("true");
    bench.command.limits.processes = Some(5);
    let seen = bench.run().await;
    if !is_root() {
        assert!(seen.succeeded(), "{}", seen.error());
        return;
    }
    assert!(seen.failed() && seen.error().contains("name a `user` for the command"), "{}", seen.error());
    bench.command.user = Some("root".to_owned());
    assert!(bench.run().await.error().contains("name a `user` for the command"));
}

#[tokio::test]
async fn another_account_has_its_groups_its_home_and_its_own_rights() {
    let mut bench =
        shell("id -u; id -un; echo $HOME; echo said > /dev/stderr; cat /proc/self/status | grep Groups; pwd");
    bench.command.user = Some("nobody".to_owned());
    if !is_root() {
        let seen = bench.run().await;
        assert!(seen.failed() && seen.error().contains("`user` needs a service that runs as root"), "{}", seen.error());
        return;
    }
    let nobody = nobody();
    for mode in [Mode::Auto, Mode::Subreaper] {
        bench.guarding.mode = mode;
        bench.command.cwd = Some("/".to_owned());
        bench.command.env.clear();
        let seen = bench.run().await;
        let groups = format!("Groups:\t{} ", nobody.1);
        let expected = format!("{}\nnobody\n{}\n{groups}\n/\n", nobody.0, nobody.2);
        assert_eq!((seen.text(Stream::Stdout), seen.text(Stream::Stderr)), (expected, "said\n".to_owned()), "{mode}");
        bench.command.env.insert("HOME".to_owned(), "/elsewhere".to_owned());
        assert!(bench.run().await.text(Stream::Stdout).contains("\n/elsewhere\n"));

        // What root may enter and execute, and this account not.
        fs::set_permissions(&bench.folder, fs::Permissions::from_mode(0o700)).expect("mode");
        bench.command.cwd = Some(bench.folder.display().to_string());
        let seen = bench.run().await;
        assert!(seen.failed() && seen.error().contains("may not be entered by the command's user"), "{}", seen.error());
        bench.command.cwd = Some("/".to_owned());
        let mine = vec![bench.file("mine", b"#!/bin/sh\n", 0o700)];
        let argv = std::mem::replace(&mut bench.command.argv, mine);
        let seen = bench.run().await;
        assert!(seen.failed() && seen.error().contains("is not executable by the command's user"), "{}", seen.error());
        bench.command.argv = argv;

        bench.command.user = Some("no-such-account".to_owned());
        let seen = bench.run().await;
        assert!(seen.failed() && seen.error().contains("there is no account \"no-such-account\""), "{}", seen.error());
        bench.command.user = Some("nobody".to_owned());
    }
}

#[tokio::test]
async fn processes_of_an_account_are_limited() {
    if !is_root() {
        return not_allowed("only root can run a command under an account that nothing else runs under");
    }
    // More at once than the limit, whatever else runs as nobody.
    let mut bench = shell("for n in $(seq 200); do sleep 5 & done; echo started");
    bench.command.user = Some("nobody".to_owned());
    bench.command.cwd = Some("/".to_owned());
    let seen = bench.run().await;
    assert!(seen.succeeded() && seen.text(Stream::Stdout) == "started\n", "{}", seen.text(Stream::Stdout));
    bench.command.limits.processes = Some(100);
    let seen = bench.run().await;
    assert!(seen.failed() && seen.text(Stream::Stderr).contains("fork"), "{}", seen.text(Stream::Stderr));
}

#[tokio::test]
async fn everything_of_another_account_is_killed_too() {
    if !is_root() {
        return not_allowed("only root can run a command under another account");
    }
    for mode in [Mode::Auto, Mode::Subreaper] {
        let mut bench = shell(
            "trap '' TERM; setsid sh -c 'echo $$ > $1/escaped; exec sleep 60' sh $1 & \
                               until [ -s $1/escaped ]; do sleep 0.02; done; echo up; wait",
        )
        .guarded(mode);
        fs::set_permissions(&bench.folder, fs::Permissions::from_mode(0o777)).expect("mode");
        bench.command.user = Some("nobody".to_owned());
        let seen = bench.stop_once_it_speaks(StopCause::Cancel).await;
        assert_eq!(seen.outcome.verdict, Verdict::Cancelled, "{}", seen.error());
        assert!(!bench.is_alive("escaped") && seen.took < SOON, "{mode}");
    }
}

#[tokio::test]
async fn what_env_pass_names_is_passed_on_but_never_a_setting_of_the_service() {
    let mut bench = program(&["env"]);
    // Whoever runs the tests has set both, the second for the Postgres to use.
    let own = "SINGLETRACK_PG_BIN";
    let plain = |(name, value): &(String, String)| {
        !["PATH", "HOME", "LANG", "TMPDIR", "DATABASE_URL"].contains(&name.as_str())
            && !name.starts_with("SINGLETRACK_")
            && !value.contains('\n')
    };
    let (passed, value) = std::env::vars().find(plain).expect("an ordinary variable");
    assert!(!bench.run().await.text(Stream::Stdout).contains(&format!("{passed}={value}\n")), "not unasked");
    bench.command.env_pass = [&passed, own, "DATABASE_URL", "NOT_SET_AT_ALL"].map(str::to_owned).to_vec();
    let text = bench.run().await.text(Stream::Stdout);
    assert!(text.contains(&format!("{passed}={value}\n")), "{text}");
    assert!(![own, "DATABASE_URL", "NOT_SET"].iter().any(|name| text.contains(&format!("{name}="))), "{text}");
    bench.command.env.insert(passed.clone(), "its own".to_owned());
    assert!(bench.run().await.text(Stream::Stdout).contains(&format!("{passed}=its own\n")));
}

#[tokio::test]
async fn a_commands_own_limits_on_log_and_output_stand_over_the_workers() {
    for (worker, command) in [(10, 20), (20, 10), (20, 0)] {
        let mut bench = shell("printf %s 0123456789012345678901234; echo; echo '{\"a\": 1}'");
        bench.limits.log_bytes = worker;
        bench.command.limits.log_bytes = Some(command);
        let seen = bench.run().await;
        assert_eq!(seen.text(Stream::System), format!("log truncated after {command} bytes\n"));
        assert_eq!(seen.text(Stream::Stdout).len() as u64, command);
        assert_eq!(seen.outcome.output, Some(json!({"a": 1})), "the command went on");
    }
    for (worker, command, fits) in [(4, 8, true), (8, 7, false)] {
        let mut bench = shell("echo '{\"a\": 1}'");
        bench.limits.output_bytes = worker;
        bench.command.limits.output_bytes = Some(command);
        assert_eq!(bench.run().await.outcome.output.is_some(), fits);
    }
}

#[tokio::test]
async fn nothing_is_started_past_the_end_of_the_lease_and_what_runs_is_ended_by_then() {
    let mut bench = shell("touch $1/started");
    bench.end_by = Boottime::now();
    let seen = bench.run().await;
    assert_eq!((seen.outcome.verdict, seen.reason()), (Verdict::Stale, "worker_lost"));
    assert!(!bench.path("started").exists());

    for mode in [Mode::Auto, Mode::Subreaper] {
        let mut bench = shell("trap '' TERM; echo $$ > $1/pid; while :; do sleep 0.02; done").guarded(mode);
        bench.end_by = Boottime::now() + Duration::from_millis(500);
        let seen = bench.run().await;
        assert_eq!((seen.outcome.verdict, seen.reason()), (Verdict::Stale, "worker_lost"), "{mode}");
        assert!(seen.took < Duration::from_millis(500) + GRACE + Duration::from_secs(1) && !bench.is_alive("pid"));
    }
}

/// User, group and home of nobody.
fn nobody() -> (String, String, String) {
    let accounts = fs::read_to_string("/etc/passwd").expect("accounts");
    let line = accounts.lines().find(|line| line.starts_with("nobody:")).expect("nobody");
    let fields: Vec<&str> = line.split(':').collect();
    (fields[2].to_owned(), fields[3].to_owned(), fields[5].to_owned())
}
