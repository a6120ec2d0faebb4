//! Running the checker: everything is looked at, or a wrong variant is caught.

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::sync::Mutex;
use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Model, Path};

const THREADS: usize = 2;

/// Looks at every state that `model` can reach. There have to be at least `floor`: fewer would mean that an action went lost.
pub fn hold<M>(name: &str, model: M, floor: usize)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync,
    M::Action: Clone + Debug + PartialEq + Send + Sync,
{
    let began = Instant::now();
    let checker = model.checker().threads(THREADS).spawn_bfs().join();
    let (unique, all, depth) = (checker.unique_state_count(), checker.state_count(), checker.max_depth());
    say(format_args!("{name}: {unique} states, {all} steps, {depth} deep, {:.1?}", began.elapsed()));
    for property in checker.model().properties() {
        let found = checker.discovery(property.name);
        match property.expectation {
            Expectation::Sometimes => assert!(found.is_some(), "{name}: never: {}", property.name),
            _ => assert!(
                found.is_none(),
                "{name}: not always: {}\n{}",
                property.name,
                found.map_or_else(String::new, told)
            ),
        }
    }
    assert!(unique >= floor, "{name}: only {unique} states: what can't happen any more?");
}

/// Expects that a wrong variant breaks `property`, within the same bounds.
pub fn bite<M>(name: &str, model: M, property: &'static str)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync,
    M::Action: Clone + Debug + PartialEq + Send + Sync,
{
    let found = HasDiscoveries::AnyOf([property].into());
    let checker = model.checker().threads(THREADS).finish_when(found).spawn_bfs().join();
    let Some(path) = checker.discovery(property) else {
        panic!("{name}: {} states, and still always: {property}", checker.unique_state_count())
    };
    let steps = path.into_actions();
    say(format_args!("{name}: not always \"{property}\": {} steps", steps.len()));
    assert!(!steps.is_empty(), "{name}: it begins broken");
}

/// How it came about: the states, each with what is done in it.
fn told<S, A>(path: Path<S, A>) -> String
where
    S: Debug + PartialEq,
    A: Debug + PartialEq,
{
    path.into_vec().into_iter().map(|(state, action)| format!("{state:?}\n  {action:?}\n")).collect()
}

/// Past the capture of the test harness: how much was looked at is to be seen of a test that passes, too.
#[expect(clippy::explicit_write, reason = "what eprintln! writes is kept back")]
fn say(line: std::fmt::Arguments<'_>) {
    writeln!(std::io::stderr(), "{line}").unwrap();
}

/// Which states are known to come to rest when nothing goes wrong any more.
#[derive(Default)]
pub struct Rests {
    known: Mutex<HashSet<u64>>,
}

impl Rests {
    /// Whether `state` comes to rest by steps of `next`, each of which the model allows. What is on the way is known then too, so
    /// that this costs about one step per state.
    pub fn comes_to_rest<S: Clone + Hash>(
        &self,
        state: &S,
        next: impl Fn(&S) -> Option<S>,
        rests: impl Fn(&S) -> bool,
    ) -> bool {
        /// More than any state takes that is not on a circle.
        const LONGEST: usize = 200;
        let mut way = Vec::new();
        let mut state = state.clone();
        while way.len() < LONGEST {
            let mut hasher = DefaultHasher::new();
            state.hash(&mut hasher);
            let name = hasher.finish();
            if self.known.lock().unwrap().contains(&name) {
                break;
            }
            way.push(name);
            match next(&state) {
                Some(after) => state = after,
                None if rests(&state) => break,
                None => return false,
            }
        }
        let rests = way.len() < LONGEST;
        if rests {
            self.known.lock().unwrap().extend(way);
        }
        rests
    }
}
