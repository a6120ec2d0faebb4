//! What becomes of a world by an action.

use singletrack::domain::{Status, Verdict};

use super::{Action, Condition, Fault, Job, Life, Process, Silence, Stage, World, Wrong};
use crate::model::{self, Answer, Lease, Pausable, RunNo, invariants, step};

impl Life {
    /// The world after `action`.
    pub(super) fn after(&self, world: &World, action: &Action) -> World {
        let mut next = world.clone();
        self.act(&mut next, action);
        let mut broken = invariants::broken_by_step(&world.rows, &next.rows);
        next.broken = next.broken.or_else(|| broken.pop());
        next.forget(world);
        next
    }

    fn act(&self, world: &mut World, action: &Action) {
        match *action {
            Action::Send(client) => self.send(world, client),
            Action::LoseAnswer(client) => {
                world.struck = true;
                world.clients[client].stage = Stage::Unknown;
                world.clients[client].ghost = true;
            }
            Action::GhostLands(client) => {
                world.clients[client].ghost = false;
                if self.known(world, client).is_none() {
                    self.insert(world, client);
                }
            }
            Action::Due(run) => world.commit(&model::Action::Due(run)),
            Action::BackoffOver(run) => world.commit(&model::Action::BackoffOver(run)),
            Action::Resume(workflow) => world.commit(&model::Action::Resume(Pausable::Workflow(workflow))),
            Action::Claim(host, workflow) => world.claim(host, workflow),
            Action::Begin(job) => world.jobs[job].process = Process::Alive,
            Action::End(job, verdict) => world.jobs[job].process = Process::Ended(verdict),
            Action::HearOfCancel(job) => world.jobs[job].process = Process::Ended(Verdict::Cancelled),
            Action::Settle(job) => self.settle(world, job),
            Action::LoseEnd(job) => {
                world.struck = true;
                let said = world.jobs[job];
                self.settle(world, job);
                world.jobs.insert(job, said);
            }
            Action::Heartbeat(host) => world.heartbeat(host),
            Action::LookAtClock(host) => self.look_at_clock(world, host),
            Action::GuardsKill(host) => world.kill(host, |process| process == Process::Alive),
            Action::TimePasses(host) => {
                let silence = &mut world.hosts[host].silence;
                *silence = if *silence == Silence::Fresh { Silence::PatienceOver } else { Silence::Overdue };
            }
            Action::Thaw(host) => self.thaw(world, host),
            Action::Mend => self.mend(world),
            Action::Seal(job) => world.sealed.push(world.jobs[job].lease),
            Action::Reap(lease) => self.reap(world, lease),
            Action::Strike(fault, whom) => world.strike(fault, whom),
            Action::Cancel(run) => world.meddle(&model::Action::Cancel(run)),
            Action::Pause(workflow) => world.meddle(&model::Action::Pause(Pausable::Workflow(workflow))),
            Action::GiveBack(job) => {
                let lease = world.jobs.remove(job).lease;
                world.meddle(&model::Action::Release(lease));
            }
        }
    }

    /// The run that an insert under the same id has made before.
    fn known(&self, world: &World, client: usize) -> Option<RunNo> {
        world.clients[client].runs.first().copied().filter(|_| !self.is(Wrong::NewId))
    }

    /// An insert, maybe sent again: who repeats the same one is told what became of it.
    fn send(&self, world: &mut World, client: usize) {
        let answer = match self.known(world, client) {
            Some(run) => Answer::Accepted(run),
            None => self.insert(world, client),
        };
        world.clients[client].stage = Stage::Told(answer);
    }

    /// The committed effect of an insert, and its answer.
    fn insert(&self, world: &mut World, client: usize) -> Answer {
        let request = world.clients[client].request.clone();
        let queued =
            world.rows.holder(request.workflow).filter(|holder| world.rows.runs[*holder].status == Status::Queued);
        let unseen = queued.filter(|_| self.is(Wrong::IndexWithoutQueued));
        let before = unseen.map(|holder| (holder, world.rows.runs[holder].clone()));
        if let Some((holder, _)) = &before {
            world.rows.runs[*holder].status = Status::Succeeded;
        }
        let (rows, answer) = step(&world.rows, &model::Action::Enqueue(request));
        world.rows = rows;
        if let Some((holder, run)) = before {
            world.rows.runs[holder] = run;
        }
        if let Answer::Accepted(run) = answer {
            world.clients[client].runs.push(run);
        }
        answer
    }

    fn settle(&self, world: &mut World, job: usize) {
        let Job { lease, process, .. } = world.jobs.remove(job);
        let verdict = if let Process::Ended(verdict) = process { verdict } else { Verdict::Stale };
        if !world.holds(lease) && self.is(Wrong::FinishWithoutGuard) {
            world.rows.runs[lease.run].status = verdict.status();
        } else {
            world.commit(&model::Action::Settle(lease, verdict));
        }
    }

    fn look_at_clock(&self, world: &mut World, host: usize) {
        world.hosts[host].condition = Condition::Well;
        if world.hosts[host].silence > Silence::Fresh && !self.is(Wrong::NoSelfKill) {
            world.kill(host, |process| matches!(process, Process::Alive | Process::Unstarted));
        }
    }

    /// A worker that stood still alone looks at its clock before anything else.
    fn thaw(&self, world: &mut World, host: usize) {
        match world.hosts[host].condition {
            Condition::HostFrozen => world.hosts[host].condition = Condition::Thawed,
            _ => self.look_at_clock(world, host),
        }
    }

    /// After an outage silence counts anew: nobody could be heard.
    fn mend(&self, world: &mut World) {
        world.hosts.iter_mut().for_each(|host| host.cut = false);
        if std::mem::take(&mut world.outage) && !self.is(Wrong::NoGrace) {
            for host in &mut world.hosts {
                host.silence = host.silence.min(Silence::PatienceOver);
            }
        }
    }

    fn reap(&self, world: &mut World, lease: Lease) {
        world.sealed.retain(|sealed| *sealed != lease);
        let runs = world.rows.runs[lease.run].status == Status::Running;
        if !(world.holds(lease) || runs && self.is(Wrong::ReapWithoutFence)) {
            return;
        }
        world.commit(&model::Action::WorkerLost(lease.run));
        if world.was_outage {
            world.broken = Some(format!("run {}: its worker was well, and could not say so", lease.run));
        }
    }
}

impl World {
    fn commit(&mut self, action: &model::Action) {
        self.rows = step(&self.rows, action).0;
    }

    fn meddle(&mut self, action: &model::Action) {
        self.struck = true;
        self.commit(action);
    }

    fn claim(&mut self, host: usize, workflow: model::Name) {
        let (rows, answer) = step(&self.rows, &model::Action::Claim(workflow));
        self.rows = rows;
        let Answer::Claimed(runs) = answer else { return };
        let leases = runs.into_iter().filter_map(|run: RunNo| self.rows.lease(run));
        let jobs = leases.map(|lease| Job { lease, host, process: Process::Unstarted });
        self.jobs.extend(jobs);
        // Who began first is of no matter.
        self.jobs.sort_by_key(|job| (job.lease.run, job.lease.claim));
    }

    /// All leases of a worker at once. What the reaper has shut out is lost, and ends.
    fn heartbeat(&mut self, host: usize) {
        self.hosts[host].silence = Silence::Fresh;
        for at in 0..self.jobs.len() {
            let Job { lease, host: of, process } = self.jobs[at];
            let lost = !self.holds(lease) || self.sealed.contains(&lease);
            if of == host && lost && matches!(process, Process::Alive | Process::Unstarted) {
                self.jobs[at].process = Process::Killed;
            }
        }
    }

    fn kill(&mut self, host: usize, which: impl Fn(Process) -> bool) {
        for job in self.jobs.iter_mut().filter(|job| job.host == host && which(job.process)) {
            job.process = Process::Killed;
        }
    }

    fn strike(&mut self, fault: Fault, whom: usize) {
        self.struck = true;
        match fault {
            Fault::Crash => self.hosts[whom].condition = Condition::Down,
            Fault::FreezeWorker => self.hosts[whom].condition = Condition::WorkerFrozen,
            Fault::FreezeHost => self.hosts[whom].condition = Condition::HostFrozen,
            Fault::Cut => self.hosts[whom].cut = true,
            Fault::Outage => (self.outage, self.was_outage) = (true, true),
        }
    }

    /// Drops what makes no difference any more, so that states which differ in nothing else are one.
    fn forget(&mut self, before: &Self) {
        let (rows, hosts) = (&self.rows, &self.hosts);
        self.jobs.retain(|job| {
            let down = hosts[job.host].condition == Condition::Down;
            !down || job.process == Process::Alive || rows.lease(job.lease.run) == Some(job.lease)
        });
        for (number, host) in self.hosts.iter_mut().enumerate() {
            if self.jobs.iter().all(|job| job.host != number) {
                host.silence = Silence::Fresh;
            }
        }
        // How an attempt ended: each has its own lease, and that is all that another one can meet.
        for run in &mut self.rows.runs {
            (run.reason, run.last) = (None, None);
            run.claims.fill(None);
            if run.status.is_final() {
                run.claims.truncate(1);
                (run.attempt, run.cancel_requested) = (run.attempt.min(1), false);
            }
        }
        for (client, was) in self.clients.iter_mut().zip(&before.clients) {
            let told = matches!(was.stage, Stage::Told(_) | Stage::Gone);
            if told && !was.ghost {
                client.stage = Stage::Gone;
                client.runs.clear();
            }
        }
        let overdue = self.hosts.iter().any(|host| host.silence == Silence::Overdue);
        self.was_outage &= self.outage || overdue || !self.sealed.is_empty();
        // Where both hosts are alike, the first job's is called 0.
        if self.hosts[0] == self.hosts[1] && self.jobs.first().is_some_and(|job| job.host == 1) {
            for job in &mut self.jobs {
                job.host = 1 - job.host;
            }
        }
    }
}
