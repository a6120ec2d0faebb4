//! In fair weather a proxy is not there.

use std::sync::Arc;

use rand::prelude::*;
use sqlx::Connection as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::Behind;
use super::proxy::{Proxy, Target};

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_statements_on_twenty_connections_pass_unharmed() {
    let behind = Arc::new(Behind::new(1).await);
    let mut clients = JoinSet::new();
    for client in 0..20_i64 {
        let behind = behind.clone();
        clients.spawn(async move {
            let mut connection = behind.connect().await;
            for n in client * 50..client * 50 + 50 {
                // Every tenth is larger than what sockets and the proxy take at once.
                let text = format!("{n}/").repeat(if n % 10 == 0 { 100_000 } else { 10 });
                let insert = sqlx::query("insert into rows values ($1, $2)").bind(n).bind(&text);
                insert.execute(&mut connection).await.unwrap();
                let select = sqlx::query_scalar("select text from rows where n = $1").bind(n);
                let found: String = select.fetch_one(&mut connection).await.unwrap();
                assert!(found == text, "{n} has come back otherwise");
            }
            connection.close().await.unwrap();
        });
    }
    clients.join_all().await;
    let counts = behind.proxy.counts();
    assert_eq!((counts.connections, counts.commits), (20, 1000));
    assert_eq!(behind.rows().await, (0..1000).collect::<Vec<_>>());
}

/// Messages that look like those of the protocol, of all sizes up to 2 MB.
fn messages(random: &mut StdRng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..200 {
        let limit = *[5, 100, 20_000, 2_000_000].choose(random).unwrap();
        let body: Vec<u8> = (0..random.random_range(0..limit)).map(|at| (at % 251) as u8).collect();
        bytes.push(*b"PBEDSQCTZ12dX".choose(random).unwrap());
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
    }
    bytes
}

/// Sends in pieces, which end anywhere, while it reads to the end of what comes.
async fn exchange(stream: TcpStream, bytes: Vec<u8>, seed: u64) -> Vec<u8> {
    let (mut from, mut to) = stream.into_split();
    let sending = tokio::spawn(async move {
        let mut random = StdRng::seed_from_u64(seed);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(random.random_range(1..=rest.len().min(100_000)));
            to.write_all(piece).await.unwrap();
            rest = more;
        }
        // The other direction goes on.
        to.shutdown().await.unwrap();
    });
    let mut read = Vec::new();
    from.read_to_end(&mut read).await.unwrap();
    sending.await.unwrap();
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_sent_arrives_byte_for_byte_and_a_direction_can_end_before_the_other() {
    let mut random = StdRng::seed_from_u64(7);
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(Target::Tcp(server.local_addr().unwrap()), 1).unwrap();
    let asked = [&[0, 0, 0, 8, 0, 3, 0, 0][..], &messages(&mut random)].concat();
    let answered = messages(&mut random);
    let mut client = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
    // It is asked for encryption first, says no, and keeps that to itself.
    client.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'N');
    let asking = tokio::spawn(exchange(client, asked.clone(), 1));
    let (accepted, _) = server.accept().await.unwrap();
    let arrived = exchange(accepted, answered.clone(), 2).await;
    assert!(arrived == asked, "{} of {} bytes", arrived.len(), asked.len());
    assert!(asking.await.unwrap() == answered);
}
