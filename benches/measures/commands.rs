//! Commands that do nothing, with all that is around them, beside a bare loop that starts the same guard and waits for it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;
use tokio::time::sleep;

use super::Bench;
use crate::process::{SINGLETRACK, Serve};
use crate::report::{Goal, What};
use crate::server::Database;
use crate::workflows::{TRUE, fill};

/// Commands per second of the run: a little more than what two cores do.
const PER_SECOND: usize = 300;

pub async fn run(bench: &mut Bench) -> Result<()> {
    let (cores, count) = (std::thread::available_parallelism()?.get(), PER_SECOND * bench.plan.seconds as usize);
    let bare = format!("bare loop of guard and /bin/true, {cores} at once");
    for repetition in 0..bench.plan.repetitions {
        bench.says("commands", repetition);
        let floor = tokio::task::spawn_blocking(move || bare_loop(cores, count)).await??;
        bench.report.add(What::new("commands", &bare, "/s"), floor);
        let database = bench.server.database("own").await?;
        let rate = once(&database, count).await?;
        let what = What::new("commands", "/bin/true by serve, every default", "runs/s");
        bench.report.add(what.against(&bare).goal(Goal::TimesAtLeast(0.6)), rate);
        bench.server.remove(database).await?;
    }
    Ok(())
}

/// Runs per second from the first start to the last end, as the rows say. The service has as many slots as there are cores.
async fn once(database: &Database, count: usize) -> Result<f64> {
    fill(&database.db(1)?, TRUE, count).await?;
    database.execute("vacuum analyze test_runs").await?;
    database.execute("checkpoint").await?;
    let serve = Serve::with(database, &[]).await?;
    let left = "select count(*) from test_runs where status in ('queued', 'running')";
    let since = Instant::now();
    while database.number(left).await? > 0 {
        if since.elapsed() > Duration::from_secs(600) {
            bail!("the commands do not end");
        }
        sleep(Duration::from_millis(100)).await;
    }
    serve.stop().await?;
    let good = database.number("select count(*) from test_runs where status = 'succeeded'").await?;
    if usize::try_from(good)? != count {
        bail!("{good} of {count} commands succeeded");
    }
    let took = "select (extract(epoch from max(finished_at) - min(started_at)) * 1000000)::bigint from test_runs";
    Ok(count as f64 / (database.number(took).await? as f64 / 1e6))
}

/// Starts the guard as the service does, gives it its order, and waits until it is gone: per second.
fn bare_loop(threads: usize, count: usize) -> Result<f64> {
    let (left, starting) = (Arc::new(AtomicUsize::new(count)), Arc::new(Mutex::new(())));
    let begin = Instant::now();
    let threads: Vec<_> = (0..threads)
        .map(|_| {
            let (left, starting) = (left.clone(), starting.clone());
            std::thread::spawn(move || {
                let taken = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
                while taken().is_ok() {
                    guard_once(&starting)?;
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a thread of the bare loop panicked"))??;
    }
    Ok(count as f64 / begin.elapsed().as_secs_f64())
}

fn guard_once(starting: &Mutex<()>) -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut guard = {
        // One at a time: while it survives an exec, the other end must get into no other guard.
        let _alone = starting.lock().map_err(|_| anyhow::anyhow!("a thread of the bare loop panicked"))?;
        fcntl_setfd(&theirs, FdFlags::empty())?;
        let socket = theirs.as_raw_fd().to_string();
        let mut command = Command::new(SINGLETRACK);
        command.args(["guard", &socket, "auto"]).env_clear();
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        drop(theirs);
        spawned.context("can't start a guard")?
    };
    let order = json!({"Start": {
        "argv": ["/bin/true"], "cwd": null, "env": [], "user": null, "limits": {},
        "end_by": {"secs": 9_000_000_000_u64, "nanos": 0}, "grace": {"secs": 3, "nanos": 0},
    }});
    (&ours).write_all(format!("{order}\n").as_bytes())?;
    let mut said = String::new();
    for line in BufReader::new(&ours).lines() {
        said = line?;
        if said.contains("Ended") {
            break;
        }
    }
    guard.wait()?;
    match said.contains("Ended") {
        true => Ok(()),
        false => bail!("the guard of the bare loop did not run its command: {said}"),
    }
}
