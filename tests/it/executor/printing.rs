//! What becomes of what a command prints.

use super::*;

#[tokio::test]
async fn both_streams_reach_the_log_in_the_order_of_arrival() {
    let seen = shell("echo one; sleep 0.05; echo two >&2; sleep 0.05; echo three").run().await;
    let text: Vec<_> = seen.chunks.iter().map(|chunk| chunk.text.as_str()).collect();
    assert_eq!(text, ["one\n", "two\n", "three\n"]);
    assert_eq!(seen.text(Stream::Stderr), "two\n");
}

#[tokio::test]
async fn invalid_utf8_and_nul_are_replaced_and_split_characters_joined() {
    let seen = shell(r"printf 'a\377b\000c\303'; sleep 0.3; printf '\251\n\342\202'").run().await;
    assert_eq!(seen.text(Stream::Stdout), "a\u{fffd}b\u{fffd}c\u{e9}\n\u{fffd}");
    assert!(seen.succeeded());
}

#[tokio::test]
async fn an_unfinished_line_is_shown_before_it_ends() {
    for (redirection, stream) in [("", Stream::Stdout), (">&2", Stream::Stderr)] {
        // The command waits for somebody to react to its prompt, for as long as the time limit lets it.
        let bench =
            shell(&format!("(printf 'Continue? '; until [ -e $1/yes ]; do sleep 0.02; done; echo yes) {redirection}"));
        let yes = bench.path("yes");
        let seen = bench.run_and(|_, _| fs::write(&yes, b"").expect("write")).await;
        assert_eq!(seen.text(stream), "Continue? yes\n");
        assert!(seen.took < SOON, "{:?}", seen.took);
    }
}

#[tokio::test]
async fn chunks_are_small_and_end_at_line_ends() {
    let seen = shell("seq 1 50000").run().await;
    assert!(seen.chunks.iter().all(|chunk| chunk.text.len() <= 16 << 10));
    assert!(seen.chunks.iter().filter(|chunk| !chunk.text.ends_with('\n')).count() <= 1);
    let expected: String = (1..=50_000).map(|number| format!("{number}\n")).collect();
    assert!(seen.text(Stream::Stdout) == expected);

    let seen = shell("head -c 100000 /dev/zero; printf '\\303\\251%.0s' $(seq 1 30000)").run().await;
    assert!(seen.chunks.iter().all(|chunk| chunk.text.len() <= 16 << 10));
    assert!(seen.text(Stream::Stdout) == "\u{fffd}".repeat(100_000) + &"\u{e9}".repeat(30_000));
}

#[tokio::test]
async fn a_flood_is_cut_said_to_be_cut_and_leaves_the_command_alone() {
    let mut bench =
        shell("head -c 200000000 /dev/zero | tr '\\0' x; echo; echo '{\"still\": \"here\"}'; echo late >&2");
    bench.limits.log_bytes = 50_001;
    let seen = bench.run().await;
    assert!(seen.succeeded(), "{}", seen.error());
    assert_eq!(seen.text(Stream::Stdout), "x".repeat(50_001));
    assert_eq!(seen.text(Stream::Stderr), "");
    assert_eq!(seen.text(Stream::System), "log truncated after 50001 bytes\n");
    assert_eq!(seen.outcome.output, Some(json!({"still": "here"})));
}

#[tokio::test]
async fn a_log_of_exactly_the_limit_is_not_called_truncated() {
    let mut bench = shell("echo 1234567; printf '\\303\\251' >&2");
    bench.limits.log_bytes = 10;
    let seen = bench.run().await;
    assert_eq!((seen.text(Stream::Stdout), seen.text(Stream::System)), ("1234567\n".to_owned(), String::new()));
    bench.limits.log_bytes = 9;
    let seen = bench.run().await;
    assert_eq!(
        (seen.text(Stream::Stderr), seen.text(Stream::System)),
        (String::new(), "log truncated after 9 bytes\n".to_owned())
    );
}

#[tokio::test]
async fn a_json_object_in_the_last_line_becomes_the_output() {
    for (script, expected) in [
        ("echo '{\"a\": 1}'; echo; echo '  '", Some(json!({"a": 1}))),
        ("printf '{\"a\": 2}'", Some(json!({"a": 2}))),
        ("echo '{\"a\": 3}' ; exit 4", Some(json!({"a": 3}))),
        ("echo '{\"a\": 1}'; echo done", None),
        ("echo '[1]'", None),
        ("echo '{\"a\": 1'", None),
        ("echo '{\"a\": 1}' >&2", None),
        ("true", None),
        (
            r#"echo '{"k\\u0000": ["v\\u0000", {"x": "\\u0000"}]}'"#,
            Some(json!({"k\u{fffd}": ["v\u{fffd}", {"x": "\u{fffd}"}]})),
        ),
        (r#"printf '{"raw": "\000\377"}'"#, Some(json!({"raw": "\u{fffd}\u{fffd}"}))),
    ] {
        // echo of dash reads `\\u` as `\u`.
        let seen = shell(script).run().await;
        assert_eq!(seen.outcome.output, expected, "{script}");
        assert_eq!(seen.text(Stream::System), "", "{script}");
    }
}

#[tokio::test]
async fn a_last_line_over_the_limit_is_no_output_and_the_log_says_so() {
    let mut bench = shell("echo '{\"a\": 1}'; echo '{\"b\": \"123456789\"}'");
    bench.limits.output_bytes = 18;
    assert_eq!(bench.run().await.outcome.output, Some(json!({"b": "123456789"})));
    bench.limits.output_bytes = 17;
    let seen = bench.run().await;
    assert_eq!(seen.outcome.output, None);
    assert!(seen.text(Stream::System).contains("more than 17 bytes"), "{}", seen.text(Stream::System));
    assert!(seen.succeeded());
}

#[tokio::test]
async fn a_closed_log_just_discards() {
    let bench = shell("seq 1 100000; echo '{\"a\": 1}'");
    let (log, chunks) = mpsc::channel(1);
    drop(chunks);
    let (_stopper, stop) = watch::channel(None);
    let outcome = bench.attempt(log, stop).await;
    assert!(matches!(outcome.verdict, Verdict::Succeeded));
    assert_eq!(outcome.output, Some(json!({"a": 1})));
}

#[tokio::test]
async fn a_stuck_log_holds_up_the_command_but_not_its_time_limit() {
    let mut bench = shell("trap '' TERM; echo $$ > $1/pid; while :; do echo flood; done");
    bench.time_limit = Duration::from_millis(700);
    let (log, _stuck) = mpsc::channel(1);
    let (_stopper, stop) = watch::channel(None);
    let began = Instant::now();
    let outcome = bench.attempt(log, stop).await;
    assert!(matches!(outcome.verdict, Verdict::TimedOut), "{:?}", outcome.error);
    assert!(began.elapsed() < SOON && !bench.is_alive("pid"));
}

#[tokio::test]
async fn a_stuck_log_does_not_cost_a_finished_command_its_result() {
    let mut runs = tokio::task::JoinSet::new();
    for _ in 0..8 {
        runs.spawn(async {
            let mut bench = shell("seq 1 1000; sleep 0.3; seq 1 1000; echo '{\"a\": 1}'");
            bench.time_limit = Duration::from_secs(2);
            let (log, _stuck) = mpsc::channel(1);
            let (_stopper, stop) = watch::channel(None);
            let began = Instant::now();
            (bench.attempt(log, stop).await, began.elapsed())
        });
    }
    while let Some(result) = runs.join_next().await {
        let (outcome, took) = result.expect("as it should");
        assert!(matches!(outcome.verdict, Verdict::Succeeded), "{:?}", outcome.error);
        assert_eq!(outcome.output, Some(json!({"a": 1})));
        assert!(took < SOON, "{took:?}");
    }
}

#[tokio::test]
async fn what_was_printed_just_before_the_end_is_all_there() {
    for _ in 0..20 {
        // The escapee keeps the pipe open, so no end of file will come.
        let seen = shell("setsid sleep 3 & seq 1 9000").run().await;
        let expected: String = (1..=9000).map(|number| format!("{number}\n")).collect();
        assert!(seen.text(Stream::Stdout) == expected);
        assert!(seen.took < Duration::from_millis(2900), "{:?}", seen.took);
    }
}
