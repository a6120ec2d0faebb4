//! `singletrack doctor`: what is planted is found, and said so that somebody can act on it; where nothing is wrong nothing is said.

mod answers;
mod promise;
mod schema;
mod server;
mod standby;

use std::time::Duration;

use singletrack::app::doctor::{Check, Finding, Outcome, Report, Terms, examine};
use sqlx::postgres::PgConnectOptions;

use crate::support::database::TestDb;

/// What is looked at unless a test says otherwise.
pub const TERMS: Terms = Terms { full: false, snapshot_age: Duration::from_secs(300), pool_size: 10 };

/// Looks at the database of a test.
pub async fn report(test: &TestDb) -> Report {
    look(&test.options(), &TERMS).await
}

pub async fn look(options: &PgConnectOptions, terms: &Terms) -> Report {
    examine(options.clone(), terms).await.unwrap()
}

/// The names of the checks that came to this.
pub fn named(report: &Report, outcome: Outcome) -> Vec<&'static str> {
    report.checks.iter().filter(|check| check.outcome == outcome).map(|check| check.name).collect()
}

pub fn check<'a>(report: &'a Report, name: &str) -> &'a Check {
    report.checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no check {name}: {report:?}"))
}

/// The one finding there is, of this check.
pub fn only(report: &Report, name: &str) -> Finding {
    assert_eq!(named(report, Outcome::Findings), [name], "{report:#?}");
    assert_eq!((named(report, Outcome::Unseen), report.outcome), (vec![], Outcome::Findings), "{report:#?}");
    let [finding] = &check(report, name).findings[..] else { panic!("not one finding: {report:#?}") };
    for said in [&finding.what, &finding.means, &finding.remedy] {
        assert!(!said.is_empty(), "{finding:?}");
    }
    finding.clone()
}

/// That nothing is wrong, and that everything was looked at.
pub fn clean(report: &Report) {
    assert_eq!(report.outcome, Outcome::Ok, "{report:#?}");
    assert!(report.checks.len() > 30, "{report:#?}");
}

/// Carries out statements as a superuser would who knows what the guards are, all or nothing.
pub async fn plant(test: &TestDb, statements: &'static str) {
    let mut transaction = test.sql.begin().await.unwrap();
    sqlx::raw_sql(statements).execute(&mut *transaction).await.unwrap();
    transaction.commit().await.unwrap();
}
