//! Attempts as spans of OpenTelemetry, sent over OTLP (HTTP, protobuf) where `OTEL_EXPORTER_OTLP_ENDPOINT` says where to. Whoever runs an
//! attempt tells of its end here; without an endpoint that does nothing.
//!
//! The ids of an attempt's span follow from its run and fence: every replica knows them, so that one can hand out what another one
//! will send. The first attempt is a child of what enqueued the run. Each later one is a trace of its own, which links there: a trace
//! that goes on for a day of retries is of no use to anybody.

mod export;

use std::sync::OnceLock;
use std::time::SystemTime;

use opentelemetry::KeyValue;
use opentelemetry::trace::{
    Link, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState,
};
use opentelemetry_sdk::trace::{
    BatchSpanProcessor, Sampler, SamplingDecision, ShouldSample as _, SpanData, SpanLinks, SpanProcessor as _,
};
use sha2::{Digest as _, Sha256};

pub use export::{Sending, install};

use crate::domain::{self, Outcome, Run, TraceContext};

/// What sends spans, where it was asked for.
static TRACES: OnceLock<Traces> = OnceLock::new();

#[derive(Debug)]
struct Traces {
    processor: BatchSpanProcessor,
    sampler: Sampler,
}

/// What whoever carries out the attempt of `run` continues: its `traceparent`.
pub fn hand_on(run: &Run) -> Option<String> {
    match Attempt::of(run) {
        Some(attempt) => Some(attempt.context.to_string()),
        // Nobody sends spans here: those of others find each other all the same.
        None => enqueued(run).map(|context| context.to_string()),
    }
}

fn enqueued(run: &Run) -> Option<TraceContext> {
    run.traceparent.as_deref()?.parse().ok()
}

/// An attempt, as a span that may be sent when it is over.
pub struct Attempt {
    traces: &'static Traces,
    context: TraceContext,
    parent: Option<TraceContext>,
    link: Option<TraceContext>,
    name: String,
    attributes: Vec<KeyValue>,
}

/// How an attempt ended.
#[derive(Debug)]
pub struct End<'a> {
    started: SystemTime,
    outcome: &'static str,
    reason: Option<&'a str>,
    error: Option<&'a str>,
}

impl<'a> End<'a> {
    /// That of an attempt that began at `started`; `status` is what the run is now.
    pub fn of(started: SystemTime, outcome: &'a Outcome, status: domain::Status) -> Self {
        // Where another attempt is to follow, the run has no end yet.
        let status = if status.is_final() { status } else { outcome.verdict.status() };
        let Outcome { reason, error, .. } = outcome;
        Self { started, outcome: status.as_str(), reason: reason.as_deref(), error: error.as_deref() }
    }
}

impl Attempt {
    /// The attempt that `run` is at, as it was claimed; `None` where nobody wants spans.
    pub fn of(run: &Run) -> Option<Self> {
        let traces = TRACES.get()?;
        let enqueued = enqueued(run);
        let [parent, link] = if run.attempt == 1 { [enqueued, None] } else { [None, enqueued] };
        let hash = Sha256::digest(format!("{}:{}", run.id, run.fence));
        let number = |from: usize, to: usize| hash[from..to].iter().fold(0, |id, byte| id << 8 | u128::from(*byte));
        // No hash of this is 0 in practice, which is no id.
        let trace_id = parent.map_or_else(|| number(0, 16).max(1), |parent| parent.trace_id);
        let span_id = (number(16, 24) as u64).max(1);
        let name = format!("attempt {}", run.definition);
        let flags = u8::from(traces.wants(parent, trace_id, &name));
        let attributes = vec![
            KeyValue::new("singletrack.run.id", run.id.to_string()),
            KeyValue::new("singletrack.workflow.id", run.workflow_id.clone()),
            KeyValue::new("singletrack.executor", run.executor_type.clone()),
            KeyValue::new("singletrack.queue", run.queue.clone()),
            KeyValue::new("singletrack.attempt", i64::from(run.attempt)),
            KeyValue::new("singletrack.fence", run.fence),
        ];
        Some(Self { traces, context: TraceContext { trace_id, span_id, flags }, parent, link, name, attributes })
    }

    /// It is over, now. It waits for nothing: beyond some thousand spans that are not sent yet they are dropped.
    pub fn end(self, end: &End<'_>) {
        if self.context.flags & 1 == 0 {
            return;
        }
        let mut attributes = self.attributes;
        attributes.push(KeyValue::new("singletrack.outcome", end.outcome));
        attributes.extend(end.reason.map(|reason| KeyValue::new("singletrack.reason", reason.to_owned())));
        let status = match end.outcome {
            "succeeded" => Status::Ok,
            outcome => {
                let error_type = end.reason.unwrap_or(outcome).to_owned();
                attributes.push(KeyValue::new("error.type", error_type.clone()));
                Status::error(end.error.map_or(error_type, ToOwned::to_owned))
            }
        };
        let mut links = SpanLinks::default();
        links.links.extend(self.link.map(|link| Link::new(span_context(link, true), Vec::new(), 0)));
        self.traces.processor.on_end(SpanData {
            span_context: span_context(self.context, false),
            parent_span_id: self.parent.map_or(SpanId::INVALID, |parent| SpanId::from(parent.span_id)),
            parent_span_is_remote: self.parent.is_some(),
            span_kind: SpanKind::Consumer,
            name: self.name.into(),
            start_time: end.started,
            end_time: SystemTime::now().max(end.started),
            attributes,
            dropped_attributes_count: 0,
            events: Default::default(),
            links,
            status,
            instrumentation_scope: export::scope(),
        });
    }
}

impl Traces {
    fn wants(&self, parent: Option<TraceContext>, trace_id: u128, name: &str) -> bool {
        let parent =
            parent.map(|parent| opentelemetry::Context::new().with_remote_span_context(span_context(parent, true)));
        let trace_id = TraceId::from(trace_id);
        let said = self.sampler.should_sample(parent.as_ref(), trace_id, name, &SpanKind::Consumer, &[], &[]);
        said.decision == SamplingDecision::RecordAndSample
    }
}

fn span_context(context: TraceContext, is_remote: bool) -> SpanContext {
    let (trace_id, span_id) = (TraceId::from(context.trace_id), SpanId::from(context.span_id));
    SpanContext::new(trace_id, span_id, TraceFlags::new(context.flags), is_remote, TraceState::default())
}
