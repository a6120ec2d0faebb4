//! What workers do.

use serde_json::json;
use singletrack::domain::{Lease, Status, Verdict};
use singletrack::store::claim::{Claim, Renewal, claim};
use singletrack::store::settle::Settled;

use super::{Entrance, Subject};
use crate::model::Answer;
use crate::support::calls;

impl Subject {
    pub(super) async fn claim(&mut self, name: &str, through: Entrance) -> Answer {
        let name = self.named(name);
        let all = ["pull".to_owned(), "command".to_owned()];
        let mut leases: Vec<Lease> = Vec::new();
        if through == Entrance::Http {
            // It gives runs of pull workers only.
            let runs = self.client.claim(json!({"workflows": [name], "max": 100})).await;
            leases.extend(runs.iter().map(|run| Lease::of_token(run["lease"]["token"].as_str().unwrap()).unwrap()));
        }
        let request = Claim {
            worker: "test",
            actor: None,
            queues: None,
            executor_types: &all,
            workflows: Some(&[name]),
            bound: None,
            claim_id: None,
            recent: None,
            limit: 100,
            timeout_seconds: 600,
            heartbeat_timeout_seconds: 60,
        };
        let claimed = self.db.with(async |connection| claim(connection, &request).await).await.unwrap();
        leases.extend(claimed.iter().map(|claimed| claimed.lease));
        let number = |lease: Lease| {
            let run = self.number(lease.run_id);
            self.leases[run].push(lease);
            run
        };
        Answer::Claimed(leases.into_iter().map(number).collect())
    }

    pub(super) async fn heartbeat(&self, lease: Lease, through: Entrance) -> Answer {
        if through == Entrance::Http {
            let answer = self.client.beat(&lease.token().unwrap()).await;
            return match answer["result"].as_str().unwrap() {
                "ok" => Answer::Held { cancel_requested: false },
                "cancel_requested" => Answer::Held { cancel_requested: true },
                "lost" => Answer::Lost,
                other => panic!("{other}"),
            };
        }
        match calls::renew(&self.db, &[lease]).await[0] {
            Renewal::Held => Answer::Held { cancel_requested: false },
            Renewal::CancelRequested => Answer::Held { cancel_requested: true },
            Renewal::Lost => Answer::Lost,
            other @ (Renewal::Busy | Renewal::Overdue) => panic!("{other:?}"),
        }
    }

    pub(super) async fn settle(&self, lease: Lease, verdict: Verdict, through: Entrance) -> Answer {
        let sayable = matches!(verdict, Verdict::Succeeded | Verdict::Failed | Verdict::Cancelled);
        if through == Entrance::Http && sayable {
            let repeated = calls::row(&self.sql, lease.run_id).await["lease_secret"] != json!(lease.secret);
            let (result, status) = self.client.end(&lease.token().unwrap(), verdict.status().as_str()).await;
            let status: Status = status.parse().unwrap();
            return match result.as_str() {
                // That it is a repetition is not said.
                "ok" if repeated => Answer::Already(status),
                "ok" => Answer::Recorded(status),
                "lost" => Answer::Lost,
                other => panic!("{other}"),
            };
        }
        match calls::settle_one(&self.db, lease, verdict).await {
            Settled::Recorded(status) => Answer::Recorded(status),
            Settled::Already(status) => Answer::Already(status),
            Settled::Lost(_) => Answer::Lost,
            Settled::Busy => unreachable!("it was tried until it was not"),
        }
    }

    pub(super) async fn release(&self, lease: Lease, through: Entrance) -> Answer {
        let released = match through {
            Entrance::Http => {
                let answer = self.client.say_one("release", &lease.token().unwrap(), json!({})).await;
                answer["result"] != "lost"
            }
            _ => calls::release_one(&self.db, lease).await,
        };
        if released { Answer::Recorded(self.status(lease.run_id).await) } else { Answer::Lost }
    }
}
