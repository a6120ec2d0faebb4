//! Random sequences of everything that clients, workers and time can do: the service against the reference model.

mod moves;
mod together;

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

use self::moves::{Move, definitions, moves};
use crate::model::{Action, Answer, State, invariants, step};
use crate::support::database::TestDb;
use crate::support::replica::{Client, Replica, short_lease};
use crate::support::subject::{Entrance, Sight, Subject};

/// One after the other, each through some entrance.
type Sequence = Vec<(Move, Entrance)>;

/// Runs `test` for random sequences; one that fails is made as short as it can be, and told as actions. `PROPTEST_CASES` is
/// how many, instead of `cases`.
fn for_sequences(cases: u32, longest: usize, test: impl Fn(&Sequence) -> Result<(), TestCaseError>) {
    let cases = std::env::var("PROPTEST_CASES").map_or(cases, |number| number.parse().unwrap());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 1_000, ..Config::default() };
    let test = |sequence: &Sequence| {
        catch_unwind(AssertUnwindSafe(|| test(sequence))).unwrap_or_else(|_| Err(TestCaseError::fail("it panicked")))
    };
    if let Err(error) = TestRunner::new(config).run(&moves(longest), |sequence| test(&sequence)) {
        match error {
            TestError::Fail(why, sequence) => {
                let (sequence, why) = shortened(sequence, why.to_string(), &test);
                panic!("{why}\n{}", told(&sequence))
            }
            TestError::Abort(why) => panic!("{why}"),
        }
    }
}

/// The same failure without whatever is not needed for it: `proptest` asks once for each move, and what had to stay then may
/// be needless now.
fn shortened(
    mut sequence: Sequence,
    mut why: String,
    test: &impl Fn(&Sequence) -> Result<(), TestCaseError>,
) -> (Sequence, String) {
    while let Some((shorter, still)) = (0..sequence.len()).find_map(|without| {
        let mut shorter = sequence.clone();
        shorter.remove(without);
        let still = test(&shorter).err()?;
        Some((shorter, still.to_string()))
    }) {
        (sequence, why) = (shorter, still);
    }
    (sequence, why)
}

/// The actions of a sequence, one a line, with what the model answers.
fn told(sequence: &Sequence) -> String {
    let mut lines = Vec::new();
    let line = |_: &State, action: &Action, through, _: &State, answer: Answer| {
        lines.push(format!("  {through:?}: {action:?} -> {answer:?}"));
    };
    walk(sequence, line);
    lines.join("\n")
}

/// Goes through a sequence in the model: before, action, entrance, after, answer.
fn walk(sequence: &Sequence, mut each: impl FnMut(&State, &Action, Entrance, &State, Answer)) {
    let mut state = State::new(definitions());
    for (action, through) in sequence {
        let Some(action) = action.action(&state) else { continue };
        let (next, answer) = step(&state, &action);
        each(&state, &action, *through, &next, answer);
        state = next;
    }
}

fn check(holds: bool, what: impl FnOnce() -> String) -> Result<(), TestCaseError> {
    if holds { Ok(()) } else { Err(TestCaseError::fail(what())) }
}

fn same<T: Debug + PartialEq>(model: &T, service: &T) -> Result<(), TestCaseError> {
    check(model == service, || format!("the model says\n  {model:?}\nand the service\n  {service:?}"))
}

#[test]
fn the_model_keeps_its_own_promises() {
    for_sequences(500, 80, |sequence| {
        let mut broken = Vec::new();
        walk(sequence, |before, _, _, after, _| {
            broken.extend([invariants::broken(after), invariants::broken_by_step(before, after)].concat());
        });
        check(broken.is_empty(), || broken.join("\n"))
    });
}

#[test]
fn the_service_does_what_the_model_does() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let test = runtime.block_on(TestDb::new());
    // Whatever the service would find out by itself, by and by, must not hide what was left undone at once.
    let settings =
        singletrack::config::Settings { workers: Some("0".into()), reap_interval: Some("1h".into()), ..short_lease() };
    let replica = runtime.block_on(Replica::with(&test, settings));
    for_sequences(30, 80, |sequence| runtime.block_on(compare(&test, &replica.client, sequence)));
    runtime.block_on(replica.finish());
}

async fn compare(test: &TestDb, client: &Client, sequence: &Sequence) -> Result<(), TestCaseError> {
    empty(test).await;
    let mut subject = Subject::new(test, client, "case.".into(), definitions()).await;
    let mut state = State::new(definitions());
    for (action, through) in sequence {
        let Some(action) = action.action(&state) else { continue };
        let (next, expected) = step(&state, &action);
        let answer = subject.act(&action, *through).await;
        let why = |error: TestCaseError| TestCaseError::fail(format!("after {through:?}: {action:?}: {error}"));
        same(&expected, &answer).map_err(why)?;
        let (expected, sight) = (Sight::expected(&next), subject.sight().await);
        same(&expected.waiting, &sight.waiting).map_err(why)?;
        for (run, (expected, seen)) in expected.runs.iter().zip(&sight.runs).enumerate() {
            same(expected, seen).map_err(|error| why(TestCaseError::fail(format!("run {run}: {error}"))))?;
        }
        same(&expected.runs.len(), &sight.runs.len()).map_err(why)?;
        let broken: Vec<(String, String)> =
            sqlx::query_as("select violation, detail from invariant_violations").fetch_all(&test.sql).await.unwrap();
        same(&Vec::new(), &broken).map_err(why)?;
        state = next;
    }
    Ok(())
}

/// Leaves nothing of the sequence before: its live runs would be refused to go.
async fn empty(test: &TestDb) {
    let mut connection = test.sql.begin().await.unwrap();
    for statement in [
        "set local session_replication_role = replica",
        "delete from test_runs",
        "delete from run_events",
        "delete from run_attempts",
        "delete from run_leases",
        "delete from idempotency_keys",
        "delete from pauses",
        "delete from workflow_revisions",
        "delete from workflows",
    ] {
        sqlx::query(statement).execute(&mut *connection).await.unwrap();
    }
    connection.commit().await.unwrap();
}
