//! Where spans go.

use std::env;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use opentelemetry::{InstrumentationScope, Key, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Sampler, SpanProcessor as _};
use tokio::runtime::Handle;

use super::{TRACES, Traces};
use crate::tls;

/// Longest time for a request to the collector.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time at the end for what is not sent yet.
const LAST_SPANS: Duration = Duration::from_secs(5);

/// What sends spans until it is told to [`finish`](Self::finish).
#[derive(Debug)]
pub struct Sending(&'static Traces);

impl Sending {
    /// Sends what is left, for 5 seconds at most. It blocks.
    pub fn finish(self) {
        if let Err(error) = self.0.processor.shutdown_with_timeout(LAST_SPANS) {
            tracing::warn!(%error, "the last spans could not be sent");
        }
    }
}

/// Has spans sent from now on, where `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set, on the runtime that it
/// is called on. The other variables are those of OpenTelemetry's specification, and mean what they mean there:
/// `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SERVICE_NAME` (`singletrack` without it), `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`,
/// `OTEL_TRACES_SAMPLER_ARG`, `OTEL_BSP_*`, `OTEL_SDK_DISABLED`.
pub fn install() -> anyhow::Result<Option<Sending>> {
    let said = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let asked =
        ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"].iter().any(|name| said(name).is_some());
    let disabled = said("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
        || said("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
    if !asked || disabled {
        return Ok(None);
    }
    let sampler = sampler(said("OTEL_TRACES_SAMPLER").as_deref(), said("OTEL_TRACES_SAMPLER_ARG").as_deref())?;
    let exporter = SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_http_client(Client::new()?)
        .build()
        .context("traces: the variables OTEL_EXPORTER_OTLP_* can't be used")?;
    let mut processor = BatchSpanProcessor::builder(exporter).build();
    processor.set_resource(&resource());
    // A second one in the same process would send to the first one's collector.
    TRACES.set(Traces { processor, sampler }).map_err(|_| anyhow::anyhow!("traces are sent already"))?;
    Ok(TRACES.get().map(Sending))
}

/// Who says it.
pub(super) fn scope() -> InstrumentationScope {
    InstrumentationScope::builder("singletrack").with_version(env!("CARGO_PKG_VERSION")).build()
}

fn resource() -> Resource {
    let said = Resource::builder().build();
    let unnamed = said.get(&Key::new("service.name")).is_none_or(|name| name.as_str().starts_with("unknown_service"));
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version);
    if unnamed { resource.with_service_name("singletrack").build() } else { resource.build() }
}

/// The sampler of a name that the specification has.
fn sampler(name: Option<&str>, argument: Option<&str>) -> anyhow::Result<Sampler> {
    let ratio = || match argument.unwrap_or("1").parse() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(Sampler::TraceIdRatioBased(ratio)),
        _ => anyhow::bail!("OTEL_TRACES_SAMPLER_ARG: must be a number from 0 to 1"),
    };
    let parent_based = |root| Sampler::ParentBased(Box::new(root));
    Ok(match name.unwrap_or("parentbased_always_on") {
        "always_on" => Sampler::AlwaysOn,
        "always_off" => Sampler::AlwaysOff,
        "traceidratio" => ratio()?,
        "parentbased_always_on" => parent_based(Sampler::AlwaysOn),
        "parentbased_always_off" => parent_based(Sampler::AlwaysOff),
        "parentbased_traceidratio" => parent_based(ratio()?),
        name => anyhow::bail!(
            "OTEL_TRACES_SAMPLER: `{name}` is not one of always_on, always_off, traceidratio, parentbased_always_on, \
             parentbased_always_off, parentbased_traceidratio"
        ),
    })
}

/// Sends on our runtime what a thread of the exporter's own waits for.
#[derive(Debug)]
struct Client {
    http: reqwest::Client,
    runtime: Handle,
    failing: AtomicBool,
}

impl Client {
    fn new() -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls::trusting(tls::roots()))
            .timeout(TIMEOUT)
            .build()?;
        Ok(Self { http, runtime: Handle::current(), failing: AtomicBool::new(false) })
    }

    /// Says it once, until it works again: a collector that is away is nobody's emergency.
    fn tell(&self, failure: Option<&str>) {
        match (failure, self.failing.swap(failure.is_some(), Ordering::Relaxed)) {
            (Some(error), false) => tracing::warn!(error, "spans can't be sent; they are lost until they can"),
            (None, true) => tracing::info!("spans are sent again"),
            _ => {}
        }
    }
}

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let http = self.http.clone();
        let sent = self.runtime.spawn(async move {
            let (head, body) = request.into_parts();
            let request = http.request(head.method, head.uri.to_string()).headers(head.headers).body(body);
            let answer = request.send().await?;
            let status = answer.status();
            Ok::<_, reqwest::Error>((status, answer.bytes().await?))
        });
        match sent.await? {
            Ok((status, body)) => {
                self.tell((!status.is_success()).then(|| status.to_string()).as_deref());
                let mut answer = Response::new(body);
                *answer.status_mut() = status;
                Ok(answer)
            }
            Err(error) => {
                // Not its whole text: the address may have a password in it.
                self.tell(Some(&error.without_url().to_string()));
                Err("the collector can't be reached".into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samplers_go_by_the_names_of_the_specification() {
        for name in [
            "always_on",
            "always_off",
            "traceidratio",
            "parentbased_always_on",
            "parentbased_always_off",
            "parentbased_traceidratio",
        ] {
            assert!(sampler(Some(name), Some("0.25")).is_ok(), "{name}");
        }
        assert!(matches!(sampler(None, None), Ok(Sampler::ParentBased(_))));
        for (name, argument) in [("sometimes", "1"), ("traceidratio", "2"), ("traceidratio", "much")] {
            let wrong = sampler(Some(name), Some(argument)).expect_err("no sampler").to_string();
            assert!(wrong.starts_with("OTEL_TRACES_SAMPLER"), "{wrong}");
        }
    }
}
