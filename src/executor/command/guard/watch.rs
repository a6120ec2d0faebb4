//! Follows a run to its end, and brings it about when it must be: TERM, a grace, KILL.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, wait};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::Mode;
use super::family::Family;
use super::protocol::{Control, Order, Report, Start};
use crate::executor::boottime::Boottime;
use crate::executor::command::exit::Exit;

/// Between the first KILL and the next, for those that it has missed; doubled each time.
const KILL_AGAIN: Duration = Duration::from_millis(10);
/// The longest: what is left then sleeps in the kernel, perhaps for hours, and looking for it costs a look at all processes.
const KILL_RARELY: Duration = Duration::from_millis(500);

/// Where a run stands.
#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Running,
    /// Everybody was sent TERM, and has until then.
    Terminated(Boottime),
    /// Everybody was sent KILL, and is again then, so long after the last time.
    Killed(Boottime, Duration),
}

/// What it takes to follow a run, ready before the run is started.
pub(super) struct Watch {
    family: Family,
    /// Whether it heeds the worker's death and the deadline.
    heeds: bool,
    end_by: Boottime,
    grace: Duration,
    phase: Phase,
    exit: Option<Exit>,
    /// It was made to end.
    stopped: bool,
    children: SignalFd,
    timer: OwnedFd,
}

impl Watch {
    /// SIGCHLD must be blocked.
    pub(super) fn new(family: Family, mode: Mode, start: &Start) -> io::Result<Self> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self {
            family,
            heeds: mode != Mode::Off,
            end_by: if mode == Mode::Off { Boottime::NEVER } else { start.end_by },
            grace: start.grace,
            phase: Phase::Running,
            exit: None,
            stopped: false,
            children: SignalFd::with_flags(&SigSet::from(NixSignal::SIGCHLD), flags)?,
            // It also fires at once when a suspended machine wakes up past it.
            timer: timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?,
        })
    }

    /// Returns when nothing of the run is left.
    pub(super) fn follow(mut self, command: Pid, mut control: Control) -> io::Result<()> {
        let mut worker_lives = true;
        loop {
            let all_gone = self.reap(command)?;
            if all_gone {
                if let Some(exit) = self.exit {
                    control.report(&Report::Ended { exit, stopped: self.stopped });
                }
                return Ok(());
            }
            self.advance();
            let readable = self.wait(worker_lives.then_some(&control))?;
            if readable && control.receive().is_err() {
                worker_lives = false;
                if self.heeds {
                    self.kill();
                }
            }
            // One that ended by itself keeps its own result, even if the order came first.
            self.reap(command)?;
            while let Some(order) = control.received_order() {
                self.obey(order?);
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Renewed(end_by) if self.heeds => self.end_by = end_by,
            Order::Renewed(_) | Order::Start(_) => {}
            Order::Stop => self.terminate(),
            Order::Kill => self.kill(),
        }
    }

    /// Does what is due.
    fn advance(&mut self) {
        let now = Boottime::now();
        match self.phase {
            // What a command leaves behind would hold its files, ports and locks while the next run of its workflow starts.
            Phase::Running if self.exit.is_some() || now >= self.end_by => self.terminate(),
            Phase::Terminated(until) if now >= until => self.kill(),
            Phase::Killed(again, pause) if now >= again => self.strike((pause * 2).min(KILL_RARELY)),
            Phase::Running | Phase::Terminated(_) | Phase::Killed(..) => {}
        }
    }

    fn terminate(&mut self) {
        if self.phase != Phase::Running {
            return;
        }
        self.stopped = self.exit.is_none();
        // A grace that would end later, after a freeze, would be another run's time.
        let until = Boottime::now().min(self.end_by) + self.grace;
        if Boottime::now() >= until {
            return self.kill();
        }
        self.phase = Phase::Terminated(until);
        self.family.signal(Signal::TERM);
        // A stopped process would sleep through its grace.
        self.family.signal(Signal::CONT);
    }

    fn kill(&mut self) {
        self.stopped |= self.exit.is_none();
        self.strike(KILL_AGAIN);
    }

    fn strike(&mut self, pause: Duration) {
        self.family.signal(Signal::KILL);
        self.phase = Phase::Killed(Boottime::now() + pause, pause);
    }

    /// Collects who has ended; whether nobody is left. The orphans of a run are children of this process.
    fn reap(&mut self, command: Pid) -> io::Result<bool> {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == command => {
                    let signal = status.terminating_signal().map(Exit::Signal);
                    self.exit = status.exit_status().map(Exit::Code).or(signal);
                }
                Ok(Some(_)) => {}
                Ok(None) => return Ok(false),
                Err(Errno::CHILD) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until a child ends, something is due, or `control` can be read; whether it can.
    fn wait(&self, control: Option<&Control>) -> io::Result<bool> {
        let due = match self.phase {
            Phase::Running => self.end_by,
            Phase::Terminated(until) => until,
            Phase::Killed(again, _) => again,
        };
        let at = Itimerspec { it_interval: Timespec::default(), it_value: due.timespec() };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &at)?;
        let mut fds = vec![
            PollFd::new(&self.children, PollFlags::IN),
            PollFd::from_borrowed_fd(self.timer.as_fd(), PollFlags::IN),
        ];
        fds.extend(control.map(|control| PollFd::new(control, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let readable = fds.get(2).is_some_and(|control| !control.revents().is_empty());
        while self.children.read_signal()?.is_some() {}
        Ok(readable)
    }
}
