//! The service can start commands, so nobody may use it unknowingly: web pages, other machines, whoever reads its output.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::process::geteuid;
use singletrack::config::Settings;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::process::{GUARD, Process, SHORT_LEASE, singletrack};
use crate::support::proxy::Proxy;
use crate::support::replica::{Answer, Client, Replica, short_lease};
use crate::support::{not_allowed, plant};

/// One request to each kind of route: method, path, body.
fn requests(run: &str) -> Vec<(Method, String, &'static str)> {
    let definition = r#"{"executor": {"type": "command", "argv": ["true"]}}"#;
    vec![
        (Method::POST, "/api/v1/workflows/w@page/runs".into(), "{}"),
        (Method::POST, "/api/workflow/test-run".into(), r#"{"workflow_id": "w@page"}"#),
        (Method::PUT, "/api/v1/workflows/page".into(), definition),
        (Method::DELETE, "/api/v1/workflows/unused".into(), ""),
        (Method::POST, format!("/api/v1/runs/{run}/cancel"), "{}"),
        (Method::POST, format!("/api/v1/runs/{run}/rerun"), "{}"),
        (Method::GET, format!("/api/v1/runs/{run}"), ""),
        (Method::GET, format!("/api/v1/runs/{run}/logs"), ""),
        (Method::GET, format!("/api/script-run/{run}"), ""),
        (Method::GET, "/api/v1/runs".into(), ""),
        (Method::GET, "/livez".into(), ""),
        (Method::GET, "/readyz".into(), ""),
        (Method::GET, "/openapi.json".into(), ""),
        (Method::GET, "/nowhere".into(), ""),
        (Method::DELETE, "/api/v1/runs".into(), ""),
        (Method::OPTIONS, "/api/v1/workflows/w@page/runs".into(), ""),
    ]
}

async fn send(client: &Client, request: &(Method, String, &'static str), headers: &[(&str, &str)]) -> Answer {
    let mut built =
        client.request(request.0.clone(), &request.1).header("Content-Type", "application/json").body(request.2);
    for (name, value) in headers {
        built = built.header(*name, *value);
    }
    Answer::of(built).await.unwrap()
}

/// A replica with a workflow `w`, another one, and a run.
async fn replica(settings: Settings) -> (TestDb, Replica, String) {
    let test = TestDb::new().await;
    plant::workflow(&test.sql, "w", &["true"]).await;
    plant::workflow(&test.sql, "unused", &["true"]).await;
    let replica = Replica::with(&test, Settings { workers: Some("0".into()), ..settings }).await;
    let run = replica.client.enqueue("w").await.run_id().to_string();
    (test, replica, run)
}

/// That there is one run, queued, and two workflows, as at the start.
async fn assert_untouched(test: &TestDb) {
    let counts: (i64, i64, i64) = sqlx::query_as(
        "select (select count(*) from test_runs where status = 'queued'), count(*), count(deleted_at) from workflows",
    )
    .fetch_one(&test.sql)
    .await
    .unwrap();
    assert_eq!(counts, (1, 2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_and_other_names_are_refused_on_every_route() {
    let (test, replica, run) = replica(short_lease()).await;
    let (_, port) = replica.client.base.rsplit_once(':').unwrap();
    let foreign_port = format!("http://127.0.0.1:{}", port.parse::<u16>().unwrap() ^ 1);
    let secure = format!("https://127.0.0.1:{port}");
    for request in requests(&run) {
        for origin in ["http://evil.example", "null", "", &foreign_port, &secure, "http://localhost", "file://"] {
            let refused = send(&replica.client, &request, &[("Origin", origin)]).await;
            assert_eq!((refused.status, refused.cause()), (403, "origin-not-allowed"), "{request:?} {origin:?}");
            assert!(!refused.headers.keys().any(|name| name.as_str().starts_with("access-control")), "{refused:?}");
        }
        let rebound = format!("evil.example:{port}");
        for host in ["evil.example", &rebound, "127.0.0.1.evil.example", "192.168.0.1", "0.0.0.0"] {
            let refused = send(&replica.client, &request, &[("Host", host)]).await;
            assert_eq!((refused.status, refused.cause()), (403, "host-not-allowed"), "{request:?} {host}");
        }
    }
    assert_untouched(&test).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_form_can_send_starts_nothing() {
    let (test, replica, run) = replica(short_lease()).await;
    for (method, path, body) in requests(&run).into_iter().filter(|(_, _, body)| !body.is_empty()) {
        for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""] {
            let request = replica.client.request(method.clone(), &path).header("Content-Type", kind).body(body);
            let refused = Answer::of(request).await.unwrap();
            assert!(matches!(refused.status, 400 | 415), "{path} {kind}: {refused:?}");
        }
    }
    assert_untouched(&test).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_services_own_pages_and_names_are_let_in() {
    let public = Some("https://runs.example.com/tests/".into());
    let (_test, replica, run) = replica(Settings { public_url: public, ..short_lease() }).await;
    let own = replica.client.base.clone();
    let by_name = own.replace("127.0.0.1", "localhost");
    let name = by_name.strip_prefix("http://").unwrap();
    let path = (Method::GET, format!("/api/v1/runs/{run}"), "");
    let good: [&[(&str, &str)]; 6] = [
        &[],
        &[("Origin", &own)],
        &[("Origin", &by_name), ("Host", name)],
        &[("Host", "[::1]")],
        &[("Host", "runs.example.com")],
        &[("Host", "runs.example.com"), ("Origin", "https://runs.example.com")],
    ];
    for headers in good {
        assert_eq!(send(&replica.client, &path, headers).await.status, 200, "{headers:?}");
    }
    for origin in ["http://runs.example.com", "https://runs.example.com:8443", "https://runs.example.com.evil.example"]
    {
        assert_eq!(send(&replica.client, &path, &[("Origin", origin)]).await.status, 403, "{origin}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_method_is_405_with_the_right_ones_and_a_wrong_path_is_404_with_where_to_look() {
    let (_test, replica, run) = replica(short_lease()).await;
    let cases = [
        (Method::DELETE, "/api/v1/runs".to_owned(), "GET,HEAD"),
        (Method::POST, format!("/api/v1/runs/{run}"), "GET,HEAD"),
        (Method::GET, "/api/v1/workflows/w/runs".into(), "POST"),
        (Method::GET, "/api/workflow/test-run".into(), "POST"),
        (Method::PATCH, "/api/v1/workflows/w".into(), "DELETE,GET,HEAD,PUT"),
    ];
    for (method, path, allowed) in cases {
        let answer = send(&replica.client, &(method, path.clone(), "{}"), &[]).await;
        assert_eq!((answer.status, answer.cause()), (405, "method-not-allowed"), "{path}: {answer:?}");
        let mut methods: Vec<&str> = answer.headers["allow"].to_str().unwrap().split(',').map(str::trim).collect();
        methods.sort_unstable();
        assert_eq!(methods.join(","), allowed, "{path}");
    }
    for path in ["/nowhere", "/api/v1/run", "/api/v2/runs", "/api/v1/runs/", "/api/v1/workflows/w/run"] {
        let answer = replica.client.get(path).await;
        assert_eq!((answer.status, answer.cause()), (404, "not-found"), "{path}");
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(detail.contains(path) && detail.contains("/openapi.json"), "{detail}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_has_an_id_to_find_it_in_the_log_by() {
    let (_test, replica, run) = replica(short_lease()).await;
    let mut seen = std::collections::BTreeSet::new();
    for request in requests(&run) {
        for headers in [&[][..], &[("Origin", "http://evil.example")][..]] {
            let answer = send(&replica.client, &request, headers).await;
            let id = answer.headers.get("x-request-id").unwrap_or_else(|| panic!("{request:?}: {answer:?}"));
            assert!(seen.insert(id.to_str().unwrap().to_owned()), "given twice");
        }
    }
    let named = send(&replica.client, &(Method::GET, "/livez".into(), ""), &[("X-Request-Id", "mine-1")]).await;
    assert_eq!(named.headers["x-request-id"], "mine-1", "a proxy's own is kept");
    let long = "x".repeat(129);
    for id in ["", "two words", "caf\u{e9}", &long] {
        let named = send(&replica.client, &(Method::GET, "/nowhere".into(), ""), &[("X-Request-Id", id)]).await;
        assert_eq!(named.headers["x-request-id"].len(), 36, "{id:?} is made anew");
        assert_eq!(named.cause(), "not-found");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_tells_browsers_to_show_it_in_no_frame_and_to_guess_nothing() {
    let (_test, replica, run) = replica(short_lease()).await;
    for request in requests(&run) {
        let answer = send(&replica.client, &request, &[]).await;
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
        ] {
            assert_eq!(answer.headers.get(name).unwrap(), value, "{request:?}: {answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_sends_the_head_of_a_request_slowly_is_cut_off() {
    let (_test, replica, _) = replica(short_lease()).await;
    let mut slow = TcpStream::connect(replica.client.base.strip_prefix("http://").unwrap()).await.unwrap();
    slow.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n").await.unwrap();
    let (since, mut answer) = (Instant::now(), Vec::new());
    let cut = timeout(LIMIT, async {
        // A line now and then does not begin the time anew.
        for line in 0.. {
            let sent = slow.write_all(format!("X-{line}: x\r\n").as_bytes()).await;
            let read = timeout(Duration::from_millis(500), slow.read_to_end(&mut answer)).await;
            if sent.is_err() || read.is_ok() {
                break;
            }
        }
    });
    cut.await.expect("it is cut off");
    assert!(since.elapsed() >= Duration::from_secs(5), "one that is merely far away is not: {:?}", since.elapsed());
    let text = String::from_utf8_lossy(&answer);
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 408"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_connects_and_sends_no_request_is_cut_off_whatever_else_it_sends() {
    let (_test, replica, _) = replica(short_lease()).await;
    let address = replica.client.base.strip_prefix("http://").unwrap();
    let mut open = Vec::new();
    for sent in [
        &b""[..],
        b"PRI * HT",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(sent).await.unwrap();
        open.push((stream, sent));
    }
    let since = Instant::now();
    for (mut stream, sent) in open {
        let mut answer = Vec::new();
        let cut = timeout(Duration::from_secs(15).saturating_sub(since.elapsed()), stream.read_to_end(&mut answer));
        // Closed, or reset: it is gone either way.
        let _ = cut.await.unwrap_or_else(|_| panic!("{:?} is kept", String::from_utf8_lossy(sent)));
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_sites_can_not_even_ask_without_saying_so_but_may_lead_to_the_dashboard() {
    let (_test, replica, run) = replica(short_lease()).await;
    let asked = async |path: &str, site: &str, mode: &str| {
        let headers = [("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode)];
        send(&replica.client, &(Method::GET, path.to_owned(), ""), &headers).await
    };
    for path in [
        format!("/api/v1/runs/{run}"),
        "/api/v1/events".into(),
        "/livez".into(),
        "/metrics".into(),
        "/openapi.json".into(),
    ] {
        for (site, mode) in [("cross-site", "no-cors"), ("same-site", "no-cors"), ("cross-site", "navigate")] {
            let refused = asked(&path, site, mode).await;
            assert_eq!((refused.status, refused.cause()), (403, "origin-not-allowed"), "{path} {site} {mode}");
        }
    }
    for (site, mode) in [("same-origin", "cors"), ("none", "navigate")] {
        assert_eq!(asked(&format!("/api/v1/runs/{run}"), site, mode).await.status, 200, "{site}");
    }
    for path in ["/", "/docs", "/livez"] {
        let answer = asked(path, if path == "/livez" { "none" } else { "cross-site" }, "navigate").await;
        assert_eq!(
            (answer.status, &answer.headers["cross-origin-resource-policy"]),
            (200, &"same-origin".parse().unwrap())
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dashboards_routes_answer_as_all_the_others_do() {
    let (_test, replica, _) = replica(short_lease()).await;
    for path in ["/", "/docs", "/ui/main.js"] {
        let wrong = send(&replica.client, &(Method::POST, path.into(), "{}"), &[]).await;
        assert_eq!((wrong.status, wrong.cause()), (405, "method-not-allowed"), "{path}: {wrong:?}");
        assert_eq!(wrong.headers["allow"], "GET,HEAD");
        let shown = send(&replica.client, &(Method::GET, path.into(), ""), &[]).await;
        assert!(shown.status == 200 && shown.headers.contains_key("x-request-id"), "{path}: {:?}", shown.headers);
    }
}

#[test]
fn it_listens_on_loopback_unless_told_otherwise() {
    assert!(Settings::default().resolve(None).unwrap().listen.ip().is_loopback());
    for (address, is_local) in [
        ("0.0.0.0:7410", false),
        ("[::]:7410", false),
        ("[::ffff:10.0.0.1]:80", false),
        ("127.1.2.3:80", true),
        ("[::1]:7410", true),
        ("localhost:7410", true),
    ] {
        let settings = Settings { listen: Some(address.into()), ..Settings::default() };
        assert_eq!(settings.resolve(None).unwrap().listen.ip().is_loopback(), is_local, "{address}");
    }
}

#[test]
fn a_password_is_printed_nowhere() {
    // Nobody listens on port 1 of loopback.
    let urls = [
        (
            "postgres://me:s3cret@127.0.0.1:1/db?password=s3cret&sslmode=disable",
            "postgres://me:***@127.0.0.1:1/db?password=***&sslmode=disable",
        ),
        ("postgres://me@127.0.0.1:1/db", "postgres://me@127.0.0.1:1/db"),
        ("postgresql://127.0.0.1:1", "postgresql://127.0.0.1:1"),
    ];
    for (url, shown) in urls {
        let output = singletrack(&["serve", "--print-config"]).env("DATABASE_URL", url).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&format!("DATABASE_URL={shown}\n")) && !text.contains("s3cret"), "{text}");
    }
    let failing =
        [urls[0].0, "postgres://me:s3cret@host:port/db", "mysql://me:s3cret@host/db", "postgres://me:s3c#ret@[/db"];
    for url in failing {
        let serve =
            singletrack(&["serve"]).env("DATABASE_URL", url).env("SINGLETRACK_LISTEN", "127.0.0.1:0").output().unwrap();
        assert!(!serve.status.success());
        let said = format!("{}{}", String::from_utf8_lossy(&serve.stdout), String::from_utf8_lossy(&serve.stderr));
        assert!(!said.contains("s3c") && !said.is_empty(), "{said}");
    }
    let config = Settings::default().resolve(Some(urls[0].0.to_owned())).unwrap();
    assert!(!format!("{config:?}").contains("s3cret"), "{config:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_can_not_read_the_services_secrets_under_the_same_account() {
    if !geteuid().is_root() {
        return not_allowed("only root can start a replica under an account of no rights");
    }
    let (test, account) = (TestDb::new().await, 65534);
    // The database's own socket is closed to it.
    let proxy = Proxy::to(&test, "nothing is to be lost");
    let socket = proxy.test.options().get_socket().unwrap().clone();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(socket.join(".s.PGSQL.5432"), fs::Permissions::from_mode(0o777)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // The folder of the build may be closed to that account.
    let program = folder.path().join("singletrack");
    fs::copy(GUARD, &program).unwrap();
    for guard in ["auto", "subreaper"] {
        let mut command = Command::new(&program);
        command.arg("serve").env_clear().uid(account).gid(account).current_dir("/");
        command.envs(SHORT_LEASE.iter().copied()).env("PATH", std::env::var_os("PATH").unwrap());
        command.env("DATABASE_URL", &proxy.test.url).env("SINGLETRACK_LISTEN", "127.0.0.1:0");
        command.env("SINGLETRACK_GUARD", guard).env("AWS_SECRET_ACCESS_KEY", "s3cret");
        let replica = Process::start(command);
        // What other processes of the account can be looked into, itself among them.
        let script =
            "echo its-own: $(id -u); for it in /proc/[0-9]*; do tr '\\0' '\\n' < $it/environ; done 2>/dev/null; true";
        replica.client.define("w", script).await;
        let id = replica.client.enqueue("w").await.run_id();
        assert_eq!(replica.client.finished(id).await["status"], "succeeded");
        let seen = replica.client.log(id).await;
        assert!(seen.contains("its-own: 65534\n") && seen.contains("SINGLETRACK_FENCE="), "{seen}");
        assert!(!seen.contains("s3cret") && !seen.contains("DATABASE_URL"), "{guard}: {seen}");
    }
}
