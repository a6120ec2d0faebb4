//! What was found: each figure with its floor, ratio and goal, as a table for people and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;
use serde_json::{Value, json};

use crate::process::folder;

/// What a figure is to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Nothing: it is told.
    None,
    AtLeast(f64),
    Under(f64),
    /// So many times its floor.
    TimesAtLeast(f64),
    TimesAtMost(f64),
}

/// What a figure is of.
#[derive(Clone, Debug)]
pub struct What {
    pub measure: String,
    pub name: String,
    pub unit: &'static str,
    /// The name of the figure, of the same measure, that it is compared with.
    pub floor: Option<String>,
    pub goal: Goal,
}

impl What {
    /// A figure without a goal.
    pub fn new(measure: &str, name: impl Into<String>, unit: &'static str) -> Self {
        Self { measure: measure.to_owned(), name: name.into(), unit, floor: None, goal: Goal::None }
    }

    pub fn goal(self, goal: Goal) -> Self {
        Self { goal, ..self }
    }

    pub fn against(self, floor: impl Into<String>) -> Self {
        Self { floor: Some(floor.into()), ..self }
    }
}

/// Everything that was found, in the order in which it was found first.
#[derive(Default)]
pub struct Report {
    figures: Vec<(What, Vec<f64>)>,
    /// What is told besides, by measure: series over time, sizes.
    details: BTreeMap<String, Value>,
}

impl Report {
    /// Adds a repetition.
    pub fn add(&mut self, what: What, value: f64) {
        eprintln!("    {}: {} {}", what.name, round(value), what.unit);
        match self.figures.iter_mut().find(|(known, _)| known.measure == what.measure && known.name == what.name) {
            Some((_, values)) => values.push(value),
            None => self.figures.push((what, vec![value])),
        }
    }

    pub fn detail(&mut self, measure: &str, detail: Value) {
        self.details.insert(measure.to_owned(), detail);
    }

    fn floor(&self, what: &What) -> Option<f64> {
        let name = what.floor.as_ref()?;
        let (_, values) =
            self.figures.iter().find(|(other, _)| other.measure == what.measure && other.name == *name)?;
        Some(median(values))
    }

    /// Writes `result.md` and `result.json`, and gives back the table.
    pub fn write(&self, about: &Value) -> Result<String> {
        let mut table = String::from(
            "| measure | figure | median (min to max) | floor | ratio | goal | |\n|---|---|---|---|---|---|---|\n",
        );
        let mut figures = Vec::new();
        for (what, values) in &self.figures {
            let (value, floor) = (median(values), self.floor(what));
            let ratio = floor.map(|floor| value / floor);
            let (least, most) = extremes(values);
            let (goal, met) = judge(what.goal, value, ratio);
            let mark = met.map_or("", |met| if met { "met" } else { "**missed**" });
            let range =
                if values.len() > 1 { format!(" ({} to {})", round(least), round(most)) } else { String::new() };
            let floor_text = floor.map(round).unwrap_or_default();
            let ratio_text = ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
            writeln!(
                table,
                "| {} | {} | {} {}{range} | {floor_text} | {ratio_text} | {goal} | {mark} |",
                what.measure,
                what.name,
                round(value),
                what.unit
            )?;
            figures.push(json!({
                "measure": what.measure, "name": what.name, "unit": what.unit, "median": value, "min": least, "max": most,
                "values": values, "floor": floor, "floor_name": what.floor, "ratio": ratio, "goal": goal, "met": met,
            }));
        }
        let result = json!({"about": about, "figures": figures, "details": self.details});
        let folder = folder()?;
        std::fs::write(folder.join("result.md"), format!("{}\n{table}", describe(about)))?;
        std::fs::write(folder.join("result.json"), format!("{result:#}\n"))?;
        Ok(table)
    }
}

/// The machine and the rest as a list.
fn describe(about: &Value) -> String {
    let mut text = String::from("# Benchmark\n\n");
    for (name, value) in about.as_object().into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        // Text takes everything.
        let _ = writeln!(text, "- {name}: {value}");
    }
    text
}

fn judge(goal: Goal, value: f64, ratio: Option<f64>) -> (String, Option<bool>) {
    match goal {
        Goal::None => (String::new(), None),
        Goal::AtLeast(least) => (format!("at least {}", round(least)), Some(value >= least)),
        Goal::Under(most) => (format!("under {}", round(most)), Some(value < most)),
        Goal::TimesAtLeast(least) => (format!("at least {least} x"), ratio.map(|ratio| ratio >= least)),
        Goal::TimesAtMost(most) => (format!("at most {most} x"), ratio.map(|ratio| ratio <= most)),
    }
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn extremes(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| (least.min(*value), most.max(*value)))
}

/// Three digits, and all of those before the point.
fn round(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middling if middling >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
