//! The settings as somebody meets them: `.env.example`, flags, variables, and what is said of wrong ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Output;

use clap::{Args as _, CommandFactory as _};
use singletrack::cli::Cli;
use singletrack::config::Settings;

use crate::support::database::TestDb;
use crate::support::process::singletrack;
use crate::support::replica::{Replica, short_lease};

/// What depends on the machine, so that no default can be written down.
const OF_THE_MACHINE: &str = "SINGLETRACK_WORKERS";

/// Every variable that the service reads, in the order of the help.
fn variables() -> Vec<String> {
    let command = Settings::augment_args(clap::Command::new("any"));
    ["DATABASE_URL".to_owned()].into_iter().chain(of(&command)).collect()
}

/// The variables that the flags of a command mirror.
fn of(command: &clap::Command) -> Vec<String> {
    command.get_arguments().filter_map(|flag| Some(flag.get_env()?.to_str().unwrap().to_owned())).collect()
}

/// Every variable that the commands read which ask a service, with its default.
fn of_clients() -> Vec<(String, &'static str)> {
    let cli = Cli::command();
    let apply = cli.find_subcommand("workflows").unwrap().find_subcommand("apply").unwrap();
    assert_eq!(of(apply), ["SINGLETRACK_URL"]);
    let help = apply.get_arguments().find(|flag| flag.get_id() == "url").unwrap().get_help().unwrap().to_string();
    assert!(help.ends_with("[default: http://127.0.0.1:7410]"), "{help}");
    vec![("SINGLETRACK_URL".into(), "http://127.0.0.1:7410"), ("SINGLETRACK_API_KEY".into(), "")]
}

/// `NAME=value` lines.
fn pairs(text: &str) -> BTreeMap<&str, &str> {
    text.lines().map(|line| line.split_once('=').unwrap()).collect()
}

#[test]
fn the_example_shows_every_variable_once_with_its_meaning_and_default() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".env.example");
    let text = fs::read_to_string(path).unwrap();
    let defaults = Settings::default().resolve(None).unwrap().to_string();
    let of_service = pairs(&defaults);
    let of_clients = of_clients();
    let mut defaults = of_service.clone();
    defaults.extend(of_clients.iter().map(|(name, default)| (name.as_str(), *default)));
    let mut shown = Vec::new();
    let mut meaning = 0;
    for line in text.lines() {
        let Some(remark) = line.strip_prefix('#') else {
            assert!(line.is_empty(), "all is commented out, so that a copy changes nothing: {line}");
            meaning = 0;
            continue;
        };
        let assignment = remark.trim_start().split_once('=');
        let is_name = |name: &str| name.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        match assignment {
            Some((name, value)) if is_name(name) => {
                assert!(meaning > 0, "{name} has no comment before it");
                assert!(line.starts_with(&format!("# {name}=")), "{line:?} is to be used by removing `# `");
                if name != OF_THE_MACHINE {
                    assert_eq!(defaults.get(name), Some(&value), "the default of {name}");
                }
                shown.push(name);
                meaning = 0;
            }
            _ => meaning += 1,
        }
    }
    let read: Vec<String> = variables().into_iter().chain(of_clients.iter().map(|(name, _)| name.clone())).collect();
    assert_eq!(shown, read, "in the order of --help");
    assert_eq!(of_service.len() + of_clients.len(), shown.len(), "and --print-config prints those of the service");
}

#[test]
fn the_defaults_in_the_help_are_the_defaults() {
    let command = Settings::augment_args(clap::Command::new("any"));
    let defaults = Settings::default().resolve(None).unwrap().to_string();
    for flag in command.get_arguments().filter(|flag| flag.get_env().is_some()) {
        let name = flag.get_env().unwrap().to_str().unwrap();
        let help = flag.get_help().unwrap().to_string();
        let (_, told) = help.split_once("[default: ").unwrap_or_else(|| panic!("{name}: {help}"));
        let told = told.trim_end_matches(']');
        if told.contains(' ') || ["all"].contains(&told) {
            continue; // in words
        }
        let output = singletrack(&["dev", "--print-config"]).env(name, told).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim_end(), defaults, "{name}={told}");
    }
}

#[test]
fn the_password_of_a_proxy_is_shown_by_nothing() {
    let settings = [
        ("SINGLETRACK_HTTP_ALLOW", "10.0.0.0/8, fd00::/8,127.0.0.1, Jobs.internal,*.internal"),
        ("SINGLETRACK_HTTP_PROXY", "http://me:p%40ss@proxy.internal:3128"),
        ("SINGLETRACK_HTTP_REDIRECTS", "3"),
    ];
    let text = printed(&["serve"], &settings);
    let shown = pairs(&text);
    assert_eq!(shown["SINGLETRACK_HTTP_ALLOW"], "10.0.0.0/8,fd00::/8,127.0.0.1/32,jobs.internal,*.internal");
    assert_eq!(shown["SINGLETRACK_HTTP_PROXY"], "http://me:***@proxy.internal:3128/");
    assert_eq!(shown["SINGLETRACK_HTTP_REDIRECTS"], "3");
    let wrong =
        singletrack(&["serve"]).env("SINGLETRACK_HTTP_PROXY", "socks5://me:p%40ss@proxy:1080").output().unwrap();
    let lines = complaint(&wrong);
    assert!(lines[0].starts_with("SINGLETRACK_HTTP_PROXY: must be a URL such as http://"), "{lines:?}");
    assert!(!lines[0].contains("p%40ss"), "{lines:?}");
}

/// What a failed start said, line by line.
fn complaint(output: &Output) -> Vec<String> {
    assert_eq!(output.status.code(), Some(64), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn all_wrong_values_are_told_at_once_a_line_each() {
    let wrong = [
        ("DATABASE_URL", "mysql://host/db"),
        ("SINGLETRACK_MIGRATE", "maybe"),
        ("SINGLETRACK_LISTEN", "7410"),
        ("SINGLETRACK_PUBLIC_URL", "runs.example.com"),
        ("SINGLETRACK_POOL_SIZE", "0"),
        ("SINGLETRACK_WORKERS", "-1"),
        ("SINGLETRACK_QUEUES", "fast lane"),
        ("SINGLETRACK_HEARTBEAT_INTERVAL", "soon"),
        ("SINGLETRACK_HEARTBEAT_TIMEOUT", "45500ms"),
        ("SINGLETRACK_KILL_GRACE", "0s"),
        ("SINGLETRACK_GUARD", "watchdog"),
        ("SINGLETRACK_RUN_TIMEOUT", "2years"),
        ("SINGLETRACK_START_WITHIN", "60"),
        ("SINGLETRACK_REAP_INTERVAL", "-2s"),
        ("SINGLETRACK_DRAIN_TIMEOUT", "30 seconds or so"),
        ("SINGLETRACK_LOG_BYTES", "10MB"),
        ("SINGLETRACK_OUTPUT_BYTES", "1e6"),
        ("SINGLETRACK_HTTP_ALLOW", "10.1.2.3/8"),
        ("SINGLETRACK_HTTP_PROXY", "proxy.internal:3128"),
        ("SINGLETRACK_HTTP_REDIRECTS", "11"),
        ("SINGLETRACK_LOG_FORMAT", "xml"),
        ("RUST_LOG", "singletrack=loud"),
    ];
    let data_dir = tempfile::tempdir().unwrap().path().join("never-made");
    let output = singletrack(&["serve"]).envs(wrong).env("SINGLETRACK_DATA_DIR", &data_dir).output().unwrap();
    let lines = complaint(&output);
    for (name, value) in wrong {
        let about: Vec<_> = lines.iter().filter(|line| line.starts_with(&format!("{name}: "))).collect();
        assert_eq!(about.len(), 1, "{name}: {lines:#?}");
        let quotes = about[0].contains(value) || about[0].contains("must be ") || name == "DATABASE_URL";
        assert!(quotes, "it says what was wrong: {about:?}");
    }
    assert_eq!(lines.len(), wrong.len(), "{lines:#?}");
    assert!(!data_dir.exists());
}

#[test]
fn a_heartbeat_timeout_that_is_too_short_is_explained() {
    let output = singletrack(&["serve"]).env("SINGLETRACK_HEARTBEAT_TIMEOUT", "30s").output().unwrap();
    assert_eq!(
        complaint(&output),
        [
            "SINGLETRACK_HEARTBEAT_TIMEOUT: 30s is too short: at least 4 heartbeat intervals, the kill grace and 2s, which is 45s"
        ]
    );
    let just = singletrack(&["dev", "--print-config"]).env("SINGLETRACK_HEARTBEAT_TIMEOUT", "45s").output().unwrap();
    assert!(just.status.success());
}

#[test]
fn a_missing_database_is_told_in_one_line() {
    for command in ["serve", "worker", "migrate"] {
        for value in [None, Some("")] {
            let mut start = singletrack(&[command]);
            start.envs(value.map(|value| ("DATABASE_URL", value)));
            let lines = complaint(&start.output().unwrap());
            assert_eq!(lines.len(), 1, "{lines:?}");
            assert!(lines[0].starts_with("DATABASE_URL is not set") && lines[0].contains("postgres://"), "{lines:?}");
        }
    }
}

#[test]
fn a_wrong_command_line_has_the_same_exit_code() {
    for arguments in [&["serve", "--no-such-flag"][..], &["no-such-command"], &["serve", "--listen"], &[]] {
        assert_eq!(singletrack(arguments).output().unwrap().status.code(), Some(64), "{arguments:?}");
    }
    for arguments in [&["--help"][..], &["serve", "--help"], &["--version"]] {
        let output = singletrack(arguments).output().unwrap();
        assert!(output.status.success() && !output.stdout.is_empty(), "{arguments:?}");
    }
}

/// The settings in force.
fn printed(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let output = singletrack(arguments).arg("--print-config").envs(environment.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_flag_wins_over_its_variable_and_an_empty_variable_is_none() {
    let defaults = printed(&["serve"], &[]);
    let names = variables();
    let empty: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    assert_eq!(printed(&["serve"], &empty), defaults);
    let value = |text: &str, name: &str| pairs(text)[name].to_owned();
    let environment = [("SINGLETRACK_POOL_SIZE", "4"), ("DATABASE_URL", "postgres://h/variable")];
    let text = printed(&["serve"], &environment);
    assert_eq!(
        (value(&text, "SINGLETRACK_POOL_SIZE"), value(&text, "DATABASE_URL")),
        ("4".into(), "postgres://h/variable".into())
    );
    let text = printed(&["serve", "--pool-size", "3", "--database-url", "postgres://h/flag"], &environment);
    assert_eq!(
        (value(&text, "SINGLETRACK_POOL_SIZE"), value(&text, "DATABASE_URL")),
        ("3".into(), "postgres://h/flag".into())
    );
    let text = printed(&["dev"], &environment);
    assert_eq!(value(&text, "DATABASE_URL"), "", "dev has a Postgres of its own");
    let text = printed(&["dev", "--database-url", "postgres://h/flag"], &environment);
    assert_eq!(value(&text, "DATABASE_URL"), "postgres://h/flag");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_tells_the_settings_in_force_without_their_secrets_and_what_database_it_has() {
    let test = TestDb::new().await;
    let proxy = Some("http://user:secret@proxy.internal:3128".to_owned());
    let replica =
        Replica::with(&test, Settings { http_proxy: proxy, pool_size: Some("7".into()), ..short_lease() }).await;
    let system = replica.client.get("/api/v1/system").await;
    assert_eq!(system.status, 200, "{system:?}");
    let settings = system.body["settings"].as_object().unwrap();
    assert_eq!(settings.keys().cloned().collect::<Vec<_>>(), {
        let mut names = variables();
        names.sort();
        names
    });
    assert_eq!(settings["SINGLETRACK_HTTP_PROXY"], "http://user:***@proxy.internal:3128/");
    assert!(!system.body.to_string().contains("secret"), "{system:?}");
    assert_eq!(system.body["version"], env!("CARGO_PKG_VERSION"));
    let (version, name): (String, String) =
        sqlx::query_as("select current_setting('server_version'), current_database()::text")
            .fetch_one(&test.sql)
            .await
            .unwrap();
    let database = &system.body["database"];
    assert_eq!((&database["server_version"], &database["name"]), (&version.into(), &name.into()));
    assert!(database["size_bytes"].as_i64() > Some(1 << 20), "{database}");
    let pool = &system.body["pools"][0];
    assert_eq!((&pool["name"], &pool["max"]), (&"main".into(), &7.into()));
}
