//! When a workflow runs by itself: a cron in a time zone, and what becomes of the ticks that nobody was there for.

use chrono::{DateTime, MappedLocalTime, NaiveDateTime, TimeDelta, TimeZone as _, Utc};
use chrono_tz::{GapInfo, TZ_VARIANTS, Tz};
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use serde::{Deserialize, Serialize};

/// How late a tick may be served and still count as served in time.
pub const GRACE: TimeDelta = TimeDelta::seconds(60);

/// Longest cron, in bytes.
const LONGEST: usize = 255;

/// When a workflow runs by itself. Each tick of the cron makes a run, which meets the slot as any other: `on_conflict` of the
/// workflow says what it does when the slot is taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Minute, hour, day of month, month and day of week, with a field for seconds in front if there are six. With
    /// `L` (last), `W` (nearest weekday) and `#` (nth weekday of the month), names such as `MON` and `JAN`, and `@daily` and
    /// its like. Day of month and day of week are alternatives, unless the latter begins with `+`.
    #[schema(example = "30 2 * * *", max_length = 255)]
    pub cron: String,
    /// The IANA name of the time zone in which the cron is meant.
    #[serde(default = "utc")]
    #[schema(default = "UTC", example = "Europe/Berlin")]
    pub time_zone: String,
    /// What becomes of ticks that no replica was there for.
    #[serde(default)]
    #[schema(default = "skip")]
    pub missed: Missed,
    /// Input of its runs.
    #[serde(default)]
    #[schema(value_type = Value)]
    pub input: Option<serde_json::Value>,
}

/// What becomes of missed ticks. A tick is missed when no replica served it within a minute, or before the next one came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Missed {
    /// There is no run for them.
    #[default]
    Skip,
    /// There is one run for all of them, at the time of the last.
    RunOnce,
}

fn utc() -> String {
    "UTC".to_owned()
}

impl Schedule {
    /// What it comes to.
    ///
    /// # Errors
    /// Every wrong member, and what is wrong with it.
    pub fn timetable(&self) -> Result<Timetable, Vec<(&'static str, String)>> {
        match (parse_cron(&self.cron), parse_zone(&self.time_zone)) {
            (Ok(cron), Ok(zone)) => {
                let timetable = Timetable { at_times: names_times(&cron), cron, zone, missed: self.missed };
                // The calendar repeats: a cron without a time after any one date has none at all.
                match timetable.next_after(DateTime::UNIX_EPOCH) {
                    Some(_) => Ok(timetable),
                    None => Err(vec![("cron", format!("`{}` never fires: there is no such date", self.cron))]),
                }
            }
            (cron, zone) => {
                let wrong = [("cron", cron.err()), ("time_zone", zone.err())];
                Err(wrong.into_iter().filter_map(|(member, mistake)| Some((member, mistake?))).collect())
            }
        }
    }

    /// Every wrong member, and what is wrong with it.
    pub(super) fn mistakes(&self) -> Vec<(&'static str, String)> {
        self.timetable().err().unwrap_or_default()
    }
}

/// The times at which a schedule fires, its ticks.
///
/// A cron whose seconds, minutes and hours are plain numbers, or lists of them, names times of day: each of them comes once
/// on every day that the cron names. Where clocks go forward, one that is left out is the first instant after the gap; where
/// they go back, it is the first of the two. Every other cron, such as `*/15 * * * *`, is an interval, and goes on in real time: it
/// has no ticks in what is left out, and ticks in both halves of what comes twice.
#[derive(Clone, Debug)]
pub struct Timetable {
    cron: Cron,
    zone: Tz,
    missed: Missed,
    at_times: bool,
}

/// What is to be done about a tick that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// The tick that there is to be a run for. Not the one that was asked about, where that was missed.
    pub fire: Option<DateTime<Utc>>,
    /// The tick after all of those that have come.
    pub next: DateTime<Utc>,
    /// Whether ticks were missed.
    pub missed: bool,
}

impl Timetable {
    /// The first tick after a time; `None` where there is none before the year 5000.
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        if !self.at_times {
            return self.cron.find_next_occurrence(&after.with_timezone(&self.zone), false).ok().map(|at| at.to_utc());
        }
        // On the wall clock alone, as if it never changed; then each time is looked up. A later one is never the earlier
        // instant, so that no tick is before where this begins.
        let mut wall = after.with_timezone(&self.zone).naive_local().and_utc();
        loop {
            wall = self.cron.find_next_occurrence(&wall, false).ok()?;
            let at = self.instant(wall.naive_utc())?;
            if at > after {
                return Some(at);
            }
        }
    }

    /// What to do at `now` about `tick`, which has come; `None` where no tick follows.
    pub fn due(&self, tick: DateTime<Utc>, now: DateTime<Utc>) -> Option<Due> {
        let last = self.last(tick, now);
        let late = now - last > GRACE;
        Some(Due {
            fire: (!late || self.missed == Missed::RunOnce).then_some(last),
            next: self.next_after(last)?,
            missed: late || last != tick,
        })
    }

    /// The last tick that is not after `now`, where `tick` is one of those. By halves: an outage of years takes thirty steps.
    fn last(&self, tick: DateTime<Utc>, now: DateTime<Utc>) -> DateTime<Utc> {
        let (mut last, mut end) = (tick, now);
        while end - last >= TimeDelta::seconds(1) {
            let middle = last + (end - last) / 2;
            match self.next_after(middle) {
                Some(next) if next <= end => last = next,
                _ => end = middle,
            }
        }
        last
    }

    /// When a wall clock shows this for the first time; where it never does, when the time that is left out is over.
    fn instant(&self, wall: NaiveDateTime) -> Option<DateTime<Utc>> {
        match self.zone.from_local_datetime(&wall) {
            MappedLocalTime::Single(at) | MappedLocalTime::Ambiguous(at, _) => Some(at.to_utc()),
            MappedLocalTime::None => Some(GapInfo::new(&wall, &self.zone)?.end?.to_utc()),
        }
    }
}

/// Whether its seconds, minutes and hours are numbers.
fn names_times(cron: &Cron) -> bool {
    let fields: Vec<&str> = cron.as_str().split_whitespace().collect();
    let dates = 3;
    let times = &fields[..fields.len().saturating_sub(dates)];
    times.iter().all(|field| field.chars().all(|c| c.is_ascii_digit() || c == ','))
}

fn parse_cron(text: &str) -> Result<Cron, String> {
    if text.len() > LONGEST {
        return Err(format!("has {} bytes: at most {LONGEST}", text.len()));
    }
    let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
    let parsed = match parser.parse(text) {
        // The library takes it for no minute at all, say, and would look for that one for minutes.
        Ok(_) if text.split_whitespace().any(|field| field.split(',').any(str::is_empty)) => {
            Err("a list has an empty entry".to_owned())
        }
        parsed => parsed.map_err(|error| error.to_string()),
    };
    parsed.map_err(|error| {
        format!(
            "`{}` is not a cron ({error}): it has five fields, such as `30 2 * * MON-FRI` for half past two on weekdays, or six \
             with seconds in front, such as `*/10 * * * * *`",
            text.escape_debug()
        )
    })
}

fn parse_zone(name: &str) -> Result<Tz, String> {
    name.parse().map_err(|_| {
        let given = name.to_lowercase().replace(' ', "_");
        let find = |same: fn(&str) -> &str| {
            TZ_VARIANTS.iter().map(|zone| zone.name()).find(|zone| same(&zone.to_lowercase()) == given)
        };
        // In other letters, or its city alone.
        let meant = find(|zone| zone).or_else(|| find(|zone| zone.rsplit('/').next().unwrap_or(zone)));
        let hint =
            meant.map_or("UTC, or an IANA name such as Europe/Berlin".to_owned(), |zone| format!("perhaps {zone}"));
        format!("`{}` is not a time zone: {hint}", name.escape_debug())
    })
}

#[cfg(test)]
mod tests;
