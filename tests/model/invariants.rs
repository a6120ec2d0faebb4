//! What no state may show, and what no step may do.

use std::collections::BTreeSet;

use singletrack::domain::Status;

use super::{Answer, Name, State};

/// Every promise that `state` breaks.
pub fn broken(state: &State) -> Vec<String> {
    let workflows: BTreeSet<Name> = state.runs.iter().map(|run| run.workflow).collect();
    let slots = workflows.into_iter().flat_map(|workflow| of_slot(state, workflow));
    slots.chain(of_runs(state)).chain(of_keys(state)).collect()
}

fn of_slot(state: &State, workflow: Name) -> Vec<String> {
    let with = |wanted: fn(Status) -> bool| {
        state.runs.iter().filter(|run| run.workflow == workflow && wanted(run.status)).count()
    };
    let waiters = state.waiters(workflow);
    let next_in_line = waiters.iter().filter(|run| state.runs[**run].next_in_line).count();
    let holder = state.holder(workflow).map(|holder| &state.runs[holder]);
    let max_waiting = state.definition(workflow).map_or(0, |(_, definition)| definition.max_waiting);
    let promises = [
        (with(Status::holds_slot) <= 1, "two runs hold the slot"),
        (with(|status| status == Status::Running) <= 1, "two runs are running"),
        (waiters.is_empty() || holder.is_some() || state.is_paused(workflow), "a run waits for a free slot"),
        (state.waiting(workflow) <= max_waiting, "too many wait"),
        (next_in_line <= 1, "two runs are next in line"),
        (
            next_in_line == 0 || holder.is_none_or(|run| run.cancel_requested && run.status == Status::Running),
            "a run is next in line, and nobody told the holder to end",
        ),
    ];
    promises.into_iter().filter(|(kept, _)| !kept).map(|(_, broken)| format!("{workflow}: {broken}")).collect()
}

fn of_runs(state: &State) -> Vec<String> {
    let mut broken = Vec::new();
    for (number, run) in state.runs.iter().enumerate() {
        let started = !run.claims.is_empty() || run.status == Status::Running;
        let promises = [
            (run.attempt <= run.max_attempts, "more attempts than it may have"),
            (
                run.status.is_final() || run.status == Status::Running || run.attempt < run.max_attempts,
                "it waits for an attempt that it may not have",
            ),
            (run.status != Status::Running || run.attempt > 0, "it runs without an attempt"),
            (run.status != Status::Skipped || run.attempt == 0, "it was skipped after it had begun"),
            (started || run.attempt == 0, "an attempt without a claim"),
            (
                !matches!(run.status, Status::Scheduled | Status::Waiting) || run.claims.is_empty(),
                "it was claimed, and has no slot",
            ),
        ];
        let lost = promises.into_iter().filter(|(kept, _)| !kept);
        broken.extend(lost.map(|(_, broken)| format!("run {number}: {broken}")));
    }
    broken
}

fn of_keys(state: &State) -> Vec<String> {
    let names_run = |workflow: Name, answer: &Answer| match answer {
        Answer::Accepted(run) | Answer::Existing(run) => {
            state.runs.get(*run).is_some_and(|run| run.workflow == workflow)
        }
        _ => false,
    };
    let wrong = state.keys.iter().filter(|((workflow, _), (_, answer))| !names_run(workflow, answer));
    wrong.map(|(key, (_, answer))| format!("key {key:?} is kept with {answer:?}")).collect()
}

/// Every promise that a step from `before` to `after` breaks.
pub fn broken_by_step(before: &State, after: &State) -> Vec<String> {
    let mut broken = Vec::new();
    if after.runs.len() < before.runs.len() {
        broken.push("a run is gone".to_owned());
    }
    for (number, (was, is)) in before.runs.iter().zip(&after.runs).enumerate() {
        let promises = [
            (!was.status.is_final() || was == is, "a final run has changed"),
            (is.claims.starts_with(&was.claims), "a claim was forgotten"),
            (was.workflow == is.workflow, "it went to another workflow"),
            (was.status != Status::Scheduled || is.status != Status::Running, "it was started without having the slot"),
        ];
        let lost = promises.into_iter().filter(|(kept, _)| !kept);
        broken.extend(lost.map(|(_, broken)| format!("run {number}: {broken}")));
    }
    let forgotten = before.keys.iter().filter(|(key, answer)| after.keys.get(key) != Some(answer));
    broken.extend(forgotten.map(|(key, _)| format!("key {key:?} is not answered as it was")));
    broken
}
