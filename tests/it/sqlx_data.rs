//! `sqlx-data.json` says what the migrations and the queries say, and that of the version before still holds: replicas of both
//! share one database while one is replaced by the other.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sqlx::{Executor as _, SqlSafeStr as _};

use crate::support::database::TestDb;
use crate::support::not_allowed;

const CLONE: &str = env!("CARGO_MANIFEST_DIR");

type Queries = BTreeMap<String, Value>;

fn stored() -> Queries {
    let path = Path::new(CLONE).join("sqlx-data.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The queries of the newest earlier commit with fewer migrations, and which one that is; else why there are none.
fn earlier() -> Result<(String, Queries), String> {
    let found = Command::new(Path::new(CLONE).join(".ci/earlier")).output().map_err(|error| error.to_string())?;
    assert!(found.status.success(), "{found:?}");
    let commit = String::from_utf8(found.stdout).unwrap().trim().to_owned();
    if commit.is_empty() {
        return Err(String::from_utf8(found.stderr).unwrap().trim().to_owned());
    }
    let show = ["-c", "safe.directory=*", "show", &format!("{commit}:./sqlx-data.json")];
    let shown = Command::new("git").current_dir(CLONE).args(show).output().unwrap();
    assert!(shown.status.success(), "{shown:?}");
    Ok((commit, serde_json::from_slice(&shown.stdout).unwrap()))
}

async fn described(test: &TestDb, query: &Value) -> sqlx::Result<Value> {
    let sql: &'static str = query["query"].as_str().unwrap().to_owned().leak();
    let described = (&test.sql).describe(sql.into_sql_str()).await?;
    Ok(serde_json::to_value(&described).unwrap())
}

/// What a program that was built for `then` would misunderstand in what it is `now`.
fn changed(then: &Value, now: &Value) -> Option<String> {
    let columns = |of: &Value| -> Vec<(Value, Value)> {
        let columns = of["columns"].as_array().unwrap().iter();
        columns.map(|column| (column["name"].clone(), column["type_info"].clone())).collect()
    };
    if columns(then) != columns(now) {
        return Some(format!("its columns were {:?} and are {:?}", columns(then), columns(now)));
    }
    if then["parameters"] != now["parameters"] {
        return Some(format!("its parameters were {} and are {}", then["parameters"], now["parameters"]));
    }
    let nullable = then["nullable"].as_array().unwrap().iter().zip(now["nullable"].as_array().unwrap());
    let new = nullable.zip(columns(now)).find(|((then, now), _)| **then == false && **now != false);
    new.map(|(_, (name, _))| format!("its column {name} was never null and may be now"))
}

// That no query is missing is proved by the build itself, which has nothing else.
#[tokio::test]
async fn every_stored_query_is_described_as_this_schema_describes_it() {
    let test = TestDb::new().await;
    for (hash, query) in stored() {
        let described = described(&test, &query).await.unwrap();
        assert_eq!(described, query["describe"], "{hash} is stale: make prepare\n{}", query["query"]);
    }
}

#[tokio::test]
async fn every_query_of_the_version_with_fewer_migrations_means_in_this_schema_what_it_meant_in_its_own() {
    let (commit, queries) = match earlier() {
        Ok(found) => found,
        Err(why) => return not_allowed(&format!("the queries of the version before are not compared: {why}")),
    };
    assert!(queries.len() > 50, "{commit} has hardly any queries");
    let test = TestDb::new().await;
    let mut broken = Vec::new();
    for query in queries.values() {
        let change = match described(&test, query).await {
            Ok(now) => changed(&query["describe"], &now),
            Err(error) => Some(error.to_string()),
        };
        broken.extend(change.map(|change| format!("{change}:{}", query["query"].as_str().unwrap())));
    }
    assert!(
        broken.is_empty(),
        "{} of {} queries of {commit} would break beside these migrations:\n{}",
        broken.len(),
        queries.len(),
        broken.join("\n")
    );
}
