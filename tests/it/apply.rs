//! `singletrack workflows apply`: files of definitions, applied to a service by the program itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Redirect};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::support::database::TestDb;
use crate::support::process::{Process, SHORT_LEASE, singletrack};
use crate::support::replica::Replica;
use crate::support::scratch::Scratch;

/// `workflows apply` with these arguments, against the service at `url`; what `input` says is its standard input.
async fn apply_with(url: &str, arguments: &[&str], input: &str, environment: &[(&str, &str)]) -> Output {
    let mut command = singletrack(&["workflows", "apply"]);
    command.args(arguments).env("SINGLETRACK_URL", url).envs(environment.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = tokio::process::Command::from(command).spawn().unwrap();
    // One that has refused its arguments reads nothing.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes()).await;
    child.wait_with_output().await.unwrap()
}

/// Applies `file`, given on standard input.
async fn apply(url: &str, arguments: &[&str], file: &str) -> Output {
    apply_with(url, &[&["-f", "-"], arguments].concat(), file, &[]).await
}

fn text(bytes: &[u8]) -> Vec<String> {
    String::from_utf8(bytes.to_vec()).unwrap().lines().map(str::to_owned).collect()
}

/// What a command that succeeded printed.
fn printed(output: &Output) -> Vec<String> {
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    text(&output.stdout)
}

/// What a command that ended with `code` complained of.
fn complaint(output: &Output, code: i32) -> Vec<String> {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    text(&output.stderr)
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/workflows.yaml")
}

/// The current revision of every workflow, by its id.
async fn revisions(replica: &Replica) -> BTreeMap<String, i64> {
    let page = replica.client.get("/api/v1/workflows?limit=200").await.body;
    let items = page["items"].as_array().unwrap().iter();
    items.map(|item| (item["id"].as_str().unwrap().to_owned(), item["revision"].as_i64().unwrap())).collect()
}

const TWO: &str = "\
workflows:
  w:
    executor: {type: command, argv: [make, all], env: {TOKEN: secret-1}}
    timeout_seconds: 600
    labels: {team: web, old: x}
    retry_on: [failed, stale]
  v:
    executor: {type: pull}
";

#[tokio::test(flavor = "multi_thread")]
async fn the_example_is_created_and_then_unchanged() {
    let test = TestDb::new().await;
    let replica = Process::serve(&test.url, SHORT_LEASE);
    let (url, file) = (replica.client.base.as_str(), example());
    let arguments = ["--file", file.to_str().unwrap()];
    let ids = ["e2e", "deploy", "migrate", "nightly-sync", "transcode"];
    for result in ["created", "unchanged", "unchanged"] {
        let lines = printed(&apply_with(url, &arguments, "", &[]).await);
        assert_eq!(lines, ids.map(|id| format!("{id}: {result}")), "in the order of the file");
    }
    for id in ids {
        assert_eq!(replica.client.get(&format!("/api/v1/workflows/{id}")).await.body["revision"], 1, "{id}");
    }
    for (id, policy) in [("e2e", "reject"), ("deploy", "replace"), ("migrate", "wait")] {
        assert_eq!(replica.client.get(&format!("/api/v1/workflows/{id}")).await.body["on_conflict"], policy, "{id}");
    }
    let sync = replica.client.get("/api/v1/workflows/nightly-sync").await.body;
    assert_eq!(sync["backoff"], json!({"initial_seconds": 60.0, "factor": 3.0, "max_seconds": 1800.0, "jitter": 0.2}));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_differs_is_shown_and_changed_and_a_dry_run_only_shows_it() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let url = replica.client.base.clone();
    replica.client.define("not-in-the-file", "true").await;
    assert_eq!(printed(&apply(&url, &["--dry-run"], TWO).await), ["w: created", "v: created"]);
    assert_eq!(revisions(&replica).await.len(), 1, "a dry run sends nothing");
    assert_eq!(printed(&apply(&url, &[], TWO).await), ["w: created", "v: created"]);

    let edited = TWO
        .replace("600", "900\n    backoff: {factor: 3.0, jitter: 0.2}")
        .replace("{team: web, old: x}", "{team: shop, new: y}")
        .replace("[failed, stale]", "[timed_out, stale]")
        .replace("secret-1", "secret-2");
    let changes = [
        "w: changed",
        "  backoff.factor: 2 -> 3",
        "  executor.env.TOKEN: changed",
        "  labels.new: added \"y\"",
        "  labels.old: removed \"x\"",
        "  labels.team: \"web\" -> \"shop\"",
        "  retry_on: removed \"failed\"",
        "  retry_on: added \"timed_out\"",
        "  timeout_seconds: 600 -> 900",
        "v: unchanged",
    ];
    assert_eq!(printed(&apply(&url, &["--dry-run"], &edited).await), changes);
    let before = [("not-in-the-file", 1), ("v", 1), ("w", 1)].map(|(id, revision)| (id.to_owned(), revision));
    assert_eq!(revisions(&replica).await, BTreeMap::from(before.clone()));
    assert_eq!(printed(&apply(&url, &[], &edited).await), changes);
    let after = [("not-in-the-file", 1), ("v", 1), ("w", 2)].map(|(id, revision)| (id.to_owned(), revision));
    assert_eq!(revisions(&replica).await, BTreeMap::from(after), "what the file does not name is left alone");
    assert_eq!(printed(&apply(&url, &[], &edited).await), ["w: unchanged", "v: unchanged"]);
    let env = &replica.client.get("/api/v1/workflows/w").await.body["executor"]["env"];
    assert_eq!(env, &json!({"TOKEN": "secret-2"}));

    // What is left out goes back to its default.
    let short = "workflows: {w: {executor: {type: pull}}}";
    let lines = printed(&apply(&url, &["--json"], short).await).join("\n");
    let document: Value = serde_json::from_str(&lines).unwrap();
    assert_eq!((&document["dry_run"], &document["workflows"][0]["result"]), (&json!(false), &json!("changed")));
    let changes = document["workflows"][0]["changes"].as_array().unwrap();
    let expected = json!({"pointer": "/timeout_seconds", "change": "changed", "from": 900, "to": null});
    assert!(changes.contains(&expected), "{lines}");
    assert!(!lines.contains("secret"), "{lines}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_paused_stays_paused() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    printed(&apply(&replica.client.base, &[], TWO).await);
    replica.client.post("/api/v1/workflows/w/pause", json!({"reason": "look first"})).await;
    let edited = TWO.replace("600", "900");
    assert_eq!(printed(&apply(&replica.client.base, &[], &edited).await)[0], "w: changed");
    let refused = replica.client.enqueue("w").await;
    assert_eq!((refused.status, refused.cause()), (409, "workflow-paused"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_file_is_refused_whole_before_anything_is_sent() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let wrong = TWO.replace("600", "0").replace("pull", "push");
    let scratch = Scratch::new();
    std::fs::write(scratch.path("wrong.yaml"), &wrong).unwrap();
    let name = scratch.path("wrong.yaml").to_str().unwrap().to_owned();
    for url in [replica.client.base.as_str(), "http://127.0.0.1:1"] {
        let output = apply_with(url, &["-f", &name], "", &[]).await;
        let lines = complaint(&output, 64);
        assert_eq!(lines.len(), 2, "{lines:#?}");
        assert_eq!(lines[0], format!("{name}:4: w: /timeout_seconds: 0 is out of range: 1 to 31536000 seconds"));
        assert!(lines[1].starts_with(&format!("{name}:8: v: /executor/type: `push` is not known")), "{lines:#?}");
        assert!(output.stdout.is_empty(), "{output:?}");
    }
    assert!(revisions(&replica).await.is_empty());
    let lines = complaint(&apply(&replica.client.base, &[], "workflows: [}").await, 64);
    assert!(lines.len() == 1 && lines[0].starts_with("standard input:1: "), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workflow_that_the_service_refuses_does_not_keep_the_others_out() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    // How short a heartbeat may be is known to the service alone.
    let file = "workflows:\n  a: {executor: {type: pull}}\n  b: {executor: {type: pull}, heartbeat_timeout_seconds: 1}\n  \
                c: {executor: {type: pull}}\n";
    let refused = "/heartbeat_timeout_seconds: must be at least";
    let output = apply(&replica.client.base, &[], file).await;
    let lines = complaint(&output, 1);
    assert!(lines.len() == 1 && lines[0].starts_with(&format!("singletrack: b: {refused}")), "{lines:?}");
    assert_eq!(text(&output.stdout), ["a: created", "c: created"]);
    assert_eq!(revisions(&replica).await.into_keys().collect::<Vec<_>>(), ["a", "c"]);

    let output = apply(&replica.client.base, &["--json"], file).await;
    assert_eq!(complaint(&output, 1).len(), 1);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let results = document["workflows"].as_array().unwrap().iter().map(|workflow| workflow["result"].as_str().unwrap());
    assert_eq!(results.collect::<Vec<_>>(), ["unchanged", "failed", "unchanged"]);
    assert!(document["workflows"][1]["error"].as_str().unwrap().starts_with(refused), "{document}");
}

/// A server that is no Singletrack, until it is dropped.
async fn other(router: Router) -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut server = JoinSet::new();
    server.spawn(async move { axum::serve(listener, router).await.unwrap() });
    (url, server)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_not_there_or_is_another_is_told_with_what_to_do() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (page, _page) = other(Router::new().fallback(|| async { "<html>" })).await;
    let (missing, _missing) = other(Router::new()).await;
    let (moved, _moved) = other(Router::new().fallback(|| async { Redirect::permanent("https://elsewhere/") })).await;
    let cases = [
        (format!("http://{closed}"), "singletrack: no answer from http://127.0.0.1:"),
        (page, "answered 200, and not as Singletrack does: is SINGLETRACK_URL right?"),
        (missing, "answered 404, and not as Singletrack does: is SINGLETRACK_URL right?"),
        (moved, "leads to https://elsewhere/: set SINGLETRACK_URL"),
    ];
    for (url, words) in cases {
        let output = apply(&url, &[], TWO).await;
        let lines = complaint(&output, 1);
        let whole = lines.len() == 1 && lines[0].contains(&url) && lines[0].contains("SINGLETRACK_URL");
        assert!(whole && lines[0].contains(words), "{lines:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_is_sent_and_never_shown_and_a_wrong_one_has_an_exit_code_of_its_own() {
    let guarded = Router::new().fallback(|headers: HeaderMap| async move {
        let is_good = headers.get("authorization").is_some_and(|given| given == "Bearer st1_good");
        let status = if is_good { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::UNAUTHORIZED };
        let problem = [("content-type", "application/problem+json")];
        let body = json!({"type": "any", "title": "Told", "detail": "what it is about"}).to_string();
        if is_good { (status, problem, body).into_response() } else { status.into_response() }
    });
    let (url, _server) = other(guarded).await;
    for (key, code, words) in [
        ("", 4, "set SINGLETRACK_API_KEY"),
        ("st1_wrong", 4, "set SINGLETRACK_API_KEY"),
        (" st1_good\n", 1, "singletrack: what it is about"),
        ("st1\nbroken", 64, "SINGLETRACK_API_KEY: has a character that no key has"),
    ] {
        let output = apply_with(&url, &["-f", "-"], TWO, &[("SINGLETRACK_API_KEY", key)]).await;
        let lines = complaint(&output, code);
        assert!(lines.len() == 1 && lines[0].contains(words), "{key}: {lines:?}");
        assert!(!lines[0].contains("st1") && output.stdout.is_empty(), "{key}: {output:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_of_the_environment_is_used_but_not_for_this_machine() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (url, _server) = other(Router::new().fallback(|| async { StatusCode::UNAUTHORIZED })).await;
    let nowhere = format!("http://{closed}");
    for (service, proxy) in [(url.as_str(), nowhere.as_str()), ("http://runs.example.com", &url)] {
        let output = apply_with(service, &["-f", "-"], TWO, &[("http_proxy", proxy)]).await;
        assert!(complaint(&output, 4)[0].contains(service), "{output:?}");
    }
}

/// A server with TLS that lets nobody in, and the certificate that it has signed itself.
async fn other_with_tls() -> (String, String, JoinSet<()>) {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let mut server = JoinSet::new();
    server.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n").await;
                let _ = stream.shutdown().await;
            }
        }
    });
    let pem = format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(cert.der()));
    (url, pem, server)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_checked_against_those_that_the_machine_trusts() {
    let (url, certificate, _server) = other_with_tls().await;
    let scratch = Scratch::new();
    std::fs::write(scratch.path("ca.pem"), certificate).unwrap();
    let roots = scratch.path("ca.pem");
    let trusted = apply_with(&url, &["-f", "-"], TWO, &[("SSL_CERT_FILE", roots.to_str().unwrap())]).await;
    assert!(complaint(&trusted, 4)[0].contains("set SINGLETRACK_API_KEY"), "{trusted:?}");
    let untrusted = complaint(&apply(&url, &[], TWO).await, 1);
    assert!(untrusted[0].contains("invalid peer certificate"), "{untrusted:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_command_line_says_what_is_wrong_with_it() {
    for (url, words) in [
        ("runs.example.com", "SINGLETRACK_URL: is not a URL such as http://127.0.0.1:7410"),
        ("ftp://host", "SINGLETRACK_URL: is not a URL"),
        ("http://me:secret@host", "SINGLETRACK_URL: must not hold a user or password"),
        ("http://host/api/v1/", "SINGLETRACK_URL: leave out"),
    ] {
        let lines = complaint(&apply(url, &[], TWO).await, 64);
        assert!(lines.len() == 1 && lines[0].starts_with(words) && !lines[0].contains("secret"), "{lines:?}");
    }
    let nowhere = complaint(&apply_with("", &["-f", "no-such-file.yaml"], "", &[]).await, 64);
    assert!(nowhere[0].starts_with("can't read no-such-file.yaml: "), "{nowhere:?}");
    complaint(&apply_with("", &[], "", &[]).await, 64);
    complaint(&apply("", &["--no-such-flag"], TWO).await, 64);
    let help = printed(&apply_with("", &["--help"], "", &[]).await).join(" ");
    for promise in ["nothing is deleted", "What is paused stays paused", "SINGLETRACK_API_KEY"] {
        assert!(help.contains(promise), "{help}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_flag_wins_over_the_variable_for_the_url() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    let base = format!("{}/", replica.client.base);
    let lines = printed(&apply("http://127.0.0.1:1", &["--url", &base], TWO).await);
    assert_eq!(lines, ["w: created", "v: created"]);
}
