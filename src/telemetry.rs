//! The service's own log: set up once, in `main`.
//!
//! Field names are dotted, with the unit last: `run.id`, `workflow.id`, `duration_ms`.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::config::{Config, LogFormat};

/// Installs the subscriber. Lines go to standard error: standard output belongs to what a command prints as its answer.
pub fn install(config: &Config) -> Result<(), TryInitError> {
    let filter = EnvFilter::new(&config.log);
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => {
            subscriber.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).finish().try_init()
        }
        LogFormat::Json => subscriber.json().flatten_event(true).finish().try_init(),
    }
}
