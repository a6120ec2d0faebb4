//! The command line: one command per process, its result an exit code. Half of the commands are the service itself; the
//! others are a client of it, over HTTP only, a file for each noun.

mod apply;
mod client;
mod definitions;
mod demo;
mod diff;
mod doctor;
mod events;
mod filter;
mod follow;
mod keys;
mod output;
mod run;
mod runs;
mod watch;
mod workflows;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use self::client::Failure;
use crate::app::{self, Role, Servers, Stop};
use crate::config::{Config, Settings};
use crate::dev::{self, Postgres};
use crate::telemetry;
use crate::traces;

/// Exit code for wrong settings, command lines and files, as in sysexits.h.
pub const USAGE: u8 = 64;

/// Runs each workflow at most once at a time.
#[derive(Debug, Parser)]
#[command(name = "singletrack", version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Service(Box<Service>),
    /// Look at the database that DATABASE_URL names and prove the promise: broken invariants, a schema that was altered, leases held by
    /// nobody, slots nobody serves, what keeps the server from its work. Writes nothing. Exit code 0: nothing is wrong; 1: something
    /// is; 69: it could not look, or not at everything.
    Doctor(Box<doctor::Doctor>),
    /// Watch the promise being kept, in half a minute: a private Postgres, three replicas, a storm of requests, one winner, a killed
    /// worker, the next run. Nothing of it is left afterwards. Exit code 1: something was not as promised.
    Demo(demo::Demo),
    /// Who may use the API: makes, lists and revokes keys, straight in the database that DATABASE_URL names.
    #[command(subcommand)]
    Keys(Box<keys::Command>),
    #[command(flatten)]
    Client(Box<Client>),
    /// Print completions for a shell: `source <(singletrack completions bash)`.
    Completions {
        /// Which.
        shell: clap_complete::Shell,
    },
}

/// The client half: one service, over HTTP. SINGLETRACK_URL says where it is, SINGLETRACK_API_KEY is the key.
#[derive(Debug, Subcommand)]
enum Client {
    /// Enqueue a run, and wait for its end where that is wanted.
    Run(run::Run),
    /// Runs: list, show, cancel, run again, read what they printed.
    #[command(subcommand)]
    Runs(runs::Command),
    /// Definitions of workflows.
    #[command(subcommand)]
    Workflows(workflows::Command),
    /// List slots: who has them, who waits, how it went of late.
    Slots(workflows::Ls),
    /// List replicas and pull workers.
    Workers(workflows::Ls),
    /// Print every change of a run's status as it happens, until Ctrl-C.
    Events(events::Events),
}

#[derive(Debug, Subcommand)]
enum Service {
    /// Try it here: API and worker on a private Postgres, which is kept between starts.
    Dev(Settings),
    /// A replica: API and worker on the Postgres that DATABASE_URL names.
    Serve(Settings),
    /// A replica without the API: worker and probes.
    Worker(Settings),
    /// Bring the schema of the database up to date.
    Migrate {
        #[command(flatten)]
        settings: Settings,
        /// Print one JSON document: how many migrations that took.
        #[arg(long)]
        json: bool,
    },
}

/// Runs one command.
pub fn run(cli: Cli) -> ExitCode {
    match cli.command {
        Command::Service(service) => serve(&service),
        Command::Doctor(doctor) => doctor.run(),
        Command::Demo(demo) => ask(demo.run()),
        Command::Keys(command) => command.run(),
        Command::Client(client) => ask(client.run()),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "singletrack", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
    }
}

impl Client {
    async fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Self::Run(run) => run.run().await,
            Self::Runs(command) => command.run().await,
            Self::Workflows(command) => command.run().await,
            Self::Slots(list) => list.slots().await,
            Self::Workers(list) => list.workers().await,
            Self::Events(events) => events.run().await,
        }
    }
}

/// Runs a command of the client half.
fn ask(command: impl Future<Output = Result<ExitCode, Failure>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done =
        runtime.map_err(|error| Failure::Failed(error.to_string())).and_then(|runtime| runtime.block_on(command));
    done.unwrap_or_else(|failure| {
        match &failure {
            // Lines that name what is wrong themselves.
            Failure::Usage(mistakes) => eprintln!("{mistakes}"),
            failure => eprintln!("singletrack: {failure}"),
        }
        failure.code()
    })
}

fn serve(command: &Service) -> ExitCode {
    let (settings, from_environment) = match command {
        Service::Dev(settings) => (settings, None),
        Service::Serve(settings) | Service::Worker(settings) | Service::Migrate { settings, .. } => {
            (settings, std::env::var("DATABASE_URL").ok())
        }
    };
    let needs_url = !matches!(command, Service::Dev(_));
    let config = match configure(settings, from_environment, needs_url) {
        Ok(config) => config,
        Err(code) => return code,
    };
    match execute(command, config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("singletrack: {}", in_a_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// The settings in force; the exit code where there is nothing left to do.
fn configure(settings: &Settings, database_url: Option<String>, needs_url: bool) -> Result<Config, ExitCode> {
    let config = settings.resolve(database_url).map_err(|mistakes| {
        eprintln!("{mistakes}");
        ExitCode::from(USAGE)
    })?;
    if settings.print_config {
        println!("{config}");
        return Err(ExitCode::SUCCESS);
    }
    if needs_url && config.database_url.is_none() {
        eprintln!("DATABASE_URL is not set: name the Postgres to use, such as postgres://user:password@host/database");
        return Err(ExitCode::from(USAGE));
    }
    Ok(config)
}

/// What was tried and why it failed; the layers between repeat the latter.
fn in_a_line(error: &anyhow::Error) -> String {
    let (tried, why) = (error.to_string(), error.root_cause().to_string());
    if tried == why { tried } else { format!("{tried}: {why}") }
}

fn execute(command: &Service, config: Config) -> anyhow::Result<()> {
    // Commands may run under the same account, and must not read the service's secrets from its memory or environment.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // Before the first connection, and the first command that is to have what was given.
    app::raise_open_files();
    telemetry::install(&config).context("can't set up the log")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        let sending = traces::install()?;
        let done = match command {
            Service::Dev(_) => develop(config).await,
            Service::Serve(_) => replica(config, Role::Serve).await,
            Service::Worker(_) => replica(config, Role::Worker).await,
            Service::Migrate { json, .. } => migrate(&servers(&config)?, *json).await,
        };
        if let Some(sending) = sending {
            // What is sent last needs this runtime.
            tokio::task::spawn_blocking(|| sending.finish()).await?;
        }
        done
    });
    // Whatever still blocks a thread must not keep the process.
    runtime.shutdown_background();
    done
}

fn servers(config: &Config) -> anyhow::Result<Servers> {
    Ok(config.database_url.as_ref().context("DATABASE_URL is not set")?.options().into())
}

async fn migrate(servers: &Servers, json: bool) -> anyhow::Result<()> {
    match app::migrate_schema(servers).await? {
        count if json => println!("{:#}", serde_json::json!({"applied": count})),
        0 => println!("up to date already"),
        1 => println!("applied 1 migration"),
        count => println!("applied {count} migrations"),
    }
    Ok(())
}

async fn replica(config: Config, role: Role) -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    let servers = servers(&config)?;
    let listener = app::bind(&config)?;
    tokio::select! {
        prepared = app::prepare_schema(&servers, config.migrate) => prepared?,
        // A database that does not answer must not keep the process from leaving.
        () = stop.asked() => return Ok(()),
    }
    app::run(config, servers, listener, role, stop).await
}

async fn develop(config: Config) -> anyhow::Result<()> {
    // From the first moment on: Ctrl-C while Postgres starts must not leave it behind.
    let stop = stop_on_signals()?;
    if std::env::var_os("DATABASE_URL").is_some() {
        println!("DATABASE_URL is ignored here: it may be another project's. --database-url names one.");
    }
    let listener = app::bind(&config)?;
    let (url, postgres) = match &config.database_url {
        Some(url) => (url.clone(), None),
        None => {
            let postgres = start_postgres(&config).await?;
            (postgres.url("postgres").parse().map_err(anyhow::Error::msg)?, Some(postgres))
        }
    };
    let servers = Servers::from(url.options());
    let result = async {
        tokio::select! {
            biased;
            () = stop.asked() => return Ok(()),
            prepared = app::prepare_schema(&servers, config.migrate) => prepared?,
        }
        greet(&config, &listener, postgres.as_ref())?;
        app::run(config, servers, listener, Role::Serve, stop).await
    }
    .await;
    // Stopping waits for the server's checkpoint.
    tokio::task::spawn_blocking(move || drop(postgres)).await?;
    result
}

async fn start_postgres(config: &Config) -> anyhow::Result<Postgres> {
    let options =
        dev::Options { data_dir: config.data_dir.clone(), bin_dir: config.pg_bin.clone(), ..dev::Options::default() };
    let postgres = tokio::task::spawn_blocking(move || Postgres::start(options)).await??;
    for note in postgres.notes() {
        println!("{note}");
    }
    Ok(postgres)
}

/// What a person who just started it needs to know.
fn greet(config: &Config, listener: &std::net::TcpListener, postgres: Option<&Postgres>) -> anyhow::Result<()> {
    let url = config.public_url.clone().unwrap_or(format!("http://{}", listener.local_addr()?));
    println!("API       {url}/api/v1   ({url}/docs describes it)");
    println!("Dashboard {url}/");
    match postgres {
        Some(postgres) => {
            println!("Database  {}", postgres.psql("postgres"));
            println!("Data      {}", postgres.data_dir().display());
        }
        None => println!("Database  the one --database-url names"),
    }
    println!("Try it    curl -X PUT {url}/api/v1/workflows/hello -H 'Content-Type: application/json' \\");
    println!(
        "            -d '{{\"executor\": {{\"type\": \"command\", \"argv\": [\"sh\", \"-c\", \"echo hello; sleep 10\"]}}}}'"
    );
    println!(
        "          curl -i -X POST {url}/api/v1/workflows/hello/runs -H 'Content-Type: application/json' -d '{{}}'"
    );
    println!("          and the last line again within ten seconds: 409, with the id of the run in progress.");
    println!("For trying and developing, not for production. Ctrl-C stops all of it; the data stays.");
    Ok(())
}

/// SIGTERM and Ctrl-C ask for the stop; a second one hurries.
fn stop_on_signals() -> anyhow::Result<Stop> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = Stop::default();
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let asked = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("asked to stop");
            asked.ask();
        }
    });
    Ok(stop)
}
