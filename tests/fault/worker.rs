//! A pull worker, as one would write it: it claims in batches, confirms, sends heartbeats, and stops what it has lost. When it is frozen
//! and wakes up it says what it had to say, as a zombie does.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::sleep;
use uuid::Uuid;

use super::command::Work;
use super::http::Replicas;
use super::journal::{Entry, Journal};

/// What it holds at most.
const CAPACITY: usize = 60;
/// How long it goes on without a heartbeat that was answered: less than the lease.
const PATIENCE: Duration = Duration::from_millis(3500);
/// How likely it gives back what it has begun.
const GIVEN_BACK: f64 = 0.02;
/// How long one request may take.
const LIMIT: Duration = Duration::from_secs(2);

struct Worker {
    name: String,
    replicas: Replicas,
    journal: Journal,
    held: Mutex<HashMap<String, Held>>,
    /// What is to be said about the end of claims: token and body.
    ends: Mutex<Vec<(String, i64, Value)>>,
    said: Notify,
}

struct Held {
    good: Instant,
    confirmed: bool,
    cancel: bool,
}

pub async fn main(name: String, replicas: Replicas, journal: Journal) {
    let worker = Arc::new(Worker {
        name,
        replicas,
        journal,
        held: Mutex::default(),
        ends: Mutex::default(),
        said: Notify::new(),
    });
    tokio::join!(worker.clone().claim(), worker.clone().keep(), worker.finish());
}

impl Worker {
    fn held(&self) -> std::sync::MutexGuard<'_, HashMap<String, Held>> {
        self.held.lock().expect("nobody panics here")
    }

    async fn claim(self: Arc<Self>) {
        let mut seen = HashSet::new();
        loop {
            let room = CAPACITY.saturating_sub(self.held().len());
            if room < 10 {
                sleep(Duration::from_millis(5)).await;
                continue;
            }
            let body = json!({"worker": self.name, "claim_id": Uuid::new_v4(), "max": room, "wait_seconds": 1});
            let sent = Instant::now();
            let Some(runs) = self.claimed(&body).await else { continue };
            // Given by another claim before: then it was started twice, and the account says so.
            for run in runs.iter().filter(|run| !seen.insert(run["fence"].as_i64())) {
                self.journal.write([start(run, &self.name)]);
            }
            let new = &runs;
            for run in new {
                self.held().insert(token(run), Held { good: sent, confirmed: false, cancel: false });
            }
            // The first heartbeat comes before any work.
            let tokens: Vec<String> = new.iter().map(token).collect();
            if !tokens.is_empty() {
                self.beat(&tokens).await;
            }
            for run in new {
                tokio::spawn(self.clone().work(run.clone()));
            }
        }
    }

    /// Repeats one claim until it is answered, but not for ever.
    async fn claimed(&self, body: &Value) -> Option<Vec<Value>> {
        for _ in 0..4 {
            match self.replicas.post("/claims", body, None, LIMIT + Duration::from_secs(1)).await {
                Some((200, answer)) => return answer["runs"].as_array().cloned(),
                Some((400..500, answer)) => panic!("a claim was refused: {answer}"),
                _ => sleep(Duration::from_millis(100)).await,
            }
        }
        None
    }

    async fn work(self: Arc<Self>, run: Value) {
        let (token, fence) = (token(&run), run["fence"].as_i64().expect("a fence"));
        loop {
            match self.held().get(&token) {
                None => return,
                Some(held) if held.confirmed => break,
                Some(_) => {}
            }
            sleep(Duration::from_millis(200)).await;
            self.beat(std::slice::from_ref(&token)).await;
        }
        self.journal.write([start(&run, &self.name)]);
        let work = Work::of(&run["input"]);
        let begun = Instant::now();
        let mut outcome = if work.fail { "failed" } else { "succeeded" };
        while begun.elapsed() < Duration::from_millis(work.ms) {
            sleep(Duration::from_millis(work.ms.min(50))).await;
            match self.held().get(&token) {
                // Lost: a good worker says nothing more. This one says how it ended, for that must not matter to anybody.
                None => break,
                Some(held) if held.cancel => {
                    outcome = "cancelled";
                    break;
                }
                Some(_) => {}
            }
        }
        self.journal.write([Entry::End { fence }]);
        if outcome != "cancelled" && rand::random_bool(GIVEN_BACK) && self.give_back(&token).await {
            return;
        }
        let end = json!({"token": token, "outcome": outcome, "output": {"fence": fence}});
        self.ends.lock().expect("nobody panics here").push((token, fence, end));
        self.said.notify_one();
    }

    /// Gives a run back although it is done, as one that has to leave would. Whether that was heard: if not, its end is said.
    async fn give_back(&self, token: &str) -> bool {
        let leases = json!({"leases": [{"token": token}]});
        let answer = self.replicas.post("/leases/release", &leases, None, LIMIT).await;
        let heard = matches!(&answer, Some((200, answer)) if answer["leases"][0]["result"] != "busy");
        if heard {
            self.held().remove(token);
        }
        heard
    }

    /// Sends heartbeats, and keeps what is said about them.
    async fn beat(&self, tokens: &[String]) {
        let sent = Instant::now();
        let leases: Vec<Value> = tokens.iter().map(|token| json!({"token": token})).collect();
        let answer = self.replicas.post("/leases/heartbeat", &json!({"leases": leases}), None, LIMIT).await;
        let Some((200, answer)) = answer else { return };
        let mut held = self.held();
        let answers = answer["leases"].as_array().expect("an answer for each");
        for (token, answer) in tokens.iter().zip(answers) {
            match answer["result"].as_str() {
                Some("lost") => drop(held.remove(token)),
                Some(result @ ("ok" | "cancel_requested")) => {
                    if let Some(held) = held.get_mut(token) {
                        held.good = sent;
                        held.confirmed = true;
                        held.cancel |= result == "cancel_requested";
                    }
                }
                _ => {}
            }
        }
    }

    async fn keep(self: Arc<Self>) {
        loop {
            sleep(Duration::from_millis(500)).await;
            self.held().retain(|_, held| held.good.elapsed() < PATIENCE);
            let tokens: Vec<String> = self.held().keys().cloned().collect();
            if !tokens.is_empty() {
                self.beat(&tokens).await;
            }
        }
    }

    /// Says how claims ended, all that ended meanwhile in one request, until it is answered: also when they may be lost.
    async fn finish(&self) {
        loop {
            self.said.notified().await;
            let mut ends = std::mem::take(&mut *self.ends.lock().expect("nobody panics here"));
            let outcome = |end: &Value| end["outcome"].as_str().unwrap_or_default().to_owned();
            self.journal
                .write(ends.iter().map(|(_, fence, end)| Entry::Finishing { fence: *fence, outcome: outcome(end) }));
            while !ends.is_empty() {
                let leases: Vec<&Value> = ends.iter().map(|(_, _, end)| end).collect();
                let answer = match self.replicas.post("/leases/finish", &json!({"leases": leases}), None, LIMIT).await {
                    Some((200, answer)) => answer,
                    Some((status @ 400..500, answer)) => panic!("an end was refused: {status} {answer}"),
                    _ => {
                        sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                };
                let mut answers = answer["leases"].as_array().expect("an answer for each").iter();
                ends.retain(|(token, fence, _)| {
                    let result = answers.next().and_then(|answer| answer["result"].as_str()).expect("a result");
                    if result != "busy" {
                        self.journal.write([Entry::Finished { fence: *fence, result: result.to_owned() }]);
                        self.held().remove(token);
                    }
                    result == "busy"
                });
            }
        }
    }
}

fn start(run: &Value, by: &str) -> Entry {
    Entry::Start {
        fence: run["fence"].as_i64().expect("a fence"),
        run: run["id"].as_str().and_then(|id| id.parse().ok()).expect("an id"),
        workflow: run["workflow_id"].as_str().expect("a workflow").to_owned(),
        by: by.to_owned(),
    }
}

fn token(run: &Value) -> String {
    run["lease"]["token"].as_str().expect("a token").to_owned()
}
