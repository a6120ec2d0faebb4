//! The processes of the suite: started, killed, frozen, and started again, by one thread that they cannot outlive.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How often the thread looks after them.
const LOOK: Duration = Duration::from_millis(20);

/// All of them.
pub struct Members {
    all: Arc<Mutex<All>>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct All {
    members: Vec<Member>,
    /// Those that ended although nobody had asked for it.
    ended: Vec<String>,
    closing: bool,
    closed: bool,
}

struct Member {
    name: String,
    make: Box<dyn Fn() -> Command + Send>,
    log: PathBuf,
    child: Option<Child>,
    /// It was killed, or asked to end, and is not to be started before then.
    down_until: Option<Instant>,
    /// Where its log stood when it was started.
    log_from: u64,
    /// It may end by itself, with success.
    ends: bool,
    over: bool,
}

impl Members {
    pub fn new() -> Self {
        let all: Arc<Mutex<All>> = Arc::default();
        let kept = all.clone();
        // The kernel kills what a thread has started when that ends: it goes on until all of them are gone.
        let keeper = thread::spawn(move || {
            while lock(&kept).keep() {
                thread::sleep(LOOK);
            }
        });
        Self { all, keeper: Some(keeper) }
    }

    /// Adds one, which is started at once, and again whenever it was killed. Its output goes to a file of its name in `folder`.
    pub fn add(&self, name: &str, folder: &Path, ends: bool, make: impl Fn() -> Command + Send + 'static) {
        let log = folder.join(format!("{name}.log"));
        let member = Member {
            name: name.into(),
            make: Box::new(make),
            log,
            child: None,
            down_until: None,
            log_from: 0,
            ends,
            over: false,
        };
        lock(&self.all).members.push(member);
    }

    /// Its process, if it has one.
    pub fn pid(&self, name: &str) -> Option<Pid> {
        let all = lock(&self.all);
        let member = all.members.iter().find(|member| member.name == name)?;
        member.child.as_ref().map(Pid::from_child)
    }

    pub fn signal(&self, name: &str, signal: Signal) {
        if let Some(pid) = self.pid(name) {
            let _ = kill_process(pid, signal);
        }
    }

    /// Sends it a signal that ends it; it is started again after `down`.
    pub fn end(&self, name: &str, signal: Signal, down: Duration) {
        if let Some(member) = lock(&self.all).members.iter_mut().find(|member| member.name == name) {
            member.down_until = Some(Instant::now() + down);
        }
        self.signal(name, signal);
    }

    /// Whether it has ended for good.
    pub fn is_over(&self, name: &str) -> bool {
        lock(&self.all).members.iter().any(|member| member.name == name && member.over)
    }

    /// What ended without having been asked to.
    pub fn ended(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.all).ended)
    }

    /// Sends `signal` to all and waits until they are gone; those that are not within `limit` are told of, and killed, and so are
    /// replicas that do not end well.
    pub fn close(&mut self, signal: Signal, limit: Duration) -> Vec<String> {
        let Some(keeper) = self.keeper.take() else { return Vec::new() };
        let mut members = {
            let mut all = lock(&self.all);
            all.closing = true;
            std::mem::take(&mut all.members)
        };
        for member in &members {
            if let Some(child) = &member.child {
                let _ = kill_process(Pid::from_child(child), Signal::CONT);
                let _ = kill_process(Pid::from_child(child), signal);
            }
        }
        let patience = Instant::now() + limit;
        let mut findings = Vec::new();
        for member in &mut members {
            let Some(mut child) = member.child.take() else { continue };
            while matches!(child.try_wait(), Ok(None)) {
                if Instant::now() > patience {
                    findings.push(format!("{} did not end within {limit:?} of {signal:?}", member.name));
                    let _ = child.kill();
                }
                thread::sleep(LOOK);
            }
            if let Ok(status) = child.wait()
                && signal == Signal::TERM
                && member.name.starts_with("replica")
                && !status.success()
            {
                findings.push(format!("{} ended with {status} after TERM", member.name));
            }
        }
        lock(&self.all).closed = true;
        let _ = keeper.join();
        findings
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        self.close(Signal::KILL, Duration::from_secs(5));
    }
}

fn lock(all: &Mutex<All>) -> MutexGuard<'_, All> {
    all.lock().expect("nobody panics while holding it")
}

impl All {
    /// Starts what is down, notes what ended; whether to go on.
    fn keep(&mut self) -> bool {
        if self.closing {
            return !self.closed;
        }
        for member in &mut self.members {
            if let Some(status) = member.child.as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                member.child = None;
                if let Some(ended) = member.why(status) {
                    self.ended.push(ended);
                }
                // A supervisor waits a moment.
                member.down_until.get_or_insert(Instant::now() + Duration::from_millis(200));
                if member.ends && status.success() {
                    member.over = true;
                }
            }
            if !member.over && member.child.is_none() && member.down_until.is_none_or(|until| until < Instant::now()) {
                member.down_until = None;
                member.start();
            }
        }
        true
    }
}

impl Member {
    fn start(&mut self) {
        let log = OpenOptions::new().create(true).append(true).open(&self.log).expect("a log");
        self.log_from = log.metadata().map_or(0, |metadata| metadata.len());
        let made = (self.make)();
        // The kernel kills it with the thread that started it.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(made.get_program()).args(made.get_args()).env_clear();
        for (name, value) in made.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        let error = log.try_clone().expect("a log");
        let child = command.stdin(Stdio::null()).stdout(log).stderr(error).spawn();
        self.child = Some(child.unwrap_or_else(|error| panic!("{} can't be started: {error}", self.name)));
    }

    /// Why it should not have ended, if it should not.
    fn why(&self, status: ExitStatus) -> Option<String> {
        if self.down_until.is_some() || (self.ends && status.success()) {
            return None;
        }
        let said = said_since(&self.log, self.log_from);
        // One that found no database when it was started, or lost it then, and said so, is started again.
        let refused = said.contains("singletrack: can't");
        if !said.contains("\"ready\"") && refused {
            return None;
        }
        let last: Vec<&str> = said.lines().rev().take(3).collect();
        Some(format!("{} ended by itself ({status}): {last:?}", self.name))
    }
}

fn said_since(log: &Path, from: u64) -> String {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let mut said = Vec::new();
    if let Ok(mut file) = File::open(log) {
        let _ = file.seek(SeekFrom::Start(from));
        let _ = file.read_to_end(&mut said);
    }
    String::from_utf8_lossy(&said).into_owned()
}

/// The processes whose parent is `parent`.
pub fn children(parent: Pid) -> Vec<Pid> {
    let wanted = parent.as_raw_nonzero().get().to_string();
    processes().into_iter().filter(|pid| parent_of(*pid).as_deref() == Some(&wanted)).collect()
}

/// The processes that have `mark` in their environment.
pub fn marked(mark: &str) -> Vec<Pid> {
    let environment = |pid: &Pid| fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
    processes()
        .into_iter()
        .filter(|pid| environment(pid).windows(mark.len()).any(|window| window == mark.as_bytes()))
        .collect()
}

fn processes() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").expect("/proc");
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers.filter_map(Pid::from_raw).collect()
}

fn parent_of(pid: Pid) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name, in parentheses, may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1).map(str::to_owned)
}
