//! A pull worker's side of the API: a test states only what it is about.

use serde_json::{Value, json};
use uuid::Uuid;

use super::replica::{Answer, Client};

impl Client {
    /// Defines a workflow whose runs are claimed over HTTP, with `more` of the definition.
    pub async fn define_pull(&self, id: &str, more: Value) {
        let mut body = more;
        body["executor"] = json!({"type": "pull"});
        let answer = self.put(&format!("/api/v1/workflows/{id}"), body).await;
        assert!(matches!(answer.status, 200 | 201), "{answer:?}");
    }

    /// Enqueues a run of a workflow, which is defined first where it is not.
    pub async fn enqueue_pull(&self, id: &str) -> Uuid {
        self.define_pull(id, json!({})).await;
        self.enqueue(id).await.run_id()
    }

    /// Claims runs as worker `w`, or as `more` says.
    pub async fn claim(&self, more: Value) -> Vec<Value> {
        let answer = self.post("/api/v1/claims", claim_body(more)).await;
        assert_eq!((answer.status, answer.names()), (200, vec!["runs"]), "{answer:?}");
        answer.body["runs"].as_array().unwrap().clone()
    }

    /// Claims the one run that is due; its token.
    pub async fn claim_one(&self) -> String {
        let runs = self.claim(json!({"max": 10})).await;
        assert_eq!(runs.len(), 1, "{runs:?}");
        token(&runs[0])
    }

    /// Enqueues a run of a workflow, defined anew, and claims it; its id and its token.
    pub async fn working(&self, id: &str) -> (Uuid, String) {
        self.define_pull(id, json!({})).await;
        self.working_on(id).await
    }

    /// The same of a workflow as it is defined.
    pub async fn working_on(&self, id: &str) -> (Uuid, String) {
        let run_id = self.enqueue(id).await.run_id();
        let runs = self.claim(json!({"workflows": [id]})).await;
        assert_eq!(ids(&runs), [run_id]);
        (run_id, token(&runs[0]))
    }

    /// Says something of several leases to `/leases/{call}`.
    pub async fn say(&self, call: &str, leases: Value) -> Answer {
        self.post(&format!("/api/v1/leases/{call}"), json!({"leases": leases})).await
    }

    /// Says something of one lease to `/leases/{call}`; the answer about it.
    pub async fn say_one(&self, call: &str, token: &str, more: Value) -> Value {
        let mut entry = more;
        entry["token"] = json!(token);
        let answer = self.say(call, json!([entry])).await;
        assert_eq!((answer.status, answer.names()), (200, vec!["leases"]), "{answer:?}");
        let leases = answer.body["leases"].as_array().unwrap();
        assert_eq!(leases.len(), 1, "{leases:?}");
        leases[0].clone()
    }

    /// Sends a heartbeat; the answer.
    pub async fn beat(&self, token: &str) -> Value {
        self.say_one("heartbeat", token, json!({})).await
    }

    /// Finishes a run; the result, and the run's status.
    pub async fn end(&self, token: &str, outcome: &str) -> (String, String) {
        let answer = self.say_one("finish", token, json!({"outcome": outcome})).await;
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        (text(&answer["result"]), text(&answer["run"]["status"]))
    }

    /// Sends a piece of log.
    pub async fn print(&self, token: &str, stream: &str, seq: i64, text: &str) -> Answer {
        let piece = json!({"token": token, "stream": stream, "seq": seq, "text": text});
        self.post("/api/v1/leases/logs", piece).await
    }
}

/// A claim as worker `w`, with `more` in its body.
pub fn claim_body(more: Value) -> Value {
    let mut body = more;
    if body.get("worker").is_none() {
        body["worker"] = json!("w");
    }
    body
}

/// The ids of runs.
pub fn ids(runs: &[Value]) -> Vec<Uuid> {
    runs.iter().map(|run| run["id"].as_str().unwrap().parse().unwrap()).collect()
}

/// The token of a claimed run.
pub fn token(run: &Value) -> String {
    run["lease"]["token"].as_str().unwrap().to_owned()
}
