//! One durable Postgres for the whole run, and a database of its own for each test, cloned from a migrated one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use rustix::fs::{FlockOperation, flock};
use singletrack::config::DatabaseUrl;
use singletrack::dev::{Options, Postgres};
use singletrack::store::{Db, LIMIT, Servers, migrate};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgRow};
use tokio::sync::OnceCell;

const TEMPLATE: &str = "singletrack_template";

/// Starts a Postgres of its own under `folder` of the build's temporary folder: for tests that stop and crash it.
pub fn own_postgres(folder: &str) -> Postgres {
    start(options(folder), false)
}

/// The same, with nothing in it that a run before this one left.
pub fn new_postgres(folder: &str) -> Postgres {
    start(options(folder), true)
}

/// The same, with environment variables of its own.
pub fn own_postgres_with(folder: &str, environment: Vec<(String, String)>) -> Postgres {
    start(Options { environment, ..options(folder) }, true)
}

fn start(options: Options, empty: bool) -> Postgres {
    if empty {
        remove_unused(&options.data_dir);
    }
    Postgres::start(options).expect("a Postgres for the tests")
}

/// How a Postgres of this name is started, and where it keeps its data.
pub fn options(folder: &str) -> Options {
    let bin_dir: Option<PathBuf> = std::env::var_os("SINGLETRACK_PG_BIN").filter(|bin| !bin.is_empty()).map(Into::into);
    // Not a `tempdir`: those are closed to the account that Postgres runs as when the tests run as root. One per version,
    // for no version starts on what another one left there.
    let version = bin_dir.as_deref().map(version).unwrap_or_default();
    let data_dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(version).join(folder);
    let settings = [("max_connections", "300"), ("shared_buffers", "128MB")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    Options { data_dir, bin_dir, settings, environment: Vec::new() }
}

/// Removes what a run before left, unless another run uses it: dropping its databases one by one takes a checkpoint each.
pub(super) fn remove_unused(data_dir: &Path) {
    let Ok(lock) = File::open(data_dir.join("lock")) else { return };
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
        std::fs::remove_dir_all(data_dir).unwrap();
    }
}

/// What the programs in a folder say they are: `pg18`.
fn version(bin_dir: &Path) -> String {
    let output = Command::new(bin_dir.join("postgres")).arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, number) = text.split_once("(PostgreSQL) ").unwrap();
    format!("pg{}", number.split(|c: char| !c.is_ascii_digit()).next().unwrap())
}

fn shared() -> MutexGuard<'static, Postgres> {
    static SHARED: OnceLock<Mutex<Postgres>> = OnceLock::new();
    SHARED.get_or_init(|| Mutex::new(new_postgres("postgres"))).lock().unwrap()
}

/// A database of one test.
pub struct TestDb {
    /// Its URL, for processes.
    pub url: String,
    /// For the test's own statements.
    pub sql: PgPool,
    /// For calls of the store.
    pub db: Db,
}

impl TestDb {
    /// A migrated, empty database on the shared Postgres.
    pub async fn new() -> Self {
        Self::made_of(Some(TEMPLATE)).await
    }

    /// A database on the shared Postgres that nobody has migrated.
    pub async fn bare() -> Self {
        Self::made_of(None).await
    }

    async fn made_of(template: Option<&str>) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        static READY: OnceCell<()> = OnceCell::const_new();
        READY.get_or_init(make_template).await;
        let name = format!("test_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let admin = PgPool::connect(&url("postgres")).await.unwrap();
        create(&admin, &name, template).await;
        admin.close().await;
        Self::at(url(&name))
    }

    /// A migrated database on a Postgres of the test's own.
    pub async fn on(postgres: &Postgres) -> Self {
        let admin = PgPool::connect(&postgres.url("postgres")).await.unwrap();
        sqlx::query("drop database if exists test with (force)").execute(&admin).await.unwrap();
        create(&admin, "test", None).await;
        let this = Self::at(postgres.url("test"));
        migrate::migrate(&this.servers()).await.unwrap();
        this
    }

    /// A database that is there.
    pub fn at(url: String) -> Self {
        let options: PgConnectOptions = url.parse().unwrap();
        let sql = PgPoolOptions::new().max_connections(5).connect_lazy_with(options.clone());
        Self { url, sql, db: Db::new(options, 10, LIMIT) }
    }

    /// How to connect.
    pub fn options(&self) -> PgConnectOptions {
        self.url.parse().unwrap()
    }

    /// The same as a replica takes it.
    pub fn servers(&self) -> Servers {
        self.url.parse::<DatabaseUrl>().unwrap().options().into()
    }

    /// Fails when a promise is broken that the database itself can see, or a connection was left inside a transaction.
    pub async fn check(&self) {
        let broken: Vec<(String, String, String)> =
            sqlx::query_as("select violation, workflow_id, detail from invariant_violations")
                .fetch_all(&self.sql)
                .await
                .unwrap();
        assert!(broken.is_empty(), "{broken:?}");
        let open: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in transaction%'",
        )
        .fetch_one(&self.sql)
        .await
        .unwrap();
        assert_eq!(open, 0, "connections left inside a transaction");
    }
}

fn url(database: &str) -> String {
    shared().url(database)
}

/// Statements that are put together, or read from a page: the tests' own, and nobody else's.
pub async fn run_sql(sql: impl sqlx::PgExecutor<'_>, statements: String) -> sqlx::Result<Vec<PgRow>> {
    sqlx::raw_sql(sqlx::AssertSqlSafe(statements)).fetch_all(sql).await
}

async fn create(admin: &PgPool, name: &str, template: Option<&str>) {
    let template = template.map(|template| format!("template {template}")).unwrap_or_default();
    run_sql(admin, format!("create database {name} {template}")).await.unwrap();
}

async fn make_template() {
    let admin = PgPool::connect(&url("postgres")).await.unwrap();
    let durable: String =
        sqlx::query_scalar("select current_setting('fsync') || current_setting('synchronous_commit') || current_setting('full_page_writes')")
            .fetch_one(&admin)
            .await
            .unwrap();
    assert_eq!(durable, "ononon", "what is proved without durability is not proved");
    // Left by a run before this one, and perhaps by older migrations.
    run_sql(&admin, format!("drop database if exists {TEMPLATE} with (force)")).await.unwrap();
    let old: Vec<String> = sqlx::query_scalar("select datname::text from pg_database where datname like 'test\\_%'")
        .fetch_all(&admin)
        .await
        .unwrap();
    for name in old {
        run_sql(&admin, format!("drop database {name} with (force)")).await.unwrap();
    }
    create(&admin, TEMPLATE, None).await;
    admin.close().await;
    migrate::migrate(&TestDb::at(url(TEMPLATE)).servers()).await.unwrap();
}
