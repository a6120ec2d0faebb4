//! The Postgres that everything is measured on: durable, of our own, reached over TCP as others reach theirs.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use singletrack::config::DatabaseUrl;
use singletrack::dev::{Options, Postgres};
use singletrack::store::{Db, LIMIT, Servers, migrate};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use uuid::Uuid;

use crate::workflows;

/// What is cloned for each repetition: migrated, with the workflows defined.
const TEMPLATE: &str = "bench_template";
/// What floor.md says, and room for the connections.
const SETTINGS: [(&str, &str); 4] =
    [("shared_buffers", "1GB"), ("max_wal_size", "4GB"), ("max_connections", "300"), ("listen_addresses", "127.0.0.1")];
/// What nothing is measured without.
const DURABLE: [(&str, &str); 5] = [
    ("fsync", "on"),
    ("synchronous_commit", "on"),
    ("full_page_writes", "on"),
    ("shared_buffers", "1GB"),
    ("max_wal_size", "4GB"),
];

/// A running server; stopped, and its data removed, when this is closed.
pub struct Server {
    postgres: Postgres,
    /// Where `pgbench` is.
    pub bin: PathBuf,
    pub port: u16,
    pub password: String,
    admin: PgPool,
}

impl Server {
    /// Starts one, with `more` settings.
    pub async fn start(more: &[(&str, &str)]) -> Result<Self> {
        let port = free_port()?;
        let own = [("port".to_owned(), port.to_string())];
        let given = SETTINGS.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let bin_dir = std::env::var_os("SINGLETRACK_PG_BIN").filter(|bin| !bin.is_empty()).map(PathBuf::from);
        let options = Options {
            data_dir: Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench"),
            bin_dir,
            settings: given.chain(own).collect(),
            environment: Vec::new(),
        };
        let postgres = tokio::task::spawn_blocking(move || Postgres::start(options)).await??;
        let pid = postgres.pid().context("Postgres is not running")?;
        let program = fs::read_link(format!("/proc/{pid}/exe"))?;
        let bin = program.parent().context("Postgres has no folder")?.to_path_buf();
        let socket: PgConnectOptions = postgres.url("postgres").parse()?;
        let admin = PgPoolOptions::new().max_connections(2).connect_with(socket.port(port)).await?;
        let password = Uuid::new_v4().simple().to_string();
        let this = Self { postgres, bin, port, password, admin };
        this.let_in().await?;
        this.check().await?;
        this.make_template().await?;
        Ok(this)
    }

    /// Lets us in over TCP: by a password, for others on this machine can try the port as well.
    async fn let_in(&self) -> Result<()> {
        let file: String = sqlx::query_scalar("select current_setting('hba_file')").fetch_one(&self.admin).await?;
        let text = fs::read_to_string(&file)?;
        if !text.contains("# bench\n") {
            let ours = format!("# bench\nhost all all 127.0.0.1/32 scram-sha-256\n{text}");
            OpenOptions::new().write(true).truncate(true).open(&file)?.write_all(ours.as_bytes())?;
        }
        execute(&self.admin, &format!("alter role singletrack password '{}'", self.password)).await?;
        execute(&self.admin, "select pg_reload_conf()").await
    }

    async fn check(&self) -> Result<()> {
        for (name, wanted) in DURABLE {
            let is: String = sqlx::query_scalar("select current_setting($1)").bind(name).fetch_one(&self.admin).await?;
            if is != wanted {
                bail!("{name} is {is}, and nothing is measured unless it is {wanted}");
            }
        }
        Ok(())
    }

    async fn make_template(&self) -> Result<()> {
        let left: Vec<String> =
            sqlx::query_scalar(r"select datname::text from pg_database where datname like 'bench\_%'")
                .fetch_all(&self.admin)
                .await?;
        for name in left {
            execute(&self.admin, &format!("drop database {name} with (force)")).await?;
        }
        execute(&self.admin, &format!("create database {TEMPLATE}")).await?;
        let template = self.at(TEMPLATE);
        migrate::migrate(&template.servers()?).await?;
        workflows::define_all(&template.db(1)?).await?;
        template.sql.close().await;
        Ok(())
    }

    /// The version, and the settings in force that were not left alone.
    pub async fn facts(&self) -> Result<(String, Vec<(String, String)>)> {
        let version = sqlx::query_scalar("select version()").fetch_one(&self.admin).await?;
        let wanted = "select name, current_setting(name) from pg_settings where source = 'command line' \
                      and name not in ('port', 'unix_socket_directories', 'config_file', 'data_directory', 'hba_file', 'ident_file') \
                      order by name";
        Ok((version, sqlx::query_as(wanted).fetch_all(&self.admin).await?))
    }

    /// A new database with the schema and the workflows, after a checkpoint.
    pub async fn database(&self, name: &str) -> Result<Database> {
        self.make(name, &format!("template {TEMPLATE}")).await
    }

    /// A new database with nothing in it.
    pub async fn bare(&self, name: &str) -> Result<Database> {
        self.make(name, "").await
    }

    async fn make(&self, name: &str, how: &str) -> Result<Database> {
        let name = format!("bench_{name}");
        execute(&self.admin, &format!("drop database if exists {name} with (force)")).await?;
        execute(&self.admin, &format!("create database {name} {how}")).await?;
        self.checkpoint().await?;
        Ok(self.at(&name))
    }

    pub async fn checkpoint(&self) -> Result<()> {
        execute(&self.admin, "checkpoint").await
    }

    /// Removes a database.
    pub async fn remove(&self, database: Database) -> Result<()> {
        database.sql.close().await;
        execute(&self.admin, &format!("drop database {} with (force)", database.name)).await
    }

    fn at(&self, name: &str) -> Database {
        let url = format!(
            "postgres://singletrack:{}@127.0.0.1:{}/{name}?sslmode=disable&application_name=bench",
            self.password, self.port
        );
        let options: PgConnectOptions = url.parse().unwrap_or_default();
        let sql = PgPoolOptions::new().max_connections(4).connect_lazy_with(options);
        Database { name: name.to_owned(), url, sql }
    }

    /// Stops it and removes its data.
    pub async fn close(self) -> Result<()> {
        self.admin.close().await;
        let base = self.postgres.data_dir().to_path_buf();
        let postgres = self.postgres;
        tokio::task::spawn_blocking(move || drop(postgres)).await?;
        fs::remove_dir_all(base).context("can't remove the data of the benchmark")
    }
}

/// A database of one repetition.
pub struct Database {
    pub name: String,
    /// For processes.
    pub url: String,
    /// For the driver's own statements.
    pub sql: PgPool,
}

impl Database {
    pub fn servers(&self) -> Result<Servers> {
        servers(&self.url)
    }

    /// The store's way to it.
    pub fn db(&self, connections: u32) -> Result<Db> {
        Ok(Db::new(self.servers()?, connections, LIMIT))
    }

    pub async fn execute(&self, statements: &str) -> Result<()> {
        execute(&self.sql, statements).await
    }

    /// The one number that `query` finds.
    pub async fn number(&self, query: &str) -> Result<i64> {
        Ok(sqlx::query_scalar(sqlx::AssertSqlSafe(query)).fetch_one(&self.sql).await?)
    }

    /// The pairs of a text and a number that `query` finds.
    pub async fn numbers(&self, query: &str) -> Result<Vec<(String, i64)>> {
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(query)).fetch_all(&self.sql).await?)
    }

    /// The server's time, for a `where` clause.
    pub async fn now(&self) -> Result<String> {
        Ok(sqlx::query_scalar("select now()::text").fetch_one(&self.sql).await?)
    }
}

/// How the store finds a database.
pub fn servers(url: &str) -> Result<Servers> {
    let url: DatabaseUrl = url.parse().map_err(anyhow::Error::msg)?;
    Ok(url.options().into())
}

async fn execute(pool: &PgPool, statements: &str) -> Result<()> {
    sqlx::raw_sql(sqlx::AssertSqlSafe(statements)).execute(pool).await.with_context(|| {
        let first: String = statements.chars().take(200).collect();
        format!("the statement {first}")
    })?;
    Ok(())
}

/// A port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
