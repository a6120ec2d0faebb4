//! What is sent, where redirects lead, who is trusted.

use std::process::Command;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::domain::executor::Method;

/// Head, lower case, and body.
fn parts(request: &str) -> (Vec<String>, Value) {
    let (head, body) = request.split_once("\r\n\r\n").expect("a whole request");
    (head.lines().map(str::to_lowercase).collect(), serde_json::from_str(body).expect("JSON"))
}

#[tokio::test]
async fn the_request_carries_the_run_the_callback_and_the_headers() {
    let server = Server::answering(answer("204 No Content", &[], "")).await;
    let mut bench = to(server.url());
    bench.http.headers = BTreeMap::from([("X-Team".into(), "rød".into()), ("authorization".into(), "Bearer b".into())]);
    assert_eq!(bench.run().await.verdict(), Verdict::Succeeded);
    let requests = server.requests();
    assert_eq!(requests.len(), 1);
    let (head, body) = parts(&requests[0]);
    assert_eq!(head[0], "post /hook http/1.1");
    let id = "019a0000-0000-7000-8000-000000000001";
    for header in [
        "content-type: application/json",
        &format!("idempotency-key: {id}:2"),
        &format!("singletrack-run-id: {id}"),
        "singletrack-workflow-id: deploy@prod",
        "singletrack-attempt: 2",
        "singletrack-fence: 77",
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        concat!("user-agent: singletrack/", env!("CARGO_PKG_VERSION")),
        "x-team: rød",
        "authorization: bearer b",
        &format!("host: 127.0.0.1:{}", server.port),
    ] {
        assert_eq!(head.iter().filter(|line| *line == header).count(), 1, "{header}: {head:#?}");
    }
    assert_eq!(body["run"], serde_json::to_value(&bench.run).expect("JSON"));
    assert_eq!(body["run"]["input"], json!({"n": 1}));
    let callback = json!({
        "url": "https://runs.example.com/api/v1/leases/finish", "token": "secret", "timeout_seconds": 600,
    });
    assert_eq!(body["callback"], callback);
}

#[tokio::test]
async fn method_callback_timeout_and_missing_trace_are_as_the_workflow_and_the_run_say() {
    let server = Server::answering(answer("200 OK", &[], "")).await;
    let mut bench = to(server.url());
    bench.http.method = Some(Method::Patch);
    bench.http.callback_timeout_seconds = Some(7200);
    bench.run.traceparent = None;
    assert_eq!(bench.run().await.verdict(), Verdict::Succeeded);
    let (head, body) = parts(&server.requests()[0]);
    assert!(head[0].starts_with("patch "), "{head:?}");
    assert!(!head.iter().any(|line| line.starts_with("traceparent")), "{head:?}");
    assert_eq!(body["callback"]["timeout_seconds"], 7200);
}

#[tokio::test]
async fn a_request_that_gets_no_answer_is_sent_once() {
    let server = Server::new(|stream| async move { drop(stream) }).await;
    let seen = to(server.url()).run().await;
    assert_eq!(seen.verdict(), Verdict::Failed);
    assert!(seen.error().starts_with("executor.url: no answer from 127.0.0.1: "), "{}", seen.error());
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn each_request_has_a_connection_of_its_own() {
    let server = Server::new(|mut stream| async move {
        stream.write_all(answer("200 OK", &[], "").as_bytes()).await.expect("the client reads");
        // A second request over this connection would get an answer as well.
        read_request(&mut stream).await;
        let _ = stream.write_all(answer("200 OK", &[], "").as_bytes()).await;
    })
    .await;
    let bench = to(server.url());
    let client = bench.client();
    for _ in 0..2 {
        let (log, _chunks) = mpsc::channel(64);
        let (_stopper, stop) = watch::channel(None);
        let answer = bench.attempt_with(&client, log, stop).await;
        assert_eq!(answer, Answer::Ended(Outcome::of(Verdict::Succeeded)));
    }
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn a_worker_that_may_have_lost_the_run_sends_nothing() {
    let server = Server::answering(answer("200 OK", &[], "")).await;
    let mut bench = to(server.url());
    bench.may_start = false;
    let seen = bench.run().await;
    assert_eq!((seen.verdict(), seen.outcome().reason.as_deref()), (Verdict::Stale, Some("worker_lost")));
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn a_redirect_is_not_followed_and_said_where_it_leads() {
    let target = Server::answering(answer("200 OK", &[], "")).await;
    for status in
        ["301 Moved Permanently", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"]
    {
        let location = format!("location: {}", target.url());
        let server = Server::answering(answer(status, &[&location, "retry-after: 3"], "")).await;
        let mut bench = to(server.url());
        // Those that make a GET of the request are never followed.
        bench.outgoing.redirects = if status < "307" { 5 } else { 0 };
        let seen = bench.run().await;
        assert_eq!(seen.verdict(), Verdict::Failed);
        let error = seen.error();
        assert!(error.starts_with(&format!("answered {status} to {}, ", target.url())), "{error}");
        assert!(error.contains("executor.url") && error.contains("SINGLETRACK_HTTP_REDIRECTS"), "{error}");
        assert_eq!(seen.outcome().retry_after, Some(Duration::from_secs(3)));
    }
    assert!(target.requests().is_empty());
}

#[tokio::test]
async fn a_redirect_that_may_be_followed_is_without_the_workflows_headers_on_another_host() {
    let target = Server::answering(answer("200 OK", &[], "{\"at\": \"target\"}")).await;
    let location = format!("location: {}", target.url());
    let server = Server::answering(answer("307 Temporary Redirect", &[&location], "")).await;
    let mut bench = to(server.url());
    bench.outgoing.redirects = 1;
    bench.http.headers = BTreeMap::from([("X-Api-Key".into(), "secret".into())]);
    let seen = bench.run().await;
    assert_eq!(seen.output(), Some(&json!({"at": "target"})));
    let ((first, body), (second, again)) = (parts(&server.requests()[0]), parts(&target.requests()[0]));
    assert!(first.contains(&"x-api-key: secret".to_owned()), "{first:?}");
    assert!(!second.iter().any(|line| line.starts_with("x-api-key")), "{second:?}");
    assert!(second[0].starts_with("post ") && second.contains(&"singletrack-fence: 77".to_owned()), "{second:?}");
    assert_eq!(body, again);
}

#[tokio::test]
async fn redirects_are_followed_as_often_as_allowed() {
    let server = Server::answering(answer("308 Permanent Redirect", &["location: /again"], "")).await;
    let mut bench = to(server.url());
    bench.outgoing.redirects = 3;
    assert!(bench.run().await.error().starts_with("answered 308 "));
    assert_eq!(server.requests().len(), 4);
}

#[tokio::test]
async fn a_redirect_to_what_is_not_allowed_is_refused() {
    let target = Server::answering(answer("200 OK", &[], "")).await;
    for to_where in
        [target.url(), "http://169.254.169.254/latest".into(), format!("http://2130706433:{}/", target.port)]
    {
        let location = format!("location: {to_where}");
        let server = Server::answering(answer("307 Temporary Redirect", &[&location], "")).await;
        // The first is reached by its name alone.
        let mut bench = to(format!("http://localhost:{}/", server.port)).allowing("localhost");
        bench.outgoing.redirects = 5;
        let seen = bench.run().await;
        assert!(seen.error().contains("not a public address"), "{}", seen.error());
        assert_eq!(server.requests().len(), 1);
    }
    assert!(target.requests().is_empty());
}

#[tokio::test]
async fn a_configured_proxy_gets_the_request_and_literal_addresses_are_checked_all_the_same() {
    let proxy = Server::answering(answer("200 OK", &[], "{\"via\": \"proxy\"}")).await;
    let mut bench = to("http://nobody-knows-me.invalid/hook").allowing("");
    bench.outgoing.proxy = Some(format!("http://me:word@127.0.0.1:{}", proxy.port).parse().expect("a URL"));
    assert_eq!(bench.run().await.output(), Some(&json!({"via": "proxy"})));
    let (head, _) = parts(&proxy.requests()[0]);
    assert_eq!(head[0], "post http://nobody-knows-me.invalid/hook http/1.1");
    assert!(head.contains(&"proxy-authorization: basic bwu6d29yza==".to_owned()), "{head:?}");

    bench.http.url = "http://169.254.169.254/latest/meta-data".into();
    assert!(bench.run().await.error().contains("not a public address"));
    assert_eq!(proxy.requests().len(), 1);
}

#[tokio::test]
async fn a_proxy_named_in_the_environment_is_not_used() {
    const NAMES: [&str; 6] = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    let server = Server::answering(answer("200 OK", &[], "")).await;
    if std::env::var_os(NAMES[0]).is_none() {
        // The environment of this process is every test's: again in a process of its own, with proxies that nobody is.
        let name = "executor::http::tests::requests::a_proxy_named_in_the_environment_is_not_used";
        let mut child = Command::new(std::env::current_exe().expect("this program"));
        child.args(["--exact", name]).envs(NAMES.map(|name| (name, "http://127.0.0.1:9")));
        let output = child.env_remove("NO_PROXY").env_remove("no_proxy").output().expect("a process");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let seen = to(server.url()).run().await;
    assert_eq!(seen.verdict(), Verdict::Succeeded, "{}", seen.error());
}

/// A TLS server with a certificate for `name` that it has signed itself; its port and the certificate.
async fn tls_server(name: &str) -> (u16, CertificateDer<'static>) {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed([name.to_owned()]).expect("a certificate");
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .expect("a key");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                read_request(&mut stream).await;
                let _ = stream
                    .write_all(answer("307 Temporary Redirect", &["location: http://127.0.0.1/"], "").as_bytes())
                    .await;
                let _ = stream.shutdown().await;
            }
        }
    });
    (port, cert.der().clone())
}

#[tokio::test]
async fn a_certificate_must_be_signed_by_somebody_trusted_and_for_the_name() {
    for (name, is_trusted, expected) in [
        ("localhost", true, "answered 307"),
        ("localhost", false, "UnknownIssuer"),
        ("somebody.example", true, "not valid for name"),
    ] {
        let (port, certificate) = tls_server(name).await;
        let mut bench = to(format!("https://localhost:{port}/")).allowing("localhost");
        if is_trusted {
            let mut roots = RootCertStore::empty();
            roots.add(certificate).expect("a root");
            bench.roots = Some(roots);
        }
        let seen = bench.run().await;
        assert!(seen.error().contains(expected), "{}", seen.error());
        bench.outgoing.redirects = 1;
        if is_trusted && name == "localhost" {
            let seen = bench.run().await;
            assert_eq!(seen.error(), "localhost redirects from https to http, which is not followed");
        }
    }
}
