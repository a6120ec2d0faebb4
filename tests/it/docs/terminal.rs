//! The `sh` and `console` blocks of a page, in order, in one shell that talks to a live replica.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::blocks::{Block, Page, root};
use super::recorded::{Ids, same};
use crate::support::database::TestDb;
use crate::support::process::{Process, SHORT_LEASE};

/// Longest that all of a page may take.
const LIMIT: Duration = Duration::from_secs(180);

/// Comes before the output of a command, and before the status of an answer.
const COMMAND: char = '\u{1e}';
const STATUS: char = '\u{1d}';

/// What a block is to the shell.
enum Step<'a> {
    File(&'a Block),
    Block(&'a Block),
    /// A command of a `console` block, and the lines that it is shown to print.
    Shown(&'a Block, String, Vec<&'a str>),
}

impl Step<'_> {
    fn block(&self) -> &Block {
        match self {
            Self::File(block) | Self::Block(block) | Self::Shown(block, ..) => block,
        }
    }
}

/// Plays the page; what is not as it says, and the page as it should be.
pub async fn play(page: &Page) -> (Vec<String>, String) {
    let blocks = page.blocks();
    let steps: Vec<Step> = blocks.iter().filter(|block| block.not_run().is_none()).flat_map(steps).collect();
    let mut text = page.text.clone();
    if !steps.iter().any(|step| matches!(step, Step::Block(_) | Step::Shown(..))) {
        return (Vec::new(), text);
    }
    let test = TestDb::new().await;
    let replica = Process::serve(&test.url, SHORT_LEASE);
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let script = script(&steps).replace("localhost:7410", replica.client.base.strip_prefix("http://").unwrap());
    let (ended, out) = run(&script, folder.path(), &test.url, &replica.client.base);
    let out = out.replace(replica.client.base.strip_prefix("http://").unwrap(), "localhost:7410");

    let mut wrong = Vec::new();
    let mut differ: BTreeSet<&str> = BTreeSet::new();
    // By place, too: ids are the same over all commands of a block, so it is recorded as a whole.
    let mut ids: HashMap<&str, Ids> = HashMap::new();
    let mut recorded: HashMap<&str, Vec<(String, String)>> = HashMap::new();
    // By place: the refusals that the block says, and those that there were.
    let mut refused: BTreeMap<&str, (Vec<u16>, Vec<u16>)> = BTreeMap::new();
    let outputs: Vec<&str> = out.split(COMMAND).skip(1).collect();
    for (step, output) in steps.iter().zip(&outputs) {
        let (output, statuses) = without_statuses(output);
        let block = step.block();
        let refusals = statuses.into_iter().filter(|status| *status >= 400);
        refused.entry(&block.place).or_insert((block.refusals(), Vec::new())).1.extend(refusals);
        let Step::Shown(_, command, shown) = step else { continue };
        recorded
            .entry(&block.place)
            .or_default()
            .push((written(command, &shown.join("\n")), written(command, &output)));
        if !same(shown, &output, ids.entry(&block.place).or_default()) {
            wrong.push(format!("{}: $ {command}\nprints\n{output}\nand not\n{}", block.place, shown.join("\n")));
            differ.insert(&block.place);
        }
    }
    for (old, new) in differ.iter().flat_map(|place| &recorded[*place]) {
        text = text.replacen(old, new, 1);
    }
    let refused = refused.into_iter().filter(|(_, (said, met))| said != met);
    wrong.extend(
        refused.map(|(place, (said, met))| format!("{place}: requests were refused with {met:?}, and not {said:?}")),
    );
    if let (false, Some(last)) = (ended, outputs.last()) {
        let place = &steps[outputs.len() - 1].block().place;
        wrong.push(format!("{place}: a command failed, or took too long:\n{last}"));
    }
    (wrong, text)
}

/// A command and its output, as a page has them.
fn written(command: &str, output: &str) -> String {
    if output.is_empty() { format!("$ {command}\n") } else { format!("$ {command}\n{output}\n") }
}

fn steps(block: &Block) -> Vec<Step<'_>> {
    match block.language.as_str() {
        "sh" => vec![Step::Block(block)],
        "console" => shown(block),
        _ if block.file().is_some() => vec![Step::File(block)],
        _ => Vec::new(),
    }
}

/// The commands of a `console` block: what follows `$ `, and its lines up to one that leaves nothing open.
fn shown(block: &Block) -> Vec<Step<'_>> {
    let mut steps: Vec<(String, Vec<&str>)> = Vec::new();
    let mut more = false;
    for line in &block.lines {
        if let Some(command) = line.strip_prefix("$ ") {
            steps.push((command.to_owned(), Vec::new()));
        } else if more {
            let command = &mut steps.last_mut().unwrap().0;
            command.push('\n');
            command.push_str(line);
        } else {
            steps.last_mut().unwrap_or_else(|| panic!("{}: begins with no command", block.place)).1.push(line);
            continue;
        }
        // An open quote goes on as well.
        more = line.ends_with('\\') || steps.last().unwrap().0.matches('\'').count() % 2 == 1;
    }
    steps.into_iter().map(|(command, lines)| Step::Shown(block, command, lines)).collect()
}

fn script(steps: &[Step]) -> String {
    let mut script = String::from("exec 2>&1\nset -euo pipefail\n");
    for (at, step) in steps.iter().enumerate() {
        script.push_str(&format!("printf '{COMMAND}'\n"));
        match step {
            Step::File(block) => {
                let (file, text) = (block.file().unwrap(), block.text());
                script.push_str(&format!("cat >{file} <<'END OF FILE'\n{text}\nEND OF FILE\n"));
            }
            // What never ends is left to itself as soon as it has printed something; with the shell it is gone.
            Step::Block(block) if block.has("endless") => script.push_str(&format!(
                "{{\n{}\n}} >seen.{at} &\nfor _ in $(seq 1000); do [ -s seen.{at} ] && break; sleep 0.02; done\n[ -s seen.{at} ]\n",
                block.text()
            )),
            Step::Block(block) => script.push_str(&format!("{}\n", block.text())),
            Step::Shown(_, command, _) => script.push_str(&format!("{command}\n")),
        }
    }
    script.push_str("printf '\\004'\n");
    script
}

/// Whether the script came to its end, and all it has printed.
fn run(script: &str, folder: &std::path::Path, database: &str, base: &str) -> (bool, String) {
    let curlrc = format!(
        "silent\nshow-error\nnoproxy = \"*\"\nmax-time = 90\nwrite-out = \"%{{stderr}}{STATUS}%{{http_code}}\\n\"\n"
    );
    std::fs::write(folder.join(".curlrc"), curlrc).unwrap();
    std::fs::write(folder.join("script"), script).unwrap();
    let out = std::fs::File::create(folder.join("out")).unwrap();
    let binaries = std::path::Path::new(env!("CARGO_BIN_EXE_singletrack")).parent().unwrap();
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("bash");
    shell.arg("script").current_dir(folder).stdin(Stdio::null()).stdout(out).process_group(0);
    shell.env("PATH", path).env("HOME", folder).env("DATABASE_URL", database).env("SINGLETRACK_URL", base);
    shell.env("EXAMPLES", root().join("examples")).env("NO_COLOR", "1");
    let mut shell = shell.spawn().unwrap();
    let since = Instant::now();
    while shell.try_wait().unwrap().is_none() && since.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = kill_process_group(Pid::from_child(&shell), Signal::KILL);
    shell.wait().unwrap();
    let out = String::from_utf8_lossy(&std::fs::read(folder.join("out")).unwrap()).into_owned();
    // What was left in the background may have said something after it.
    match out.split_once('\u{4}') {
        Some((out, _)) => (true, out.to_owned()),
        None => (false, out),
    }
}

/// A command's output without the statuses of answers that are among it, and these.
fn without_statuses(output: &str) -> (String, Vec<u16>) {
    let mut pieces = output.split(STATUS);
    let mut text = pieces.next().unwrap().to_owned();
    let mut statuses = Vec::new();
    for piece in pieces {
        let (status, rest) = piece.split_once('\n').unwrap_or((piece, ""));
        statuses.push(status.parse().unwrap());
        text.push_str(rest);
    }
    (text.replace('\r', "").trim_end().to_owned(), statuses)
}
