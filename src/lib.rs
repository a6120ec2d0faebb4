//! x
pub mod api;
pub mod app;
pub mod cli;
pub mod config;
pub mod dev;
pub mod domain;
pub mod engine;
pub mod executor;
pub mod store;
pub mod telemetry;
