//! What an answer becomes.

use super::*;

#[tokio::test]
async fn an_object_becomes_the_output_and_its_text_the_log() {
    let body = "{\"built\": 3, \"name\": \"a\\u0000b\"}\n";
    let server = Server::answering(answer("201 Created", &[], body)).await;
    let seen = to(server.url()).run().await;
    assert_eq!(
        seen.answer,
        Answer::Ended(Outcome {
            output: Some(json!({"built": 3, "name": "a\u{fffd}b"})),
            ..Outcome::of(Verdict::Succeeded)
        })
    );
    assert_eq!(seen.text(Stream::Stdout), body);
    assert_eq!(seen.text(Stream::System), "answered 201 Created\n");
}

#[tokio::test]
async fn what_is_no_object_or_too_long_is_no_output_and_that_is_said() {
    let object = |bytes: usize| format!("{{\"a\": \"{}\"}}", "x".repeat(bytes - 9));
    for (body, remark) in [
        ("", ""),
        (" \r\n", ""),
        ("done", "the answer is no JSON object and is not kept as output\n"),
        ("[1]", "the answer is no JSON object and is not kept as output\n"),
        (&object(101), "the answer has more than 100 bytes and is not kept as output\n"),
        (&object(100), ""),
    ] {
        let server = Server::answering(answer("200 OK", &[], body)).await;
        let mut bench = to(server.url());
        bench.output_bytes = 100;
        let seen = bench.run().await;
        assert_eq!(seen.verdict(), Verdict::Succeeded);
        assert_eq!(seen.output().is_some(), body.len() == 100, "{body}");
        assert_eq!(seen.text(Stream::System), format!("answered 200 OK\n{remark}"));
    }
}

#[tokio::test]
async fn the_log_is_valid_text_and_cut_where_it_is_full() {
    let body = "é\0".repeat(50_000);
    let server = Server::answering(answer("200 OK", &[], &body)).await;
    let mut bench = to(server.url());
    bench.log_bytes = 50_004;
    let seen = bench.run().await;
    assert!(seen.text(Stream::Stdout) == "é\u{fffd}".repeat(10_000) + "é");
    let system = seen.text(Stream::System);
    assert!(system.contains("log truncated after 50004 bytes\n"), "{system}");
    assert_eq!(seen.verdict(), Verdict::Succeeded);
}

#[tokio::test]
async fn a_slow_answer_is_shown_as_it_comes() {
    let (next, go) = watch::channel(0);
    let server = Server::new(move |mut stream| {
        let mut go = go.clone();
        async move {
            stream.write_all(ENDLESS).await.expect("the client reads");
            for (turn, drop) in ["{\"a\"", ": 1", "}"].iter().enumerate() {
                go.wait_for(|turns| *turns >= turn).await.expect("a turn");
                stream.write_all(drop.as_bytes()).await.expect("the client reads");
            }
        }
    })
    .await;
    // The server goes on only when its last words were seen.
    let bench = to(server.url());
    let turn =
        |chunk: &LogChunk, _: &_| next.send_modify(|turns| *turns += usize::from(chunk.stream == Stream::Stdout));
    let seen = bench.run_and(turn).await;
    assert_eq!(seen.output(), Some(&json!({"a": 1})));
    let pieces = seen.chunks.iter().filter(|chunk| chunk.stream == Stream::Stdout).count();
    assert_eq!(pieces, 3, "{:?}", seen.chunks);
}

#[tokio::test]
async fn any_other_status_fails_and_is_told_with_the_first_words() {
    for status in ["400 Bad Request", "404 Not Found", "500 Internal Server Error", "599 <unknown status code>"] {
        let body = format!("no\r\n\tsuch\0 thing {}", "x".repeat(2000));
        let server = Server::answering(answer(status, &[], &body)).await;
        let seen = to(server.url()).run().await;
        assert_eq!(seen.verdict(), Verdict::Failed);
        let error = seen.error();
        assert!(error.starts_with(&format!("answered {status}: no such thing xxx")) && error.len() < 400, "{error}");
        assert_eq!(seen.outcome().retry_after, None);
        assert!(seen.text(Stream::Stdout).ends_with("xxx"), "all of it is in the log");
    }
}

#[tokio::test]
async fn retry_after_is_heeded_in_both_forms_up_to_a_day() {
    let date = "date: Sun, 06 Nov 1994 08:49:37 GMT";
    let seconds = Duration::from_secs;
    for (headers, expected) in [
        (&["retry-after: 120"][..], Some(seconds(120))),
        (&["retry-after: 0"], Some(seconds(0))),
        (&["retry-after: 86401"], Some(seconds(86400))),
        (&["retry-after: 99999999999999999999999999"], Some(seconds(86400))),
        (&[date, "retry-after: Sun, 06 Nov 1994 08:50:37 GMT"], Some(seconds(60))),
        (&[date, "retry-after: Sun, 06 Nov 1994 08:49:07 GMT"], Some(seconds(0))),
        (&[date, "retry-after: Mon, 06 Nov 1995 08:49:37 GMT"], Some(seconds(86400))),
        (&["retry-after: Sun, 06 Nov 1994 08:49:37 GMT"], Some(seconds(0))),
        (&["retry-after: Tue, 31 Dec 2199 23:59:59 GMT"], Some(seconds(86400))),
        (&["retry-after: -5"], None),
        (&["retry-after: soon"], None),
        (&["retry-after: "], None),
        (&[], None),
    ] {
        for status in ["503 Service Unavailable", "429 Too Many Requests"] {
            let server = Server::answering(answer(status, headers, "")).await;
            let seen = to(server.url()).run().await;
            assert_eq!(seen.outcome().retry_after, expected, "{headers:?}");
            assert_eq!(seen.error(), format!("answered {status}"));
        }
    }
}

#[tokio::test]
async fn accepted_hands_the_run_over_whatever_comes_after() {
    for text in [
        "HTTP/1.1 202 Accepted\r\ncontent-length: 5\r\n\r\ntaken",
        "HTTP/1.1 202 Accepted\r\ncontent-length: 50\r\n\r\ntaken",
    ] {
        let server = Server::answering(text).await;
        // A wish to stop that comes with the answer comes too late: the server has taken the run.
        let seen = to(server.url()).run_and(|_, stopper| _ = stopper.send_replace(Some(StopCause::Cancel))).await;
        assert_eq!(seen.answer, Answer::HandedOver);
        let [LogChunk { stream: Stream::System, text }] = &seen.chunks[..] else { panic!("{:?}", seen.chunks) };
        assert_eq!(text, "answered 202 Accepted: taken\n");
    }
    let server = Server::new(|mut stream| async move {
        stream.write_all(b"HTTP/1.1 202 Accepted\r\ncontent-length: 50\r\n\r\ntaken").await.expect("the client reads");
        std::future::pending().await
    });
    let seen = to(server.await.url()).run().await;
    assert_eq!(seen.answer, Answer::HandedOver);
    assert!(seen.took < SOON, "{:?}", seen.took);
}

#[tokio::test]
async fn an_answer_that_breaks_off_or_is_none_fails() {
    for (text, told) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{\"a\": 1}", "the answer (200 OK) broke off: "),
        ("SSH-2.0-OpenSSH_9.9\r\n", "executor.url: no answer from 127.0.0.1: "),
        ("", "executor.url: no answer from 127.0.0.1: "),
    ] {
        let server = Server::answering(text).await;
        let seen = to(server.url()).run().await;
        assert_eq!(seen.verdict(), Verdict::Failed);
        assert!(seen.error().starts_with(told) && seen.error().len() > told.len(), "{}", seen.error());
        assert_eq!(seen.output(), None);
    }
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
    let seen = to(format!("http://{closed}/")).run().await;
    assert!(seen.error().contains("no answer from 127.0.0.1: Connection refused"), "{}", seen.error());
    let seen = to("http://nobody-knows-me.invalid/").run().await;
    assert!(seen.error().starts_with("executor.url: no answer from nobody-knows-me.invalid: "), "{}", seen.error());
}
