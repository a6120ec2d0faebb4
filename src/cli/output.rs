//! What the commands of the client half print: data on standard output, what is told beside it on standard error. Colours only on a
//! terminal that wants them.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};

use anstyle::{AnsiColor, Style};
use chrono::{DateTime, Utc};
use serde_json::Value;
use unicode_width::UnicodeWidthStr as _;

/// Prints data; whether somebody still reads it. Who closed the pipe has seen enough, and that ends nothing but the printing.
pub(super) fn say(text: impl Display) -> bool {
    let mut out = anstream::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).is_ok()
}

/// Prints one JSON document.
pub(super) fn say_json(document: &Value) -> bool {
    say(format_args!("{document:#}\n"))
}

/// Tells a person something.
pub(super) fn tell(text: impl Display) {
    let _ = writeln!(anstream::stderr().lock(), "{text}");
}

/// A line on a terminal that is written over and over; nothing elsewhere.
pub(super) struct Progress {
    shown: bool,
    terminal: bool,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { shown: false, terminal: io::stderr().is_terminal() }
    }

    /// Whether somebody may see it.
    pub(super) fn is_seen(&self) -> bool {
        self.terminal
    }

    pub(super) fn show(&mut self, text: &str) {
        if self.terminal {
            let _ = write!(io::stderr().lock(), "\r\x1b[K{text}").and_then(|()| io::stderr().flush());
            self.shown = true;
        }
    }

    /// Takes the line away, so that something else can be printed.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(io::stderr().lock(), "\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Asks a person; `None` where there is nobody to be asked.
pub(super) fn is_confirmed(question: &str) -> Option<bool> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return None;
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).ok()?;
    Some(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// A part of a line.
pub(super) struct Cell(String, Style);

impl Cell {
    /// What is there as JSON; a dash where there is nothing.
    pub(super) fn of(value: &Value) -> Self {
        Self::text(words(value))
    }

    pub(super) fn text(text: impl Into<String>) -> Self {
        Self(printable(&text.into()), Style::new())
    }

    /// A status, in its colour.
    pub(super) fn status(value: &Value) -> Self {
        let status = words(value);
        let style = style_of(&status);
        Self(status, style)
    }
}

/// Aligned columns under their names.
pub(super) fn table<const N: usize>(names: [&str; N], rows: Vec<[Cell; N]>) -> String {
    let head = names.map(|name| Cell(name.to_owned(), Style::new().bold()));
    let rows: Vec<[Cell; N]> = std::iter::once(head).chain(rows).collect();
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].0.width()).max().unwrap_or(0));
    let line = |row: &[Cell; N]| {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (Cell(text, style), width))| {
            let padding = if column + 1 == N { 0 } else { width - text.width() + 2 };
            format!("{style}{text}{style:#}{}", " ".repeat(padding))
        });
        cells.collect::<String>().trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// Names and what they stand for, a line each; nothing of those that stand for nothing.
pub(super) fn facts<const N: usize>(facts: [(&str, Cell); N]) -> String {
    let there: Vec<_> = facts.into_iter().filter(|(_, Cell(text, _))| text != NOTHING).collect();
    let width = there.iter().map(|(name, _)| name.width()).max().unwrap_or(0);
    there.iter().map(|(name, Cell(text, style))| format!("{name:<width$}  {style}{text}{style:#}\n")).collect()
}

const NOTHING: &str = "-";

/// A value as people write it.
pub(super) fn words(value: &Value) -> String {
    match value {
        Value::Null => NOTHING.into(),
        Value::String(text) => printable(text),
        Value::Array(entries) => entries.iter().map(words).collect::<Vec<_>>().join(","),
        other => printable(&other.to_string()),
    }
}

/// Labels as people write them.
pub(super) fn labels(labels: &Value) -> String {
    let labels: Vec<_> = labels.as_object().into_iter().flatten().collect();
    match labels.as_slice() {
        [] => NOTHING.into(),
        labels => labels.iter().map(|(name, value)| format!("{name}={}", words(value))).collect::<Vec<_>>().join(" "),
    }
}

/// Without characters that would do something to a terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// Prints a piece of a log, as it is where no terminal shows it; whether somebody still reads it.
pub(super) fn say_log(text: &str, to_errors: bool) -> bool {
    // Colours and lines, but nothing else that does something to a terminal.
    let tame = || text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t' | '\x1b')).collect::<String>();
    let written = match (to_errors, io::stdout().is_terminal(), io::stderr().is_terminal()) {
        (false, false, _) => io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()),
        (true, _, false) => io::stderr().write_all(text.as_bytes()),
        (false, true, _) => write!(anstream::stdout().lock(), "{}", tame()),
        (true, _, true) => write!(anstream::stderr().lock(), "{}", tame()),
    };
    written.is_ok()
}

fn style_of(status: &str) -> Style {
    let colour = match status {
        "succeeded" => AnsiColor::Green,
        "failed" | "timed_out" | "stale" => AnsiColor::Red,
        "cancelled" | "skipped" => AnsiColor::Yellow,
        "running" => AnsiColor::Cyan,
        _ => return Style::new(),
    };
    Style::new().fg_color(Some(colour.into()))
}

/// A status as it is printed.
pub(super) fn coloured(status: &Value) -> String {
    let Cell(text, style) = Cell::status(status);
    format!("{style}{text}{style:#}")
}

/// A time of the API.
pub(super) fn time(value: &Value) -> Option<DateTime<Utc>> {
    value.as_str()?.parse().ok()
}

/// Seconds from one time of the API to another, or to now.
pub(super) fn seconds(from: &Value, to: &Value) -> Option<f64> {
    let to = time(to).unwrap_or_else(Utc::now);
    Some((to - time(from)?).as_seconds_f64().max(0.0))
}

/// A duration to two units: `3 min 5 s`.
pub(super) fn duration(seconds: f64) -> String {
    if seconds < 10.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds as u64;
    let two = |many: u64, large: &str, few: u64, small: &str| match few {
        0 => format!("{many} {large}"),
        few => format!("{many} {large} {few} {small}"),
    };
    match whole {
        0..60 => format!("{whole} s"),
        60..3_600 => two(whole / 60, "min", whole % 60, "s"),
        3_600..86_400 => two(whole / 3_600, "h", whole / 60 % 60, "min"),
        _ => two(whole / 86_400, "d", whole / 3_600 % 24, "h"),
    }
}

/// How long ago a time of the API was.
pub(super) fn ago(value: &Value) -> String {
    match time(value).map(|at| (Utc::now() - at).as_seconds_f64()) {
        None => NOTHING.into(),
        Some(seconds) if seconds < 0.0 => format!("in {}", duration(-seconds)),
        Some(seconds) => format!("{} ago", duration(seconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_whatever_is_in_them() {
        let rows = vec![
            [Cell::text("部署"), Cell::text("x\x1b[2J"), Cell::text("")],
            [Cell::text("deploy"), Cell::text("y"), Cell::text("z")],
        ];
        let lines: Vec<_> = table(["ID", "BY", "MORE"], rows)
            .lines()
            .map(|line| anstream::adapter::strip_str(line).to_string())
            .collect();
        assert_eq!(lines, ["ID      BY          MORE", "部署    x\\u{1b}[2J", "deploy  y           z"]);
    }

    #[test]
    fn durations_have_two_units_at_most() {
        let all = [0.04, 9.96, 59.9, 60.0, 185.0, 3_600.0, 7_260.0, 90_000.0].map(duration);
        assert_eq!(all, ["0.0 s", "10.0 s", "59 s", "1 min", "3 min 5 s", "1 h", "2 h 1 min", "1 d 1 h"]);
    }
}
