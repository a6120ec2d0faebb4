//! A way to a replica on which an answer can be lost after the replica has given it.

use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::proxy::{Fate, pass_on};
use super::replica::Client;

/// Passes on everything between its clients and a replica, but for the answers a test is about. Ends when dropped.
pub struct Wire {
    /// The replica by way of this wire.
    pub client: Client,
    fate: Arc<watch::Sender<Fate>>,
    _connections: JoinSet<()>,
}

impl Wire {
    /// A way to the replica of `client`; `mark` is a text that stands in the answers meant, and in no others.
    pub async fn to(client: &Client, mark: &'static str) -> Self {
        let address = client.base.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Client::new(format!("http://{}", listener.local_addr().unwrap()));
        let fate = Arc::new(watch::Sender::new(Fate::Through));
        let mut connections = JoinSet::new();
        connections.spawn(accept(listener, address, mark, fate.clone()));
        Self { client, fate, _connections: connections }
    }

    /// From now on the next answer with the mark is lost, and its connection with it; those after it are not.
    pub fn lose(&self) {
        self.fate.send_replace(Fate::Lost);
    }

    /// Waits until an answer was lost.
    pub async fn lost(&self) {
        self.fate.subscribe().wait_for(|fate| *fate == Fate::Through).await.unwrap();
    }
}

async fn accept(listener: TcpListener, address: String, mark: &'static str, fate: Arc<watch::Sender<Fate>>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let (address, fate) = (address.clone(), fate.clone());
        connections.spawn(async move {
            let server = TcpStream::connect(address).await.unwrap();
            pass_on(client, server, mark.as_bytes(), &fate).await;
        });
    }
}
