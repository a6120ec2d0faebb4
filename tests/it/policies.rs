//! Every policy against every state of the holder, through every entrance: one table, which the model and the service keep.

use singletrack::config::Settings;
use singletrack::domain::{Status, Verdict};

use crate::model::{Action, Answer, Definition, Lease, Pausable, Policy, Request, RunNo, State, step};
use crate::support::database::TestDb;
use crate::support::replica::{Replica, short_lease};
use crate::support::subject::{Entrance, Sight, Subject};

const POLICIES: [Policy; 4] = [Policy::Reject, Policy::ReturnExisting, Policy::Wait, Policy::Replace];

/// What is there before the request comes. Run 0 has the slot, unless the name says that nobody has it.
#[derive(Clone, Copy, Debug)]
enum Before {
    Nobody,
    Queued,
    InBackoff,
    Running,
    RunningWithCancelRequested,
    RunningAndOneWaits,
    RunningAndTheLineIsFull,
    RunningAndOneIsNextInLine,
    NobodyAndPaused,
    NobodyAndItsDefinitionIsPaused,
    QueuedAndPaused,
    RunningAndPaused,
    NobodyAndOneIsScheduled,
}

use Before::*;

/// For each policy, what the request is answered and, after the colon, what all runs are then, the new one last.
/// `new`: accepted. `joins 0`: 200 with run 0. `taken 0`: refused, run 0 has the slot. `paused`, `full`: refused for that.
#[rustfmt::skip]
const NOW: [(Before, [&str; 4]); 13] = [
    // before                          reject                       return_existing              wait                               replace
    (Nobody,                         ["new: queued",               "new: queued",               "new: queued",                     "new: queued"]),
    (Queued,                         ["taken 0: queued",           "joins 0: queued",           "new: queued waiting",             "new: cancelled queued"]),
    (InBackoff,                      ["taken 0: queued",           "joins 0: queued",           "new: queued waiting",             "new: cancelled queued"]),
    (Running,                        ["taken 0: running",          "joins 0: running",          "new: running waiting",            "new: running! waiting"]),
    (RunningWithCancelRequested,     ["taken 0: running!",         "joins 0: running!",         "new: running! waiting",           "new: running! waiting"]),
    (RunningAndOneWaits,             ["taken 0: running waiting",  "joins 0: running waiting",  "new: running waiting waiting",    "new: running! waiting waiting"]),
    (RunningAndTheLineIsFull,        ["taken 0: running waiting waiting", "joins 0: running waiting waiting", "full: running waiting waiting", "new: running! waiting waiting waiting"]),
    (RunningAndOneIsNextInLine,      ["taken 0: running! waiting", "joins 0: running! waiting", "new: running! waiting waiting",   "new: running! skipped waiting"]),
    (NobodyAndPaused,                ["paused: ",                  "paused: ",                  "new: waiting",                    "paused: "]),
    (NobodyAndItsDefinitionIsPaused, ["paused: ",                  "paused: ",                  "new: waiting",                    "paused: "]),
    (QueuedAndPaused,                ["paused: queued",            "paused: queued",            "new: queued waiting",             "paused: queued"]),
    (RunningAndPaused,               ["paused: running",           "paused: running",           "new: running waiting",            "paused: running"]),
    (NobodyAndOneIsScheduled,        ["new: scheduled queued",     "new: scheduled queued",     "new: scheduled queued",           "new: scheduled queued"]),
];

/// For each policy, what all runs are after a scheduled one, the last of them, has become due.
#[rustfmt::skip]
const DUE: [(Before, [&str; 4]); 13] = [
    (Nobody,                         ["queued",                           "queued",                           "queued",                  "queued"]),
    (Queued,                         ["queued skipped=conflict",          "queued skipped=conflict",          "queued waiting",          "cancelled queued"]),
    (InBackoff,                      ["queued skipped=conflict",          "queued skipped=conflict",          "queued waiting",          "cancelled queued"]),
    (Running,                        ["running skipped=conflict",         "running skipped=conflict",         "running waiting",         "running! waiting"]),
    (RunningWithCancelRequested,     ["running! skipped=conflict",        "running! skipped=conflict",        "running! waiting",        "running! waiting"]),
    (RunningAndOneWaits,             ["running waiting skipped=conflict", "running waiting skipped=conflict", "running waiting waiting", "running! waiting waiting"]),
    (RunningAndTheLineIsFull,        ["running waiting waiting skipped=conflict", "running waiting waiting skipped=conflict",
                                      "running waiting waiting skipped=too_many_waiting", "running! waiting waiting waiting"]),
    (RunningAndOneIsNextInLine,      ["running! waiting skipped=conflict", "running! waiting skipped=conflict", "running! waiting waiting", "running! skipped waiting"]),
    (NobodyAndPaused,                ["skipped=paused",                   "skipped=paused",                   "waiting",                 "skipped=paused"]),
    (NobodyAndItsDefinitionIsPaused, ["skipped=paused",                   "skipped=paused",                   "waiting",                 "skipped=paused"]),
    (QueuedAndPaused,                ["queued skipped=paused",            "queued skipped=paused",            "queued waiting",          "queued skipped=paused"]),
    (RunningAndPaused,               ["running skipped=paused",           "running skipped=paused",           "running waiting",         "running skipped=paused"]),
    (NobodyAndOneIsScheduled,        ["scheduled queued",                 "scheduled queued",                 "scheduled queued",        "scheduled queued"]),
];

fn request(policy: Policy) -> Request {
    Request { workflow: "w@x", policy: Some(policy), priority: 0, later: false, key: None, body: 0 }
}

fn later(policy: Policy) -> Request {
    Request { later: true, ..request(policy) }
}

/// The workflow `w`, whose runs do what `on_conflict` says unless their requests say otherwise; the requests are for `w@x`.
fn definitions(on_conflict: Policy) -> [(&'static str, Definition); 1] {
    [("w", Definition { on_conflict, max_waiting: 2, max_attempts: 2, queue: "q", pull: false })]
}

impl Before {
    fn actions(self) -> Vec<Action> {
        let enqueue = |policy| Action::Enqueue(request(policy));
        let running = vec![enqueue(Policy::Reject), Action::Claim("w")];
        let pause = |name| Action::Pause(Pausable::Workflow(name));
        let more = |actions: &[Action]| [&running[..], actions].concat();
        match self {
            Nobody => vec![],
            Queued => vec![enqueue(Policy::Reject)],
            InBackoff => more(&[Action::Settle(Lease { run: 0, claim: 0 }, Verdict::Failed)]),
            Running => running,
            RunningWithCancelRequested => more(&[Action::Cancel(0)]),
            RunningAndOneWaits => more(&[enqueue(Policy::Wait)]),
            RunningAndTheLineIsFull => more(&[enqueue(Policy::Wait), enqueue(Policy::Wait)]),
            RunningAndOneIsNextInLine => more(&[enqueue(Policy::Replace)]),
            NobodyAndPaused => vec![pause("w@x")],
            NobodyAndItsDefinitionIsPaused => vec![pause("w")],
            QueuedAndPaused => vec![enqueue(Policy::Reject), pause("w@x")],
            RunningAndPaused => more(&[pause("w")]),
            NobodyAndOneIsScheduled => vec![Action::Enqueue(later(Policy::Reject))],
        }
    }

    /// In the model, and how many runs there are.
    fn state(self, on_conflict: Policy) -> (State, RunNo) {
        let fold = |state, action: &Action| step(&state, action).0;
        let state = self.actions().iter().fold(State::new(definitions(on_conflict)), fold);
        let runs = state.runs.len();
        (state, runs)
    }
}

/// The runs as the tables have them: `!` is one whose end was asked for.
fn runs(sight: &Sight) -> String {
    let run = |run: &crate::support::subject::Seen| {
        let why = run
            .reason
            .as_deref()
            .filter(|_| run.status == Status::Skipped && run.reason.as_deref() != Some("superseded"));
        let why = why.map(|why| format!("={why}")).unwrap_or_default();
        format!("{}{}{why}", run.status.as_str(), if run.cancel_requested { "!" } else { "" })
    };
    sight.runs.iter().map(run).collect::<Vec<_>>().join(" ")
}

/// An answer as the tables have it, where the next new run would have the number `next`.
fn told(answer: Answer, next: RunNo) -> String {
    match answer {
        Answer::Accepted(run) if run == next => "new".into(),
        Answer::Existing(run) => format!("joins {run}"),
        Answer::SlotTaken(run) => format!("taken {run}"),
        Answer::WorkflowPaused => "paused".into(),
        Answer::TooManyWaiting => "full".into(),
        other => format!("{other:?}"),
    }
}

#[test]
fn the_model_answers_every_policy_as_the_table_says() {
    for (before, expected) in NOW {
        for (policy, expected) in POLICIES.into_iter().zip(expected) {
            let (state, next) = before.state(Policy::Reject);
            let (state, answer) = step(&state, &Action::Enqueue(request(policy)));
            let seen = format!("{}: {}", told(answer, next), runs(&Sight::expected(&state)));
            assert_eq!(seen, expected, "{before:?}, {policy:?}");
        }
    }
    for (before, expected) in DUE {
        for (policy, expected) in POLICIES.into_iter().zip(expected) {
            let (state, next) = before.state(Policy::Reject);
            let (state, answer) = step(&state, &Action::Enqueue(later(policy)));
            assert_eq!(answer, Answer::Accepted(next), "{before:?}, {policy:?}");
            let (state, _) = step(&state, &Action::Due(next));
            assert_eq!(runs(&Sight::expected(&state)), expected, "{before:?}, {policy:?}");
        }
    }
}

/// A database, and an API at which nothing happens unasked.
async fn quiet() -> (TestDb, Replica) {
    let test = TestDb::new().await;
    let settings = Settings { workers: Some("0".into()), reap_interval: Some("1h".into()), ..short_lease() };
    let replica = Replica::with(&test, settings).await;
    (test, replica)
}

/// Workflows of this case's own, in the state that it begins with.
async fn begun(test: &TestDb, replica: &Replica, before: Before, on_conflict: Policy) -> Subject {
    let prefix = format!("case-{}.", uuid::Uuid::new_v4().simple());
    let mut subject = Subject::new(test, &replica.client, prefix, definitions(on_conflict)).await;
    for action in before.actions() {
        subject.act(&action, Entrance::Store).await;
    }
    subject
}

#[tokio::test(flavor = "multi_thread")]
async fn every_entrance_answers_every_policy_as_the_table_says() {
    let (test, replica) = quiet().await;
    for (before, expected) in NOW {
        for (policy, expected) in POLICIES.into_iter().zip(expected) {
            let asked = Entrance::ALL.map(|through| (through, request(policy), Policy::Reject));
            // And where it is the workflow that says so.
            let as_defined = Request { policy: None, ..request(policy) };
            let as_defined = [Entrance::Http, Entrance::Sql].map(|through| (through, as_defined.clone(), policy));
            for (through, request, on_conflict) in asked.into_iter().chain(as_defined) {
                let mut subject = begun(&test, &replica, before, on_conflict).await;
                let (_, next) = before.state(on_conflict);
                let answer = subject.act(&Action::Enqueue(request.clone()), through).await;
                let seen = format!("{}: {}", told(answer, next), runs(&subject.sight().await));
                assert_eq!(seen, expected, "{before:?}, {through:?}: {request:?} under {on_conflict:?}");
            }
        }
    }
    test.check().await;
    replica.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_due_run_meets_the_slot_as_the_table_says() {
    let (test, replica) = quiet().await;
    for (before, expected) in DUE {
        for (policy, expected) in POLICIES.into_iter().zip(expected) {
            for through in [Entrance::Http, Entrance::Sql] {
                let mut subject = begun(&test, &replica, before, Policy::Reject).await;
                let (_, next) = before.state(Policy::Reject);
                // Whatever has the slot, one for later is accepted.
                let answer = subject.act(&Action::Enqueue(later(policy)), through).await;
                assert_eq!(answer, Answer::Accepted(next), "{before:?}, {through:?}: {policy:?}");
                assert_eq!(subject.sight().await.runs[next].status, Status::Scheduled);
                subject.act(&Action::Due(next), Entrance::Store).await;
                assert_eq!(runs(&subject.sight().await), expected, "{before:?}, {through:?}: {policy:?}");
            }
        }
    }
    test.check().await;
    replica.finish().await;
}
