//! Where runs stand in traces, and what a collector hears of their attempts.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::IntoResponse as _;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::process::{Process, SHORT_LEASE};
use crate::support::replica::{Answer, Client, Replica};
use crate::support::target::Target;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{SPAN}-{flags}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a span's `traceparent` was, as far as ids go.
fn ids(span: &Span) -> String {
    format!("00-{}-{}", hex(&span.trace_id), hex(&span.span_id))
}

fn attribute(span: &Span, name: &str) -> String {
    let found = span.attributes.iter().find(|one| one.key == name).and_then(|one| one.value.clone()?.value);
    match found {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        other => panic!("{name}: {other:?} in {span:?}"),
    }
}

/// What a collector was sent.
#[derive(Clone, Default)]
struct Sent {
    spans: Arc<Mutex<Vec<Span>>>,
    services: Arc<Mutex<Vec<String>>>,
}

/// A collector of OpenTelemetry, until it is dropped.
struct Collector {
    url: String,
    sent: Sent,
    _server: JoinSet<()>,
}

impl Collector {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let sent = Sent::default();
        let take = async |State(sent): State<Sent>, body: Bytes| {
            for group in ExportTraceServiceRequest::decode(body).unwrap().resource_spans {
                let named = group.resource.unwrap().attributes.into_iter().filter(|one| one.key == "service.name");
                for value in named.filter_map(|attribute| attribute.value?.value) {
                    let any_value::Value::StringValue(name) = value else { panic!("{value:?}") };
                    sent.services.lock().unwrap().push(name);
                }
                sent.spans.lock().unwrap().extend(group.scope_spans.into_iter().flat_map(|scope| scope.spans));
            }
        };
        let routes = Router::new().route("/v1/traces", post(take)).with_state(sent.clone());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self { url, sent, _server: server }
    }

    /// A replica that sends its spans here, soon.
    fn serve(&self, test: &TestDb) -> Process {
        let traced = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", self.url.as_str()),
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
            ("SINGLETRACK_HTTP_ALLOW", "127.0.0.0/8"),
        ];
        Process::serve(&test.url, &[SHORT_LEASE, &traced].concat())
    }

    /// The spans of a run, in the order of its attempts, once there are so many.
    async fn spans(&self, run_id: Uuid, count: usize) -> Vec<Span> {
        eventually("the spans are there", LIMIT, async || {
            let mut spans = self.sent.spans.lock().unwrap().clone();
            spans.retain(|span| attribute(span, "singletrack.run.id") == run_id.to_string());
            spans.sort_by_key(|span| attribute(span, "singletrack.attempt"));
            (spans.len() >= count).then_some(spans)
        })
        .await
    }
}

async fn enqueue(client: &Client, workflow: &str, traceparent: &str) -> Answer {
    let path = format!("/api/v1/workflows/{workflow}/runs");
    Answer::of(client.request(Method::POST, &path).header("traceparent", traceparent).json(&json!({}))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_attempt_continues_the_trace_and_a_retry_begins_one_that_links_to_it() {
    let (test, collector) = (TestDb::new().await, Collector::new().await);
    let replica = collector.serve(&test);
    let script = "echo $TRACEPARENT; exit $((2 - SINGLETRACK_ATTEMPT))";
    let retry = json!({"initial_seconds": 0, "jitter": 0});
    let executor = json!({"type": "command", "argv": ["sh", "-c", script]});
    let body = json!({"executor": executor, "max_attempts": 2, "backoff": retry});
    let defined = replica.client.put("/api/v1/workflows/w", body).await;
    assert_eq!(defined.status, 201, "{defined:?}");
    let run = enqueue(&replica.client, "w@a", &traceparent("01")).await;
    assert_eq!((run.status, run.body["traceparent"].as_str()), (202, Some(&*traceparent("01"))), "{run:?}");
    let id = run.run_id();
    assert_eq!(replica.client.finished(id).await["status"], "succeeded");
    let log = replica.client.log(id).await;
    let told: Vec<&str> = log.lines().collect();

    let spans = collector.spans(id, 2).await;
    let [first, second] = &spans[..] else { panic!("{spans:?}") };
    assert_eq!(told, [format!("{}-01", ids(first)), format!("{}-01", ids(second))]);
    assert_eq!((&*hex(&first.trace_id), &*hex(&first.parent_span_id), first.links.len()), (TRACE, SPAN, 0));
    assert_ne!(hex(&second.trace_id), TRACE);
    let [link] = &second.links[..] else { panic!("{second:?}") };
    assert_eq!((&*hex(&link.trace_id), &*hex(&link.span_id), &*second.parent_span_id), (TRACE, SPAN, &[][..]));
    for (span, attempt, outcome) in [(first, "1", "failed"), (second, "2", "succeeded")] {
        assert_eq!(span.name, "attempt w");
        assert_eq!(attribute(span, "singletrack.workflow.id"), "w@a");
        assert_eq!(
            (attribute(span, "singletrack.attempt"), attribute(span, "singletrack.outcome")),
            (attempt.into(), outcome.into())
        );
        assert_eq!(span.status.as_ref().unwrap().code, if outcome == "failed" { 2 } else { 1 });
        assert!(span.start_time_unix_nano < span.end_time_unix_nano);
    }
    assert_eq!(attribute(first, "error.type"), "failed");
    assert!(collector.sent.services.lock().unwrap().iter().all(|name| name == "singletrack"));
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_workers_and_http_targets_get_the_context_of_their_attempt() {
    let (test, collector) = (TestDb::new().await, Collector::new().await);
    let replica = collector.serve(&test);
    let other = collector.serve(&test);
    replica.client.define_pull("p", json!({})).await;
    let id = enqueue(&replica.client, "p", &traceparent("01")).await.run_id();
    let claimed = replica.client.claim(json!({})).await;
    // Another replica than that which handed it out.
    let token = claimed[0]["lease"]["token"].as_str().unwrap();
    assert_eq!(other.client.end(token, "failed").await, ("ok".into(), "failed".into()));
    let spans = collector.spans(id, 1).await;
    assert_eq!(claimed[0]["traceparent"], format!("{}-01", ids(&spans[0])));
    assert_eq!((&*hex(&spans[0].trace_id), &*hex(&spans[0].parent_span_id)), (TRACE, SPAN));
    assert_eq!(attribute(&spans[0], "singletrack.outcome"), "failed");

    let target = Target::new(async |_, _| "done".into_response()).await;
    target.define(&replica.client, "h", json!({})).await;
    let id = enqueue(&replica.client, "h", &traceparent("01")).await.run_id();
    let call = target.call(0).await;
    let spans = collector.spans(id, 1).await;
    assert_eq!(call.header("traceparent"), format!("{}-01", ids(&spans[0])));
    assert_eq!(attribute(&spans[0], "singletrack.executor"), "http");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_to_be_recorded_is_not_sent_and_what_is_ill_formed_is_ignored() {
    let (test, collector) = (TestDb::new().await, Collector::new().await);
    let replica = collector.serve(&test);
    replica.client.define("w", "echo $TRACEPARENT").await;
    let unsampled = enqueue(&replica.client, "w", &traceparent("00")).await.run_id();
    replica.client.finished(unsampled).await;
    let told = replica.client.log(unsampled).await;
    assert!(told.starts_with(&format!("00-{TRACE}-")) && told.ends_with("-00\n"), "{told}");
    let ill_formed = enqueue(&replica.client, "w", "00-none").await;
    assert_eq!((ill_formed.status, &ill_formed.body["traceparent"]), (202, &Value::Null));
    let span = &collector.spans(ill_formed.run_id(), 1).await[0];
    assert!(span.parent_span_id.is_empty() && span.links.is_empty(), "{span:?}");
    let sent = collector.sent.spans.lock().unwrap().clone();
    assert!(sent.iter().all(|span| attribute(span, "singletrack.run.id") != unsampled.to_string()), "{sent:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_runs_go_on_and_a_stop_waits_for_nobody() {
    let test = TestDb::new().await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let away = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "50")];
    let mut replica = Process::serve(&test.url, &[SHORT_LEASE, &away].concat());
    replica.client.define("w", "true").await;
    for _ in 0..3 {
        let id = replica.client.enqueue("w").await.run_id();
        assert_eq!(replica.client.finished(id).await["status"], "succeeded");
    }
    replica.line("spans can't be sent; they are lost until they can");
    replica.signal(Signal::TERM);
    let ended = tokio::task::spawn_blocking(move || (replica.child.wait().unwrap(), replica));
    let (ended, replica) = tokio::time::timeout(LIMIT, ended).await.expect("it ends").unwrap();
    assert!(ended.success(), "{ended}");
    assert!(!replica.rest().contains("spans can't be sent"), "it says so once");
}

#[tokio::test(flavor = "multi_thread")]
async fn however_a_run_is_enqueued_its_own_context_stays_with_it_and_is_handed_on_also_where_nobody_sends_spans() {
    let test = TestDb::new().await;
    let replica = Replica::api_only(&test).await;
    replica.client.define_pull("w", json!({"on_conflict": "wait"})).await;
    let of = |span: u8| format!("00-{TRACE}-{span:016x}-01");
    let mut ids = Vec::new();
    // The first has the slot, the others are looked at closely.
    for span in [1, 2] {
        ids.push(enqueue(&replica.client, "w", &of(span)).await.run_id());
    }
    let entry = |key: &str| json!({"workflow_id": "w", "idempotency_key": key});
    let batch = replica.client.request(Method::POST, "/api/v1/runs/batch").header("traceparent", of(3));
    let batch = Answer::of(batch.json(&json!({"runs": [entry("a"), entry("b")]}))).await.unwrap();
    for result in batch.body["results"].as_array().unwrap() {
        ids.push(result["run"]["id"].as_str().unwrap().parse().unwrap());
    }
    let by_hand = "select run_id from set_config('singletrack.traceparent', $1, true), lateral enqueue_run('w')";
    ids.push(sqlx::query_scalar(by_hand).bind(of(4)).fetch_one(&test.sql).await.unwrap());
    ids.push(replica.client.enqueue("w").await.run_id());
    for (id, expected) in ids.iter().zip([Some(1), Some(2), Some(3), Some(3), Some(4), None]) {
        let run = replica.client.get(&format!("/api/v1/runs/{id}")).await.body;
        assert_eq!(run["traceparent"].as_str().map(ToOwned::to_owned), expected.map(of), "{run}");
    }
    let claimed = replica.client.claim(json!({})).await;
    assert_eq!(claimed[0]["traceparent"], of(1));
    replica.client.end(claimed[0]["lease"]["token"].as_str().unwrap(), "succeeded").await;
    let again =
        replica.client.request(Method::POST, &format!("/api/v1/runs/{}/rerun", ids[0])).header("traceparent", of(5));
    assert_eq!(Answer::of(again).await.unwrap().body["traceparent"], of(5));
}
