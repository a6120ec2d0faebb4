//! Keys, and who has them.

use rand::random;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use singletrack::domain::{Scope, Token};
use singletrack::store::keys::{self, NewKey};

use super::database::TestDb;
use super::replica::Client;

/// Makes a key that is named for what it may; its text.
pub async fn key(test: &TestDb, name: &str, scopes: &[Scope], workflows: Option<&[&str]>) -> String {
    let token = Token::new(random(), random());
    let workflows = workflows.map(|patterns| patterns.iter().map(|text| (*text).to_owned()).collect());
    let new = NewKey { name: name.to_owned(), scopes: scopes.to_vec(), workflows, seconds: None };
    let made = test.db.with(async |connection| keys::create(connection, &token, &new, Some("test")).await).await;
    assert!(made.unwrap().is_some(), "{name} is there already");
    token.reveal()
}

/// The part of a key that is no secret.
pub fn id_of(token: &str) -> &str {
    token.split('_').nth(1).unwrap()
}

impl Client {
    /// The same client with this key.
    pub fn having(&self, token: &str) -> Self {
        let bearer = HeaderValue::try_from(format!("Bearer {token}")).unwrap();
        let headers = HeaderMap::from_iter([(AUTHORIZATION, bearer)]);
        let http = reqwest::Client::builder().no_proxy().default_headers(headers).build().unwrap();
        Self { base: self.base.clone(), http }
    }
}
