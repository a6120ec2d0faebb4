//! A client: it asks for runs, many in one request, one by one or many at once, hangs up, asks again, cancels; and writes down what it was told.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, IteratorRandom as _, SliceRandom as _};
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use tokio::time::{interval, sleep};
use uuid::Uuid;

use super::command::Work;
use super::http::Replicas;
use super::journal::{Entry, Journal};
use super::workflows::Workflows;

/// How long it waits for an answer when it is patient.
const LIMIT: Duration = Duration::from_secs(8);
/// How many requests it has under way at most.
const AT_ONCE: usize = 160;
/// Of how many a storm consists: of those who ask for few workflows, and of those who each have their own. They are sent together, and many
/// have one answer.
const STORM: [usize; 2] = [60, 30];

/// What a client is to do.
pub struct Task {
    pub name: String,
    pub seed: u64,
    /// Runs asked for per second.
    pub rate: f64,
    pub replicas: Replicas,
    pub workflows: Workflows,
    pub journal: Journal,
}

/// One request for a run.
#[derive(Clone)]
struct Request {
    id: String,
    workflow: String,
    body: Value,
    keyed: bool,
}

/// Asks until the file `stop` is there, and then until nothing is open any more.
pub async fn main(task: Task, stop: &Path) {
    let mut rng = StdRng::seed_from_u64(task.seed);
    let runs = Mutex::new(VecDeque::new());
    let client = &*Box::leak(Box::new(Client { task, runs, under_way: tokio::sync::Semaphore::new(AT_ONCE) }));
    let batch = (client.task.rate / 8.0).clamp(2.0, 40.0) as usize;
    // A round is one batch, and three requests one by one.
    let mut rounds = interval(Duration::from_secs_f64((batch + 3) as f64 / client.task.rate));
    let mut count = 0;
    while !stop.exists() {
        rounds.tick().await;
        let mut next = |rng: &mut StdRng, workflow: &str| {
            count += 1;
            client.request(rng, count, workflow)
        };
        let many: Vec<Request> =
            client.task.workflows.sample_many(&mut rng, batch).iter().map(|id| next(&mut rng, id)).collect();
        let command = client.task.workflows.commands.choose(&mut rng).expect("one").clone();
        let contended = client.task.workflows.contended.choose(&mut rng).expect("one").clone();
        let mut single = vec![next(&mut rng, &command), next(&mut rng, &contended), next(&mut rng, &contended)];
        // Somebody who does not wait for the answer.
        let limit = if rng.random_bool(0.05) { Duration::from_millis(rng.random_range(1..40)) } else { LIMIT };
        let slot = client.under_way.acquire().await.expect("it is never closed");
        tokio::spawn(async move {
            client.ask_many(many, limit).await;
            drop(slot);
        });
        while let Some(request) = single.pop() {
            let slot = client.under_way.acquire().await.expect("it is never closed");
            tokio::spawn(async move {
                client.ask(request, limit).await;
                drop(slot);
            });
        }
        if rng.random_bool(0.2) {
            tokio::spawn(client.cancel());
        }
        if rng.random_bool(0.04) {
            let storm = client.storm(&mut rng, &mut count);
            let slots = client.under_way.acquire_many(storm.len() as u32).await.expect("it is never closed");
            tokio::spawn(async move {
                client.ask_at_once(storm).await;
                drop(slots);
            });
        }
    }
    // Everything is answered, or given up, then.
    let _ = client.under_way.acquire_many(AT_ONCE as u32).await;
}

struct Client {
    task: Task,
    /// Some that were accepted lately.
    runs: Mutex<VecDeque<Uuid>>,
    under_way: tokio::sync::Semaphore,
}

impl Client {
    fn request(&self, rng: &mut StdRng, count: usize, workflow: &str) -> Request {
        let id = format!("{}-{count}", self.task.name);
        let command = self.task.workflows.is_command(workflow);
        let work = Work {
            ms: match (command, rng.random_range(0..100)) {
                (true, 0..3) | (false, 0) => 6_000,
                (_, 0..12) => rng.random_range(500..2_500),
                (true, _) => rng.random_range(20..200),
                (false, _) => rng.random_range(0..30),
            },
            fail: rng.random_bool(0.03),
            stray: command && rng.random_bool(0.3),
            stubborn: command && rng.random_bool(0.2),
        };
        let mut body = json!({"input": work, "labels": {"request": id}});
        let policies = ["reject", "reject", "reject", "return_existing", "wait", "replace"];
        if rng.random_bool(0.5) {
            body["on_conflict"] = json!(policies.choose(rng).expect("one"));
        }
        if rng.random_bool(0.03) {
            body["delay_seconds"] = json!(rng.random_range(0.1..3.0));
        }
        Request { id, workflow: workflow.to_owned(), body, keyed: rng.random_bool(0.5) }
    }

    /// Requests that one statement can decide, without a key, most of them for three workflows.
    fn storm(&self, rng: &mut StdRng, count: &mut usize) -> Vec<Request> {
        let [few, many] = STORM;
        let contended: Vec<String> = self.task.workflows.contended.iter().cloned().sample(rng, 3);
        let mut workflows: Vec<String> = (0..few).filter_map(|_| contended.choose(rng).cloned()).collect();
        workflows.extend(self.task.workflows.sample_many(rng, many));
        workflows.shuffle(rng);
        let mut plain = |workflow: &String| {
            *count += 1;
            let mut request = self.request(rng, *count, workflow);
            request.body["on_conflict"] = json!(["reject", "return_existing"].choose(rng).expect("one"));
            request.body.as_object_mut().expect("an object").remove("delay_seconds");
            Request { keyed: false, ..request }
        };
        workflows.iter().map(&mut plain).collect()
    }

    fn sent(&self, requests: &[Request], limit: Duration) {
        self.task.journal.write_durably(requests.iter().map(|request| Entry::Sent {
            request: request.id.clone(),
            workflow: request.workflow.clone(),
            keyed: request.keyed,
            patient: limit == LIMIT,
        }));
    }

    /// One by one, all at the same time and of the same replica.
    async fn ask_at_once(&self, requests: Vec<Request>) {
        let replica = &self.task.replicas.one();
        self.sent(&requests, LIMIT);
        let asking = requests.iter().map(|request| async move {
            let told = self.post(replica, request, LIMIT).await;
            // Not synced: the others are not to wait for it.
            self.task.journal.write([told]);
        });
        join_all(asking).await;
    }

    async fn ask_many(&self, mut requests: Vec<Request>, mut limit: Duration) {
        for _ in 0..6 {
            self.sent(&requests, limit);
            let entry = |request: &Request| {
                let mut entry = request.body.clone();
                entry["workflow_id"] = json!(request.workflow);
                if request.keyed {
                    entry["idempotency_key"] = json!(request.id);
                }
                entry
            };
            let runs: Vec<Value> = requests.iter().map(entry).collect();
            let answer = self.task.replicas.post("/runs/batch", &json!({"runs": runs}), None, limit).await;
            match answer {
                Some((200, answer)) => {
                    let results = answer["results"].as_array().expect("an answer for each");
                    let told = requests.iter().zip(results).map(|(request, result)| {
                        let about = if result["run"].is_null() { &result["problem"] } else { &result["run"] };
                        self.told(request, result["status"].as_u64().expect("a status") as u16, about)
                    });
                    let told: Vec<Entry> = told.collect();
                    self.task.journal.write_durably(told.iter().cloned());
                    let mut told = told.iter();
                    requests.retain(|request| matches!(told.next(), Some(Entry::Unknown { .. })) && request.keyed);
                }
                Some((status @ (400..500), answer)) => panic!("a batch was refused: {status} {answer}"),
                _ => {
                    let unknown = |request: &Request| Entry::Unknown { request: request.id.clone() };
                    self.task.journal.write_durably(requests.iter().map(unknown));
                    requests.retain(|request| request.keyed);
                }
            }
            if requests.is_empty() {
                return;
            }
            limit = LIMIT;
            sleep(Duration::from_millis(300)).await;
        }
    }

    async fn ask(&self, request: Request, mut limit: Duration) {
        let patience = Instant::now();
        loop {
            self.sent(std::slice::from_ref(&request), limit);
            let told = self.post(&self.task.replicas, &request, limit).await;
            self.task.journal.write_durably([told.clone()]);
            if !matches!(told, Entry::Unknown { .. }) || !request.keyed || patience.elapsed() > LIMIT * 3 {
                return;
            }
            limit = LIMIT;
            sleep(Duration::from_millis(300)).await;
        }
    }

    /// Sends a request by itself, once; what is said about it.
    async fn post(&self, replicas: &Replicas, request: &Request, limit: Duration) -> Entry {
        let path = format!("/workflows/{}/runs", request.workflow);
        let key = request.keyed.then_some(&*request.id);
        match replicas.post(&path, &request.body, key, limit).await {
            Some((status, answer)) => self.told(request, status, &answer),
            None => Entry::Unknown { request: request.id.clone() },
        }
    }

    /// What an answer says about a request.
    fn told(&self, request: &Request, status: u16, about: &Value) -> Entry {
        let id = about["run_id"].as_str().or(about["id"].as_str()).and_then(|id| id.parse().ok());
        let cause = about["type"].as_str().and_then(|cause| cause.strip_prefix("urn:singletrack:problem:"));
        match (status, id) {
            (202, Some(id)) => {
                let mut runs = self.runs.lock().expect("nobody panics here");
                runs.push_back(id);
                if runs.len() > 30 {
                    runs.pop_front();
                }
            }
            (409, _) if cause == Some("idempotency-in-flight") => {
                return Entry::Unknown { request: request.id.clone() };
            }
            (200 | 409, _) | (429, _) | (503, None) => {}
            // It says itself that it does not know.
            (503, Some(_)) => return Entry::Unknown { request: request.id.clone() },
            (status, _) => panic!("{status} {about} for {}", request.body),
        }
        Entry::Answered { request: request.id.clone(), status, cause: cause.map(str::to_owned), run: id }
    }

    async fn cancel(&self) {
        let run = self.runs.lock().expect("nobody panics here").iter().copied().next_back();
        if let Some(run) = run {
            let _ = self.task.replicas.post(&format!("/runs/{run}/cancel"), &json!({}), None, LIMIT).await;
        }
    }
}
