//! What `singletrack doctor` prints, and its exit code.

use std::process::Output;

use serde_json::Value;
use singletrack::domain::Status;

use super::{named, plant};
use crate::support::database::TestDb;
use crate::support::plant as planted;
use crate::support::process::singletrack;

fn run(url: &str, arguments: &[&str]) -> Output {
    let arguments = [&["doctor"], arguments].concat();
    singletrack(&arguments).env("DATABASE_URL", url).output().unwrap()
}

fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn without_a_finding_it_says_a_line_for_each_check_and_0() {
    let test = TestDb::new().await;
    let report = super::report(&test).await;
    let (code, out, err) = said(&run(&test.url, &[]));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let lines: Vec<&str> = out
        .lines()
        .filter(|line| line.starts_with("ok "))
        .map(|line| line.split_whitespace().nth(1).unwrap())
        .collect();
    assert_eq!(lines, named(&report, singletrack::app::doctor::Outcome::Ok));
    assert!(out.ends_with(&format!("{} checks: nothing is wrong\n", lines.len())), "{out}");
}

#[tokio::test]
async fn a_finding_is_said_with_its_rows_its_meaning_and_its_remedy_and_1() {
    let test = TestDb::new().await;
    plant(
        &test,
        "insert into test_runs (id, workflow_id, definition, revision, status, executor_type, run_at)
         select gen_random_uuid(), 'late-' || n, 'late', 1, 'scheduled', 'command', now() - interval '2 minutes'
         from generate_series(1, 11) n;
         drop index test_runs_newest",
    )
    .await;
    let (code, out, err) = said(&run(&test.url, &["--full"]));
    assert_eq!((code, err.as_str()), (1, ""), "{out}");
    assert!(
        out.contains(
            "\nFINDING  indexes                index test_runs.test_runs_newest is missing\n           means:  "
        ),
        "{out}"
    );
    assert!(out.contains("\n           remedy: CREATE INDEX CONCURRENTLY test_runs_newest ON test_runs USING btree (created_at, id);\n"), "{out}");
    assert_eq!(out.lines().filter(|line| line.starts_with("           - ")).count(), 11, "{out}");
    assert!(out.contains("\n           - and 1 more\n"), "{out}");
    assert!(out.ends_with("checks: 2 with findings\n"), "{out}");
}

#[tokio::test]
async fn as_json_it_keeps_its_shape() {
    let test = TestDb::new().await;
    plant(&test, "drop index test_runs_newest").await;
    let (code, out, _) = said(&run(&test.url, &["--json"]));
    let report: Value = serde_json::from_str(&out).unwrap();
    let members = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(code, 1);
    assert_eq!(members(&report), "checked_at checks database full outcome server_version singletrack_version");
    assert_eq!((&report["outcome"], &report["full"]), (&"findings".into(), &false.into()));
    let checks = report["checks"].as_array().unwrap();
    for check in checks {
        assert_eq!(members(check), "findings holds name notes outcome");
    }
    let found: Vec<&Value> = checks.iter().filter(|check| check["outcome"] == "findings").collect();
    assert_eq!((found.len(), &found[0]["name"]), (1, &"indexes".into()));
    assert_eq!(members(&found[0]["findings"][0]), "means more remedy rows what");
}

#[tokio::test]
async fn where_it_cannot_look_it_says_so_in_a_line_and_69() {
    for arguments in [&[][..], &["--json"]] {
        let (code, out, err) = said(&run("postgres://nobody@127.0.0.1:1/nowhere", arguments));
        assert_eq!((code, out.as_str(), err.lines().count()), (69, "", 1), "{err}");
        assert!(
            err.starts_with("singletrack: can't look at the database (DATABASE_URL): 127.0.0.1:1 can't be reached: "),
            "{err}"
        );
    }
    let (code, out, err) = said(&singletrack(&["doctor"]).output().unwrap());
    assert_eq!((code, out.as_str()), (64, ""), "{err}");
    assert!(err.starts_with("DATABASE_URL is not set"), "{err}");
    assert_eq!(said(&run("x", &["--no-such-flag"])).0, 64);
}

#[tokio::test]
async fn an_account_that_may_only_read_sees_what_it_may_and_what_it_may_not_is_told() {
    let test = TestDb::new().await;
    planted::run(&test, "w", Status::Running).await;
    // Accounts are the whole server's; no other test has this one.
    plant(&test, "create role doctors_reader login").await;
    let url = test.url.replacen("://singletrack@", "://doctors_reader@", 1);

    let (code, out, err) = said(&run(&url, &[]));
    assert_eq!((code, err.as_str()), (69, ""), "{out}");
    assert!(out.contains("\nunseen   two-slots "), "{out}");
    assert!(out.contains("grant select on all tables in schema ... to doctors_reader;"), "{out}");

    plant(&test, "grant select on all tables in schema public to doctors_reader").await;
    let (code, out, err) = said(&run(&url, &[]));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("this account sees its own sessions only"), "{out}");
    assert!(out.contains("grant select on sequence run_fence"), "{out}");
    plant(&test, "drop index test_runs_one_slot").await;
    assert_eq!(said(&run(&url, &[])).0, 1);

    plant(&test, "drop owned by doctors_reader; drop role doctors_reader").await;
}

#[tokio::test]
async fn it_writes_nothing() {
    let test = TestDb::new().await;
    let mut connection = singletrack::store::doctor::connect(test.options(), None).await.unwrap();
    let refused =
        sqlx::query("insert into workers (name, executor_types) values ('x', '{}')").execute(&mut connection).await;
    assert_eq!(refused.unwrap_err().into_database_error().unwrap().code().unwrap(), "25006");
}

#[tokio::test]
async fn every_check_is_described() {
    let report = super::report(&TestDb::new().await).await;
    let described = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctor.md")).unwrap();
    for check in &report.checks {
        assert!(described.contains(&format!("`{}`", check.name)), "{}", check.name);
    }
}
