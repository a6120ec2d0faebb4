//! `sqlx-data.json` says what the migrations and the queries say.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use sqlx::{Executor as _, SqlSafeStr as _};

use crate::support::database::TestDb;

fn stored() -> BTreeMap<String, Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("sqlx-data.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

// That no query is missing is proved by the build itself, which has nothing else.
#[tokio::test]
async fn every_stored_query_is_described_as_this_schema_describes_it() {
    let test = TestDb::new().await;
    for (hash, query) in stored() {
        let sql: &'static str = query["query"].as_str().unwrap().to_owned().leak();
        let described = (&test.sql).describe(sql.into_sql_str()).await.unwrap();
        let described = serde_json::to_value(&described).unwrap();
        assert_eq!(described, query["describe"], "{hash} is stale: make prepare\n{sql}");
    }
}
