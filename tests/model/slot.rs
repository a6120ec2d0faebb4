//! The slot of a workflow: what a run comes to that wants it, and who gets it when it is free.

use singletrack::domain::{Event, Landing, Status};

use super::{Answer, Definition, Name, Pausable, Policy, Request, Run, RunNo, State};

/// What a run comes to that wants the slot now.
enum Met {
    Free,
    /// Behind the run that has the slot, or behind a pause.
    Waits,
    /// In the place of this run, which is cancelled.
    Replaces(RunNo),
    Joins(RunNo),
    Taken(RunNo),
    Paused,
    TooManyWaiting,
}

impl State {
    /// The run that has the slot of a workflow.
    pub fn holder(&self, workflow: &str) -> Option<RunNo> {
        self.of(workflow).find(|run| self.runs[*run].status.holds_slot())
    }

    /// The waiting runs of a workflow, in the order in which they are to have the slot.
    pub fn waiters(&self, workflow: &str) -> Vec<RunNo> {
        let mut waiters: Vec<RunNo> =
            self.of(workflow).filter(|run| self.runs[*run].status == Status::Waiting).collect();
        waiters.sort_by_key(|run| (!self.runs[*run].next_in_line, -self.runs[*run].priority, *run));
        waiters
    }

    /// Whether nothing of a workflow is to be started: it is paused by itself, or with its definition.
    pub fn is_paused(&self, workflow: Name) -> bool {
        let by_definition = self.definition(workflow).map(|(definition, _)| definition);
        [Some(workflow), by_definition]
            .into_iter()
            .flatten()
            .any(|name| self.paused.contains(&Pausable::Workflow(name)))
    }

    fn of(&self, workflow: &str) -> impl Iterator<Item = RunNo> {
        (0..self.runs.len()).filter(move |run| self.runs[*run].workflow == workflow)
    }

    /// How many runs wait for a slot, as `max_waiting` counts them.
    pub(super) fn waiting(&self, workflow: &str) -> usize {
        self.waiters(workflow).into_iter().filter(|run| !self.runs[*run].next_in_line).count()
    }

    fn meet(&self, workflow: Name, policy: Policy, max_waiting: usize) -> Met {
        // The pause comes before the slot.
        let holder = match (self.is_paused(workflow), self.holder(workflow)) {
            (true, _) if policy != Policy::Wait => return Met::Paused,
            (false, None) => return Met::Free,
            (_, holder) => holder,
        };
        match (policy, holder) {
            (Policy::Wait, _) if self.waiting(workflow) >= max_waiting => Met::TooManyWaiting,
            (Policy::Wait, _) | (_, None) => Met::Waits,
            (Policy::Reject, Some(holder)) => Met::Taken(holder),
            (Policy::ReturnExisting, Some(holder)) => Met::Joins(holder),
            (Policy::Replace, Some(holder)) => Met::Replaces(holder),
        }
    }

    /// Cancels the holder in favour of a run that waits already, and is next in line from now on.
    fn replace(&mut self, run: RunNo, holder: RunNo) {
        let workflow = self.runs[run].workflow;
        for older in self.waiters(workflow) {
            if self.runs[older].next_in_line {
                self.fire(older, Event::Supersede, |_| Some("superseded"));
            }
        }
        self.runs[run].next_in_line = true;
        self.cancel(holder, "superseded");
    }

    /// Gives the slot of a workflow to whoever is next, if it is free and the workflow is not paused.
    pub(super) fn promote(&mut self, workflow: Name) {
        if self.holder(workflow).is_none()
            && !self.is_paused(workflow)
            && let Some(next) = self.waiters(workflow).first()
        {
            self.fire(*next, Event::Promote, |_| None);
            self.runs[*next].next_in_line = false;
        }
    }

    pub(super) fn resume(&mut self, what: Pausable) {
        self.paused.remove(&what);
        // Those that are not concerned have nobody waiting behind a free slot.
        let workflows: Vec<Name> = self.runs.iter().map(|run| run.workflow).collect();
        for workflow in workflows {
            self.promote(workflow);
        }
    }

    pub(super) fn enqueue(&mut self, request: &Request) -> Answer {
        let Some((_, definition)) = self.definition(request.workflow) else { return Answer::UnknownWorkflow };
        let definition = definition.clone();
        let slot = request.key.map(|key| (request.workflow, key));
        if let Some((before, answer)) = slot.and_then(|slot| self.keys.get(&slot)) {
            return if before == request { answer.clone() } else { Answer::KeyReused };
        }
        let run = Run {
            workflow: request.workflow,
            status: Status::Scheduled,
            reason: None,
            policy: request.policy.unwrap_or(definition.on_conflict),
            priority: request.priority,
            body: request.body,
            rerun_of: None,
            next_in_line: false,
            attempt: 0,
            max_attempts: definition.max_attempts,
            cancel_requested: false,
            in_backoff: false,
            confirmed: false,
            free_returns: 0,
            last: None,
            claims: Vec::new(),
        };
        let answer = if request.later { self.accept(run) } else { self.start(run, &definition) };
        if let (Some(slot), Answer::Accepted(_) | Answer::Existing(_)) = (slot, &answer) {
            self.keys.insert(slot, (request.clone(), answer.clone()));
        }
        answer
    }

    /// A rerun is an enqueue of the same again, under the policy of its workflow.
    pub(super) fn rerun(&mut self, run: RunNo) -> Answer {
        let Run { workflow, priority, body, .. } = self.runs[run];
        let request = Request { workflow, policy: None, priority, later: false, key: None, body };
        let answer = self.enqueue(&request);
        if let Answer::Accepted(new) = answer {
            self.runs[new].rerun_of = Some(run);
        }
        answer
    }

    fn accept(&mut self, run: Run) -> Answer {
        self.runs.push(run);
        Answer::Accepted(self.runs.len() - 1)
    }

    /// A run that is wanted now.
    fn start(&mut self, run: Run, definition: &Definition) -> Answer {
        match self.meet(run.workflow, run.policy, definition.max_waiting) {
            Met::Free => self.accept(Run { status: Status::Queued, ..run }),
            Met::Waits => self.accept(Run { status: Status::Waiting, ..run }),
            Met::Replaces(holder) => {
                let accepted = self.accept(Run { status: Status::Waiting, ..run });
                self.replace(self.runs.len() - 1, holder);
                accepted
            }
            Met::Joins(holder) => Answer::Existing(holder),
            Met::Taken(holder) => Answer::SlotTaken(holder),
            Met::Paused => Answer::WorkflowPaused,
            Met::TooManyWaiting => Answer::TooManyWaiting,
        }
    }

    /// A scheduled run whose time has come meets the slot as one does that is wanted now; but nobody is there to be refused.
    pub(super) fn due(&mut self, run: RunNo) {
        let Run { workflow, status, policy, .. } = self.runs[run];
        if status != Status::Scheduled {
            return;
        }
        let max_waiting = self.definition(workflow).map_or(0, |(_, definition)| definition.max_waiting);
        let (landing, reason) = match self.meet(workflow, policy, max_waiting) {
            Met::Free => (Landing::Slot, None),
            Met::Waits => (Landing::Line, None),
            Met::Replaces(holder) => {
                self.fire(run, Event::Due(Landing::Line), |_| None);
                return self.replace(run, holder);
            }
            Met::Joins(_) | Met::Taken(_) => (Landing::Nowhere, Some("conflict")),
            Met::Paused => (Landing::Nowhere, Some("paused")),
            Met::TooManyWaiting => (Landing::Nowhere, Some("too_many_waiting")),
        };
        self.fire(run, Event::Due(landing), |_| reason);
    }
}
