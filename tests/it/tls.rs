//! TLS to Postgres: used where the URL says so, by every connection, and only with a server that is the one meant.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rand::random;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use singletrack::dev::Postgres;
use tempfile::TempDir;
use tokio::task::block_in_place;

use crate::support::calls::LIMIT;
use crate::support::database::{TestDb, new_postgres, options};
use crate::support::eventually;
use crate::support::process::{Process, SHORT_LEASE, singletrack};
use crate::support::standby::cluster;

/// A Postgres that lets in by TCP whoever speaks TLS, and nobody else.
struct Secured {
    /// The database by the server's socket.
    test: TestDb,
    /// An address of loopback that no other Postgres of this machine listens on, which its certificate names.
    address: Ipv4Addr,
    /// One that it does not name.
    other: Ipv4Addr,
    authorities: TempDir,
    _postgres: Postgres,
}

impl Secured {
    async fn start(folder: &str) -> Self {
        let (address, other) = (Ipv4Addr::new(127, 54, random(), random()), Ipv4Addr::new(127, 55, random(), random()));
        let authorities = tempfile::tempdir().unwrap();
        let postgres = block_in_place(|| {
            let ours = authority(&authorities.path().join("ours.pem"));
            authority(&authorities.path().join("another.pem"));
            let mut made = new_postgres(folder);
            made.stop_fast();
            let data = cluster(made.data_dir());
            drop(made);
            certify(&ours, address, &data);
            let rules = data.join("pg_hba.conf");
            let others = fs::read_to_string(&rules).unwrap();
            fs::write(&rules, format!("hostssl all all 127.0.0.0/8 trust\n{others}")).unwrap();
            let mut options = options(folder);
            let more = [("listen_addresses", format!("{address},{other}")), ("ssl", "on".into())];
            options.settings.extend(more.map(|(name, value)| (name.to_owned(), value)));
            Postgres::start(options).expect("a Postgres with TLS")
        });
        let test = TestDb::on(&postgres).await;
        Self { test, address, other, authorities, _postgres: postgres }
    }

    /// A URL of the database by TCP.
    fn url(&self, parameters: &str) -> String {
        url(self.address, parameters)
    }

    /// The parameter that names the authority to trust.
    fn root(&self, name: &str) -> String {
        format!("sslrootcert={}", self.authorities.path().join(name).display())
    }
}

fn url(host: Ipv4Addr, parameters: &str) -> String {
    format!("postgres://singletrack@{host}:5432/test?{parameters}")
}

/// Makes an authority and writes its certificate.
fn authority(path: &Path) -> CertifiedIssuer<'static, KeyPair> {
    let mut about = CertificateParams::default();
    about.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    about.distinguished_name.push(DnType::CommonName, "an authority");
    let made = CertifiedIssuer::self_signed(about, KeyPair::generate().unwrap()).unwrap();
    fs::write(path, made.pem()).unwrap();
    made
}

/// Gives the server on `data` a certificate for `address`.
fn certify(authority: &CertifiedIssuer<'_, KeyPair>, address: Ipv4Addr, data: &Path) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new([address.to_string()]).unwrap().signed_by(&key, authority).unwrap();
    let owner = fs::metadata(data).unwrap();
    for (name, text) in [("server.crt", certificate.pem()), ("server.key", key.serialize_pem())] {
        let path: PathBuf = data.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
}

/// What a replica that can't use the database says as it ends.
fn refused(url: &str) -> String {
    let ended =
        singletrack(&["serve"]).env("DATABASE_URL", url).env("SINGLETRACK_LISTEN", "127.0.0.1:0").output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(!ended.status.success(), "{said}");
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn every_connection_to_postgres_is_encrypted_where_the_url_asks_for_it() {
    let secured = Secured::start("tls").await;
    let trusting = secured.root("ours.pem");
    for parameters in [
        "sslmode=require".to_owned(),
        format!("sslmode=verify-ca&{trusting}"),
        format!("sslmode=verify-full&{trusting}"),
    ] {
        let mut replica = Process::serve(&secured.url(&parameters), SHORT_LEASE);
        replica.client.define("w", "true").await;
        let id = replica.client.enqueue("w").await.run_id();
        assert_eq!(replica.client.finished(id).await["status"], "succeeded");
        let ours: (i64, i64) = sqlx::query_as(
            "select count(*), count(*) filter (where s.ssl and s.version like 'TLSv1.%')
             from pg_stat_activity a join pg_stat_ssl s using (pid)
             where a.application_name = 'singletrack' and a.datname = 'test'",
        )
        .fetch_one(&secured.test.sql)
        .await
        .unwrap();
        assert!(ours.0 > 2 && ours.0 == ours.1, "{parameters}: {ours:?}");
        replica.kill();
        eventually("its connections are gone", LIMIT, async || {
            let left: i64 =
                sqlx::query_scalar("select count(*) from pg_stat_activity where application_name = 'singletrack'")
                    .fetch_one(&secured.test.sql)
                    .await
                    .unwrap();
            (left == 0).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_the_one_meant_is_refused_in_one_line_that_says_why() {
    let secured = Secured::start("tls-refused").await;
    let (ours, another) = (secured.root("ours.pem"), secured.root("another.pem"));
    for (host, parameters, why) in [
        (secured.address, format!("sslmode=verify-full&{another}"), "name the file of its authority by sslrootcert"),
        (secured.address, format!("sslmode=verify-ca&{another}"), "name the file of its authority by sslrootcert"),
        (secured.address, "sslmode=verify-full".to_owned(), "name the file of its authority by sslrootcert"),
        (secured.other, format!("sslmode=verify-full&{ours}"), "the host as the certificate has it"),
        (
            secured.address,
            format!("sslmode=verify-full&{}", secured.root("missing")),
            "no such file as sslrootcert names",
        ),
        (secured.address, "sslmode=disable".to_owned(), "no encryption"),
    ] {
        let said = block_in_place(|| refused(&url(host, &parameters)));
        assert!(
            said.lines().count() == 1 && said.contains("DATABASE_URL") && said.contains(why),
            "{parameters}: {said}"
        );
    }
}
