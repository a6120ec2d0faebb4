//! How clients and workers speak to the replicas: as anybody would, and to any of them.

use std::time::Duration;

use rand::RngExt as _;
use serde_json::Value;

/// The replicas, and a client of HTTP.
#[derive(Clone)]
pub struct Replicas {
    bases: Vec<String>,
    http: reqwest::Client,
}

impl Replicas {
    pub fn new(ports: &[u16]) -> Self {
        // The service brings its own TLS to its clients; one without must be told of one, though it never uses it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().connect_timeout(Duration::from_secs(2)).build();
        Self {
            bases: ports.iter().map(|port| format!("http://127.0.0.1:{port}/api/v1")).collect(),
            http: http.expect("a client"),
        }
    }

    /// One of them alone.
    pub fn one(&self) -> Self {
        let base = self.bases[rand::rng().random_range(0..self.bases.len())].clone();
        Self { bases: vec![base], http: self.http.clone() }
    }

    /// Status and body of the answer of one of them; `None` where there was none within `limit`, or only half of one.
    pub async fn post(&self, path: &str, body: &Value, key: Option<&str>, limit: Duration) -> Option<(u16, Value)> {
        let base = &self.bases[rand::rng().random_range(0..self.bases.len())];
        let mut request = self.http.post(format!("{base}{path}")).timeout(limit).json(body);
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let response = request.send().await.ok()?;
        let status = response.status().as_u16();
        assert!(status < 500 || status == 503, "{path} was answered {status}: {:?}", response.text().await);
        Some((status, response.json().await.ok()?))
    }

    /// Those that do not say that they are ready.
    pub async fn unready(&self) -> Vec<String> {
        let mut unready = Vec::new();
        for base in &self.bases {
            let root = base.trim_end_matches("/api/v1");
            let asked = self.http.get(format!("{root}/readyz")).timeout(Duration::from_secs(5)).send().await;
            if !asked.is_ok_and(|answer| answer.status().is_success()) {
                unready.push(root.to_owned());
            }
        }
        unready
    }

    /// Defines a workflow, however long it takes.
    pub async fn define(&self, id: &str, definition: &Value) {
        loop {
            let base = &self.bases[0];
            let request = self.http.put(format!("{base}/workflows/{id}")).json(definition);
            match request.send().await {
                Ok(answer) if answer.status().is_success() => return,
                Ok(answer) if answer.status().is_client_error() => panic!("{id}: {:?}", answer.text().await),
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}
