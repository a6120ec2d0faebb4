//! Several clients at once, each with a mind of its own: nobody can say which order of their actions it will have been, but
//! some answers are wrong in every order, and so are some ends.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use rand::prelude::*;
use singletrack::config::Settings;
use singletrack::domain::{Status, Verdict};
use singletrack::engine::sweeper;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::moves::{POLICIES, WORKFLOWS, definitions};
use crate::model::{Action, Answer, Lease, Name, Pausable, Policy, Request, RunNo};
use crate::support::calls::LIMIT;
use crate::support::database::TestDb;
use crate::support::eventually;
use crate::support::replica::{Replica, short_lease};
use crate::support::subject::{Entrance, Subject};

/// What the clients know together, as if they had told each other.
#[derive(Default)]
struct Known {
    /// Runs that somebody was told are over.
    over: HashSet<Uuid>,
    /// Which run a worker is at work on.
    at_work: HashMap<Name, Uuid>,
    /// Runs that somebody meant to release by force: its worker may not know of it.
    forced: HashSet<Uuid>,
    accepted: HashSet<(Name, Uuid)>,
    /// Runs that were said to have the slot.
    named: HashSet<(Name, Uuid)>,
    /// What was answered under a key.
    keys: BTreeMap<(Name, u8), HashSet<Uuid>>,
    settled: usize,
    taken: usize,
    busy: usize,
}

impl Known {
    /// A run was the answer to a request.
    fn keep(&mut self, request: &Request, run: Uuid) {
        if let Some(key) = request.key {
            self.keys.entry((request.workflow, key)).or_default().insert(run);
        }
    }

    /// A worker begins; nobody else may be at work for its workflow.
    fn begin(&mut self, workflow: Name, run: Uuid) {
        if !self.forced.contains(&run) {
            let other = self.at_work.insert(workflow, run);
            assert_eq!(other, None, "two workers are at work for {workflow}");
        }
    }

    fn end(&mut self, run: Uuid) {
        self.at_work.retain(|_, at_work| *at_work != run);
    }
}

struct Client {
    subject: Subject,
    known: Arc<Mutex<Known>>,
    /// Claimed by this client, and not settled or given back.
    leases: Vec<Lease>,
}

/// The same request under the same key, always.
fn request(random: &mut impl Rng) -> Request {
    let workflow = *WORKFLOWS.choose(random).unwrap();
    let key = random.random_bool(0.1).then(|| random.random_range(0..40));
    let policy = match key {
        Some(key) => POLICIES[usize::from(key) % POLICIES.len()],
        None => *POLICIES.choose(random).unwrap(),
    };
    let later = key.is_none() && random.random_bool(0.1);
    let priority = if key.is_some() { 0 } else { random.random_range(0..3) };
    Request { workflow, policy: Some(policy), priority, later, key, body: 0 }
}

impl Client {
    fn known<T>(&self, ask: impl FnOnce(&mut Known) -> T) -> T {
        ask(&mut self.known.lock().unwrap())
    }

    async fn act(&mut self) {
        let (through, what) = {
            let mut random = rand::rng();
            (*Entrance::ALL.choose(&mut random).unwrap(), random.random_range(0..100))
        };
        match what {
            0..36 => {
                let request = request(&mut rand::rng());
                self.enqueue(vec![request], through).await;
            }
            36..40 => {
                let requests = (0..3).map(|_| request(&mut rand::rng())).collect();
                self.enqueue(requests, through).await;
            }
            40..58 => self.claim(through).await,
            58..78 => self.settle(through).await,
            78..80 => self.give_back(through).await,
            80..88 => self.cancel(through).await,
            88..90 => self.force_release().await,
            90..94 => self.pause(through).await,
            _ => self.time().await,
        }
    }

    async fn enqueue(&mut self, requests: Vec<Request>, through: Entrance) {
        let over = self.known(|known| known.over.clone());
        let answers = match &requests[..] {
            [request] => vec![self.subject.act(&Action::Enqueue(request.clone()), through).await],
            _ => match self.subject.act(&Action::Batch(requests.clone()), through).await {
                Answer::Each(answers) => answers,
                other => panic!("{through:?}: {requests:?}: {other:?}"),
            },
        };
        for (request, answer) in requests.iter().zip(answers) {
            let workflow = request.workflow;
            match answer {
                Answer::Accepted(run) => {
                    let run = self.subject.id(run);
                    self.known(|known| {
                        let new = known.accepted.insert((workflow, run));
                        assert!(new || request.key.is_some(), "{through:?}: {request:?}: accepted twice as {run}");
                        known.keep(request, run);
                    });
                }
                Answer::Existing(run) | Answer::SlotTaken(run) => {
                    let joined = matches!(answer, Answer::Existing(_));
                    let run = self.subject.id(run);
                    // Under a key it is what it was once.
                    let passed = over.contains(&run) && !(joined && request.key.is_some());
                    assert!(!passed, "{through:?}: {request:?}: {run} was known to be over");
                    self.known(|known| {
                        known.named.insert((workflow, run));
                        known.taken += 1;
                        if joined {
                            known.keep(request, run);
                        }
                    });
                }
                Answer::WorkflowPaused => {
                    assert!(workflow != "a@y" && request.policy != Some(Policy::Wait), "{request:?}")
                }
                Answer::TooManyWaiting => assert_eq!(request.policy, Some(Policy::Wait), "{request:?}"),
                // Nothing was done: what is there in the end is what was accepted.
                Answer::Busy => self.known(|known| known.busy += 1),
                other => panic!("{through:?}: {request:?}: {other:?}"),
            }
        }
    }

    async fn claim(&mut self, through: Entrance) {
        let name = *WORKFLOWS.choose(&mut rand::rng()).unwrap();
        let Answer::Claimed(runs) = self.subject.act(&Action::Claim(name), through).await else { unreachable!() };
        for run in runs {
            let id = self.subject.id(run);
            let workflow = self.subject.workflow(id).await;
            let workflow = *WORKFLOWS.iter().find(|name| **name == workflow).unwrap();
            self.known(|known| known.begin(workflow, id));
            self.leases.push(self.subject.newest(run));
        }
    }

    /// One of its leases; from now on nobody is at work under it.
    fn lay_down(&mut self) -> Option<Lease> {
        let at = (0..self.leases.len()).choose(&mut rand::rng())?;
        let lease = self.leases.swap_remove(at);
        let run = self.subject.id(lease.run);
        self.known(|known| known.end(run));
        Some(lease)
    }

    fn any_run(&self) -> Option<RunNo> {
        (0..self.subject.heard_of()).choose(&mut rand::rng())
    }

    async fn settle(&mut self, through: Entrance) {
        let Some(lease) = self.lay_down() else { return };
        let verdict = *[Verdict::Succeeded, Verdict::Failed, Verdict::Cancelled].choose(&mut rand::rng()).unwrap();
        let answer = self.subject.act(&Action::Settle(lease, verdict), through).await;
        let run = self.subject.id(lease.run);
        match answer {
            Answer::Recorded(status) if status.is_final() => self.known(|known| {
                known.over.insert(run);
                known.settled += 1;
            }),
            Answer::Recorded(Status::Queued) | Answer::Lost => {}
            other => panic!("{other:?}"),
        }
    }

    async fn give_back(&mut self, through: Entrance) {
        let Some(lease) = self.lay_down() else { return };
        match self.subject.act(&Action::Release(lease), through).await {
            Answer::Recorded(_) | Answer::Lost => {}
            other => panic!("{other:?}"),
        }
    }

    async fn cancel(&mut self, through: Entrance) {
        let Some(run) = self.any_run() else { return };
        let answer = self.subject.act(&Action::Cancel(run), through).await;
        let run = self.subject.id(run);
        match answer {
            Answer::Cancelled | Answer::AlreadyFinal => self.known(|known| _ = known.over.insert(run)),
            Answer::CancelRequested => {}
            other => panic!("{other:?}"),
        }
    }

    /// Of a run that somebody is at work on, too: then two may be at work, as its comment says.
    async fn force_release(&mut self) {
        let Some(run) = self.any_run() else { return };
        let id = self.subject.id(run);
        self.known(|known| {
            known.end(id);
            known.forced.insert(id);
        });
        if self.subject.act(&Action::ForceRelease(run), Entrance::Sql).await == Answer::Released {
            self.known(|known| _ = known.over.insert(id));
        }
    }

    /// Never of `a@y`, which is not paused with `a` either.
    async fn pause(&mut self, through: Entrance) {
        let workflow = ["a", "a@x"].choose(&mut rand::rng()).unwrap();
        let what = Pausable::Workflow(workflow);
        let pause = rand::random_bool(0.2);
        let action = if pause { Action::Pause(what) } else { Action::Resume(what) };
        assert_eq!(self.subject.act(&action, through).await, Answer::Silence);
    }

    async fn time(&mut self) {
        let Some(run) = self.any_run() else { return };
        let action = [Action::Due(run), Action::BackoffOver(run), Action::Expire(run)];
        let action = action.choose(&mut rand::rng()).unwrap();
        self.subject.act(action, Entrance::Store).await;
    }
}

/// Lets everything that is there come to its end; nobody is paused any more.
async fn finish(test: &TestDb, subject: &mut Subject) {
    for workflow in ["a", "a@x"] {
        subject.act(&Action::Resume(Pausable::Workflow(workflow)), Entrance::Store).await;
    }
    // The net, for those that somebody had locked when they were to be promoted.
    sweeper::sweep(&test.db).await.unwrap();
    let stranded: Vec<Uuid> = sqlx::query_scalar(
        "select id from test_runs w where status = 'waiting'
           and not exists (select from test_runs h where h.workflow_id = w.workflow_id and h.status in ('queued', 'running'))",
    )
    .fetch_all(&test.sql)
    .await
    .unwrap();
    assert!(stranded.is_empty(), "{stranded:?} wait for a slot that is free");
    eventually("an end of everything", LIMIT, async || {
        sqlx::query(
            "update test_runs
             set version = version + 1,
                 run_at = case when status = 'scheduled' then now() - interval '1 second' else run_at end,
                 available_at = case when status = 'queued' then now() else available_at end
             where status in ('scheduled', 'queued')",
        )
        .execute(&test.sql)
        .await
        .unwrap();
        sweeper::start_due(&test.db).await.unwrap();
        // Whoever had claimed it is gone.
        sqlx::query(
            "select force_release_run(id, 'its worker went home') from test_runs where status in ('queued', 'running')",
        )
        .execute(&test.sql)
        .await
        .unwrap();
        let live: i64 = sqlx::query_scalar("select count(*) from test_runs where finished_at is null")
            .fetch_one(&test.sql)
            .await
            .unwrap();
        (live == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_several_clients_do_at_once_their_answers_are_possible_and_nobody_is_forgotten() {
    const CLIENTS: usize = 8;
    let actions = std::env::var("PROPTEST_CASES").map_or(100, |cases| cases.parse().unwrap());
    let test = TestDb::new().await;
    let settings = Settings { workers: Some("0".into()), reap_interval: Some("1h".into()), ..short_lease() };
    let replica = Replica::with(&test, settings).await;
    let mut subject = Subject::new(&test, &replica.client, String::new(), definitions()).await;
    let known = Arc::new(Mutex::new(Known::default()));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (subject, known) = (subject.another(), known.clone());
        let mut client = Client { subject, known, leases: Vec::new() };
        clients.spawn(async move {
            for _ in 0..actions {
                client.act().await;
            }
        });
    }
    clients.join_all().await;
    finish(&test, &mut subject).await;
    test.check().await;

    let known = std::mem::take(&mut *known.lock().unwrap());
    let there: Vec<(String, Uuid)> =
        sqlx::query_as("select workflow_id, id from test_runs").fetch_all(&test.sql).await.unwrap();
    let there: HashSet<(&str, Uuid)> = there.iter().map(|(workflow, id)| (workflow.as_str(), *id)).collect();
    assert_eq!(known.accepted, there, "a run was accepted and is not there, or is there and nobody was told");
    assert!(known.named.is_subset(&there), "a refusal named what never was a run of its workflow");
    let twice = known.keys.iter().find(|(_, runs)| runs.len() > 1);
    assert_eq!(twice, None, "one key, several runs");
    let (settled, taken, busy) = (known.settled, known.taken, known.busy);
    assert!(settled > actions / 10 && taken > actions / 2, "nothing came of it: {settled} ended, {taken} refused");
    assert!(busy < actions / 2, "{busy} were told to come back");
    replica.finish().await;
}
