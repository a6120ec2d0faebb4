//! A way to the database on which an answer can be lost, or kept waiting, after the server has given it.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy, split};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::database::TestDb;

/// What happens to the next answer in which the mark stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Passed on as all others.
    Through,
    /// The connection breaks instead.
    Lost,
    /// It waits until its fate is another.
    Held,
}

/// Passes on everything between its clients and a database, but for the answers a test is about. Ends when dropped.
pub struct Proxy {
    /// The database by way of this proxy.
    pub test: TestDb,
    fate: Arc<watch::Sender<Fate>>,
    _connections: JoinSet<()>,
    _folder: tempfile::TempDir,
}

impl Proxy {
    /// A way to the database of `test`; `mark` is a text that stands in the answers meant, and in no others.
    pub fn to(test: &TestDb, mark: &'static str) -> Self {
        let socket = test.options().get_socket().unwrap().join(".s.PGSQL.5432");
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join(".s.PGSQL.5432")).unwrap();
        let (database, _) = test.url.split_once("host=").unwrap();
        let url = format!("{database}host={}&sslmode=disable", folder.path().display());
        let fate = Arc::new(watch::Sender::new(Fate::Through));
        let mut connections = JoinSet::new();
        connections.spawn(accept(listener, socket, mark, fate.clone()));
        let test = TestDb { url, sql: test.sql.clone(), db: test.db.clone() };
        Self { test, fate, _connections: connections, _folder: folder }
    }

    /// From now on the next answer with the mark is lost, and its connection with it; those after it are not.
    pub fn lose(&self) {
        self.fate.send_replace(Fate::Lost);
    }

    /// From now on answers with the mark wait for [`Proxy::let_go`].
    pub fn hold(&self) {
        self.fate.send_replace(Fate::Held);
    }

    /// Passes on what was held.
    pub fn let_go(&self) {
        self.fate.send_replace(Fate::Through);
    }

    /// Waits until an answer was lost.
    pub async fn lost(&self) {
        self.fate.subscribe().wait_for(|fate| *fate == Fate::Through).await.unwrap();
    }
}

async fn accept(listener: UnixListener, socket: PathBuf, mark: &'static str, fate: Arc<watch::Sender<Fate>>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let (socket, fate) = (socket.clone(), fate.clone());
        connections.spawn(async move {
            let server = UnixStream::connect(socket).await.unwrap();
            pass_on(client, server, mark.as_bytes(), &fate).await;
        });
    }
}

/// Passes on until one side closes or an answer is lost.
pub(super) async fn pass_on<S: AsyncRead + AsyncWrite>(client: S, server: S, mark: &[u8], fate: &watch::Sender<Fate>) {
    let (mut asked, mut answered) = split(client);
    let (mut answers, mut asks) = split(server);
    let answering = async {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = answers.read(&mut buffer).await {
            // The server sends a short answer in one piece, and not before its commit.
            if buffer[..length].windows(mark.len()).any(|window| window == mark) {
                if fate.send_if_modified(|fate| std::mem::replace(fate, lost_once(*fate)) == Fate::Lost) {
                    return;
                }
                fate.subscribe().wait_for(|fate| *fate != Fate::Held).await.unwrap();
            }
            if answered.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = answering => {}
        _ = copy(&mut asked, &mut asks) => {}
    }
}

/// The fate of the answers after one that had this fate.
fn lost_once(fate: Fate) -> Fate {
    if fate == Fate::Lost { Fate::Through } else { fate }
}
