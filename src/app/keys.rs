//! Keys, straight in the database: how the first one is made, and how to get in again.

use anyhow::Context as _;
use rand::random;

use super::{Servers, check_way};
use crate::domain::Token;
use crate::store::keys;
pub use crate::store::keys::{Key, NewKey};
use crate::store::{Db, LIMIT};

async fn database(servers: &Servers) -> anyhow::Result<Db> {
    check_way(servers).await?;
    Ok(Db::new(servers.clone(), 1, LIMIT))
}

const UNREADY: &str = "can't use the table of keys; where it is missing, `singletrack migrate` makes it";

/// Makes a key; it, and the text that is shown this once. The audit log names the database user.
///
/// # Errors
/// When the database can't be reached or its schema is older, and when a key that is not revoked has the name.
pub async fn create(servers: &Servers, new: &NewKey) -> anyhow::Result<(Key, String)> {
    let token = Token::new(random(), random());
    let db = database(servers).await?;
    let made = db.with(async |connection| keys::create(connection, &token, new, None).await).await.context(UNREADY)?;
    let made = made.with_context(|| {
        format!("there is a key `{}` already: choose another name, or revoke that one first", new.name)
    })?;
    Ok((made, token.reveal()))
}

/// All keys, newest first.
///
/// # Errors
/// When the database can't be reached or its schema is older.
pub async fn list(servers: &Servers) -> anyhow::Result<Vec<Key>> {
    database(servers).await?.with(async |connection| keys::list(connection).await).await.context(UNREADY)
}

/// Revokes a key. The audit log names the database user.
///
/// # Errors
/// When the database can't be reached or its schema is older, and when there is no such key.
pub async fn revoke(servers: &Servers, id: &str) -> anyhow::Result<()> {
    let db = database(servers).await?;
    let known = db.with(async |connection| keys::revoke(connection, id, None).await).await.context(UNREADY)?;
    anyhow::ensure!(known, "no key has the id {id}: `singletrack keys ls` lists them");
    Ok(())
}

/// Refuses to open what can start commands to everybody who can reach this address.
pub(super) async fn check_some(servers: &Servers, listen: std::net::SocketAddr) -> anyhow::Result<()> {
    let some = Db::new(servers.clone(), 1, LIMIT).with(async |connection| keys::any_good(connection).await).await;
    anyhow::ensure!(
        some.context(UNREADY)?,
        "{listen} can be reached from other machines, and there is no key that anybody would need: make one with `singletrack keys \
         create`, or set SINGLETRACK_ALLOW_PUBLIC=on to let in everybody who reaches it, who can then start commands here"
    );
    Ok(())
}
