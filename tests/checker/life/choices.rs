//! What may happen next.

use singletrack::domain::{Status, Verdict};

use super::{Action, Condition, Fault, Job, Life, Process, Silence, Stage, World, Wrong, due};
use crate::model::{Name, Pausable, Policy};

const WORKFLOWS: [Name; 2] = ["a", "b"];

impl Life {
    /// Everything that may happen next.
    pub(super) fn choices(&self, world: &World, actions: &mut Vec<Action>) {
        self.of_trouble(world, actions);
        self.of_hosts(world, actions);
        self.of_jobs(world, actions);
        if !world.outage {
            of_clients(world, actions);
            of_time(world, actions);
        }
    }

    /// What happens next when nothing goes wrong any more: one step, always the same. It ends when nothing is left to do.
    pub(super) fn calm(&self, world: &World) -> Option<World> {
        let mut actions = Vec::new();
        self.choices(world, &mut actions);
        let next = actions.into_iter().filter_map(|action| Some((calm_rank(&action)?, action)));
        let (_, action) = next.min_by_key(|(rank, _)| *rank)?;
        Some(self.after(world, &action))
    }

    fn of_trouble(&self, world: &World, actions: &mut Vec<Action>) {
        for host in 0..world.hosts.len() {
            if matches!(world.hosts[host].condition, Condition::WorkerFrozen | Condition::HostFrozen) {
                actions.push(Action::Thaw(host));
            }
        }
        if world.outage || world.hosts.iter().any(|host| host.cut) {
            actions.push(Action::Mend);
        }
        if world.rows.paused.contains(&Pausable::Workflow("a")) {
            actions.push(Action::Resume("a"));
        }
        if world.struck {
            return;
        }
        actions.extend(numbers(&world.clients, |client| client.stage == Stage::Idle).map(Action::LoseAnswer));
        actions
            .extend(numbers(&world.rows.runs, |run| run.workflow == "a" && !run.status.is_final()).map(Action::Cancel));
        actions.extend(
            numbers(&world.jobs, |job| job.process == Process::Unstarted && world.workflow(job) == "a")
                .map(Action::GiveBack),
        );
        let over = |job: &Job| matches!(job.process, Process::Ended(_) | Process::Killed) && world.heard(job.host);
        actions.extend(numbers(&world.jobs, |job| over(job) && world.workflow(job) == "a").map(Action::LoseEnd));
        actions.push(Action::Pause("a"));
        // A host that has nothing to do is none the worse for it. What is in its hands for `b` only is what `a` sees, too.
        let busy = |host: &usize| world.jobs.iter().any(|job| job.host == *host && world.workflow(job) == "a");
        for host in (0..world.hosts.len()).filter(busy) {
            actions.extend(Fault::ALL.map(|fault| Action::Strike(fault, host)));
        }
    }

    /// Who is there to end the processes of a host in time.
    fn kills(&self, condition: Condition) -> bool {
        match condition {
            Condition::Well => !self.is(Wrong::NoSelfKill),
            Condition::WorkerFrozen | Condition::Down => !self.is(Wrong::NoGuard),
            Condition::HostFrozen | Condition::Thawed => false,
        }
    }

    fn of_hosts(&self, world: &World, actions: &mut Vec<Action>) {
        for (number, host) in world.hosts.iter().enumerate() {
            let jobs = || world.jobs.iter().filter(|job| job.host == number);
            let open = |process| matches!(process, Process::Alive | Process::Unstarted);
            let alive = jobs().any(|job| job.process == Process::Alive);
            let late = host.silence > Silence::Fresh;
            let must_kill = late && jobs().any(|job| open(job.process)) && self.kills(host.condition);
            match host.condition {
                Condition::Thawed => actions.push(Action::LookAtClock(number)),
                Condition::Well if must_kill => actions.push(Action::LookAtClock(number)),
                Condition::Well if world.heard(number) && late => actions.push(Action::Heartbeat(number)),
                Condition::WorkerFrozen if must_kill && alive => actions.push(Action::GuardsKill(number)),
                Condition::Down if alive && self.kills(host.condition) => actions.push(Action::GuardsKill(number)),
                _ => {}
            }
            if world.heard(number) && !late {
                let due = WORKFLOWS.into_iter().filter(|workflow| due(world, workflow));
                actions.extend(due.map(|workflow| Action::Claim(number, workflow)));
            }
            // Whoever has to end a process before the reaper may act gets to it in time.
            let in_time = host.silence == Silence::Fresh || !alive || !self.kills(host.condition);
            if !world.heard(number) && host.silence < Silence::Overdue && in_time && jobs().next().is_some() {
                actions.push(Action::TimePasses(number));
            }
        }
    }

    fn of_jobs(&self, world: &World, actions: &mut Vec<Action>) {
        for (number, job) in world.jobs.iter().enumerate() {
            let host = world.host(job);
            let heard = world.heard(job.host);
            let run = &world.rows.runs[job.lease.run];
            match job.process {
                Process::Unstarted if host.condition == Condition::Well && host.silence == Silence::Fresh => {
                    actions.push(Action::Begin(number));
                }
                Process::Alive if host.condition != Condition::HostFrozen => {
                    actions.push(Action::End(number, Verdict::Succeeded));
                    if run.max_attempts > 1 && !world.struck {
                        actions.push(Action::End(number, Verdict::Failed));
                    }
                }
                Process::Ended(_) | Process::Killed if heard => actions.push(Action::Settle(number)),
                _ => {}
            }
            let open = matches!(job.process, Process::Alive | Process::Unstarted);
            if heard && open && run.cancel_requested && world.holds(job.lease) {
                actions.push(Action::HearOfCancel(number));
            }
            let overdue = host.silence == Silence::Overdue && !world.outage && !self.is(Wrong::NoReaper);
            if overdue && world.holds(job.lease) && !world.sealed.contains(&job.lease) {
                actions.push(Action::Seal(number));
            }
        }
    }
}

fn of_clients(world: &World, actions: &mut Vec<Action>) {
    for (number, client) in world.clients.iter().enumerate() {
        match client.stage {
            Stage::Idle | Stage::Unknown => actions.push(Action::Send(number)),
            Stage::Told(_) | Stage::Gone => {}
        }
        // It takes the slot, or waits; what is refused changes nothing, whenever it is.
        let policy = client.request.policy;
        let may = world.rows.holder(client.request.workflow).is_none()
            || matches!(policy, Some(Policy::Wait | Policy::Replace))
            || client.request.later;
        if client.ghost && may {
            actions.push(Action::GhostLands(number));
        }
    }
}

fn of_time(world: &World, actions: &mut Vec<Action>) {
    for (number, run) in world.rows.runs.iter().enumerate() {
        match run.status {
            Status::Scheduled => actions.push(Action::Due(number)),
            Status::Queued if run.in_backoff => actions.push(Action::BackoffOver(number)),
            _ => {}
        }
    }
    actions.extend(world.sealed.iter().map(|lease| Action::Reap(*lease)));
}

/// The places of those that are so.
fn numbers<T>(of: &[T], so: impl Fn(&T) -> bool) -> impl Iterator<Item = usize> {
    (0..of.len()).filter(move |number| so(&of[*number]))
}

/// What comes first when all is well; `None` for what is then not done at all.
fn calm_rank(action: &Action) -> Option<u8> {
    Some(match action {
        Action::Thaw(_) | Action::Mend => 0,
        Action::LookAtClock(_) | Action::GuardsKill(_) => 1,
        Action::Resume(_) => 2,
        Action::Send(_) => 3,
        Action::Heartbeat(_) | Action::HearOfCancel(_) => 4,
        Action::Settle(_) => 5,
        Action::End(_, Verdict::Succeeded) => 6,
        Action::Begin(_) => 7,
        Action::Due(_) | Action::BackoffOver(_) => 8,
        Action::Claim(..) => 9,
        Action::TimePasses(_) => 10,
        Action::Seal(_) | Action::Reap(_) => 11,
        Action::GhostLands(_) | Action::End(..) | Action::Strike(..) | Action::LoseAnswer(_) => return None,
        Action::LoseEnd(_) | Action::Cancel(_) | Action::Pause(_) | Action::GiveBack(_) => return None,
    })
}
