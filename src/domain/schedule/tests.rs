#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::json;

use super::*;

fn timetable(cron: &str, zone: &str) -> Timetable {
    let schedule: Schedule = serde_json::from_value(json!({"cron": cron, "time_zone": zone})).unwrap();
    schedule.timetable().unwrap_or_else(|mistakes| panic!("{cron} {zone}: {mistakes:?}"))
}

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The ticks between two times.
fn between(timetable: &Timetable, from: &str, to: &str) -> Vec<DateTime<Utc>> {
    let ticks = std::iter::successors(timetable.next_after(at(from)), |tick| timetable.next_after(*tick));
    ticks.take_while(|tick| *tick <= at(to)).collect()
}

/// The same, as the wall clock of the zone shows them, with the offset.
fn shown(cron: &str, zone: &str, from: &str, to: &str) -> Vec<String> {
    let timetable = timetable(cron, zone);
    let ticks = between(&timetable, from, to);
    ticks.iter().map(|tick| tick.with_timezone(&timetable.zone).format("%d %H:%M %:z").to_string()).collect()
}

#[test]
fn a_time_of_day_comes_once_on_the_days_when_clocks_change() {
    // Each from noon before the change to noon after it, in UTC.
    let berlin = "Europe/Berlin"; // 02:00 to 03:00 and 03:00 to 02:00
    let new_york = "America/New_York"; // 02:00 to 03:00 and 02:00 to 01:00
    let lord_howe = "Australia/Lord_Howe"; // by half an hour: 02:00 to 02:30 and 02:00 to 01:30
    let nuuk = "America/Nuuk"; // over midnight: Saturday 23:00 to Sunday 00:00, and back
    for (zone, cron, from, to, expected) in [
        (
            berlin,
            "0 2 * * *",
            "2026-03-28T12:00:00Z",
            "2026-03-30T12:00:00Z",
            vec!["29 03:00 +02:00", "30 02:00 +02:00"],
        ),
        (
            berlin,
            "30 2 * * *",
            "2026-03-28T12:00:00Z",
            "2026-03-30T12:00:00Z",
            vec!["29 03:00 +02:00", "30 02:30 +02:00"],
        ),
        (berlin, "0 3 * * *", "2026-03-28T12:00:00Z", "2026-03-29T12:00:00Z", vec!["29 03:00 +02:00"]),
        (berlin, "59 1 * * *", "2026-03-28T12:00:00Z", "2026-03-29T12:00:00Z", vec!["29 01:59 +01:00"]),
        // Two of one gap come at its end, which is one tick.
        (
            berlin,
            "0,30 2,3 * * *",
            "2026-03-28T12:00:00Z",
            "2026-03-29T12:00:00Z",
            vec!["29 03:00 +02:00", "29 03:30 +02:00"],
        ),
        (
            berlin,
            "30 2,14 * * *",
            "2026-03-28T14:00:00Z",
            "2026-03-29T14:00:00Z",
            vec!["29 03:00 +02:00", "29 14:30 +02:00"],
        ),
        (
            berlin,
            "0 2 * * *",
            "2026-10-24T12:00:00Z",
            "2026-10-26T12:00:00Z",
            vec!["25 02:00 +02:00", "26 02:00 +01:00"],
        ),
        (
            berlin,
            "30 2 * * *",
            "2026-10-24T12:00:00Z",
            "2026-10-26T12:00:00Z",
            vec!["25 02:30 +02:00", "26 02:30 +01:00"],
        ),
        (
            berlin,
            "30 2,14 * * *",
            "2026-10-24T14:00:00Z",
            "2026-10-25T14:00:00Z",
            vec!["25 02:30 +02:00", "25 14:30 +01:00"],
        ),
        (berlin, "0 3 * * *", "2026-10-24T12:00:00Z", "2026-10-25T12:00:00Z", vec!["25 03:00 +01:00"]),
        (
            new_york,
            "0 2 * * *",
            "2026-03-07T12:00:00Z",
            "2026-03-09T12:00:00Z",
            vec!["08 03:00 -04:00", "09 02:00 -04:00"],
        ),
        (
            new_york,
            "30 2 * * *",
            "2026-03-07T12:00:00Z",
            "2026-03-09T12:00:00Z",
            vec!["08 03:00 -04:00", "09 02:30 -04:00"],
        ),
        (
            new_york,
            "30 1 * * *",
            "2026-10-31T12:00:00Z",
            "2026-11-02T12:00:00Z",
            vec!["01 01:30 -04:00", "02 01:30 -05:00"],
        ),
        (
            new_york,
            "0 2 * * *",
            "2026-10-31T12:00:00Z",
            "2026-11-02T12:00:00Z",
            vec!["01 02:00 -05:00", "02 02:00 -05:00"],
        ),
        (
            lord_howe,
            "15 2 * * *",
            "2026-10-03T00:00:00Z",
            "2026-10-05T00:00:00Z",
            vec!["04 02:30 +11:00", "05 02:15 +11:00"],
        ),
        (
            lord_howe,
            "45 1 * * *",
            "2026-04-04T00:00:00Z",
            "2026-04-06T00:00:00Z",
            vec!["05 01:45 +11:00", "06 01:45 +10:30"],
        ),
        (nuuk, "30 23 * * SAT", "2026-03-27T12:00:00Z", "2026-04-02T12:00:00Z", vec!["29 00:00 -01:00"]),
        (
            nuuk,
            "30 23 * * *",
            "2026-10-24T12:00:00Z",
            "2026-10-26T12:00:00Z",
            vec!["24 23:30 -01:00", "25 23:30 -02:00"],
        ),
        (berlin, "@daily", "2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z", vec!["29 00:00 +01:00", "30 00:00 +02:00"]),
    ] {
        assert_eq!(shown(cron, zone, from, to), expected, "{zone} {cron}");
    }
}

#[test]
fn an_interval_goes_on_in_real_time_when_clocks_change() {
    for (zone, from, to) in [
        ("Europe/Berlin", "2026-03-28T22:59:59Z", "2026-03-29T06:00:00Z"),
        ("Europe/Berlin", "2026-10-24T21:59:59Z", "2026-10-25T06:00:00Z"),
        ("America/New_York", "2026-03-08T04:59:59Z", "2026-03-08T12:00:00Z"),
        ("America/New_York", "2026-11-01T03:59:59Z", "2026-11-01T12:00:00Z"),
        ("Australia/Lord_Howe", "2026-04-04T11:59:59Z", "2026-04-04T20:00:00Z"),
        ("Australia/Lord_Howe", "2026-10-03T11:59:59Z", "2026-10-03T20:00:00Z"),
    ] {
        for (cron, every) in [("*/15 * * * *", 900), ("* * * * *", 60), ("*/10 * * * * *", 10)] {
            let ticks = between(&timetable(cron, zone), from, to);
            assert!(
                ticks.windows(2).all(|pair| pair[1] - pair[0] == TimeDelta::seconds(every)),
                "{zone} {cron} {ticks:?}"
            );
        }
    }
    let hourly = shown("0 * * * *", "Europe/Berlin", "2026-03-28T23:30:00Z", "2026-03-29T02:30:00Z");
    assert_eq!(hourly, ["29 01:00 +01:00", "29 03:00 +02:00", "29 04:00 +02:00"]);
    let hourly = shown("0 * * * *", "Europe/Berlin", "2026-10-24T23:30:00Z", "2026-10-25T02:30:00Z");
    assert_eq!(hourly, ["25 02:00 +02:00", "25 02:00 +01:00", "25 03:00 +01:00"]);
}

#[test]
fn the_fields_mean_what_they_say() {
    for (cron, expected) in [
        ("30 2 * * *", "2026-01-01 02:30:00 2026-01-02 02:30:00"),
        ("*/20 0 12 * * *", "2026-01-01 12:00:00 2026-01-01 12:00:20"),
        ("15 30 2 * * *", "2026-01-01 02:30:15 2026-01-02 02:30:15"),
        ("0 9 L * *", "2026-01-31 09:00:00 2026-02-28 09:00:00"),
        ("0 9 * * FRI#L", "2026-01-30 09:00:00 2026-02-27 09:00:00"),
        ("0 9 * * MON#2", "2026-01-12 09:00:00 2026-02-09 09:00:00"),
        ("0 9 15W * *", "2026-01-15 09:00:00 2026-02-16 09:00:00"),
        ("0 0 29 2 *", "2028-02-29 00:00:00 2032-02-29 00:00:00"),
        ("0 0 1 JAN,jul ?", "2026-07-01 00:00:00 2027-01-01 00:00:00"),
        ("0 0 * * 7", "2026-01-04 00:00:00 2026-01-11 00:00:00"),
        ("0 0 13 * FRI", "2026-01-02 00:00:00 2026-01-09 00:00:00"),
        ("0 0 13 * +FRI", "2026-02-13 00:00:00 2026-03-13 00:00:00"),
        ("0 9-10 * * MON-FRI", "2026-01-01 09:00:00 2026-01-01 10:00:00"),
        ("@weekly", "2026-01-04 00:00:00 2026-01-11 00:00:00"),
    ] {
        let timetable = timetable(cron, "UTC");
        let first = timetable.next_after(at("2026-01-01T00:00:00Z")).unwrap();
        let second = timetable.next_after(first).unwrap();
        let format = "%Y-%m-%d %H:%M:%S";
        assert_eq!(format!("{} {}", first.format(format), second.format(format)), expected, "{cron}");
    }
}

/// Crons of both kinds, and zones of every kind: north and south, by half an hour, over midnight, summer time that is the
/// standard one, changes for Ramadan, none at all.
fn every_kind() -> impl Iterator<Item = Timetable> {
    let crons = [
        "30 2 * * *",
        "0 0 * * *",
        "0,15,30,45 0,1,2,3 * * *",
        "15,45 30 1,2 * * SUN",
        "0 * * * *",
        "*/15 * * * *",
        "7 */3 * * *",
        "0 1-3 * * *",
        "*/7 30 * * * *",
        "* * * * * *",
        "30 23 L * *",
    ];
    let zones = [
        "UTC",
        "Europe/Berlin",
        "America/New_York",
        "Australia/Lord_Howe",
        "America/Nuuk",
        "Europe/Dublin",
        "Africa/Casablanca",
        "Asia/Kathmandu",
        "Pacific/Chatham",
        "Africa/Cairo",
        "Pacific/Apia",
    ];
    crons.into_iter().flat_map(move |cron| zones.map(|zone| timetable(cron, zone)))
}

#[test]
fn ticks_only_go_forward_and_whoever_asks_from_in_between_gets_the_same() {
    for timetable in every_kind() {
        let name = format!("{} {}", timetable.cron.as_str(), timetable.zone);
        // The days of the year's changes, most of them; and odd times in between, with fractions of a second.
        for day in ["2026-03-08", "2026-03-29", "2026-04-05", "2026-10-04", "2026-10-25", "2026-11-01", "2026-02-15"] {
            let start = at(&format!("{day}T00:00:00Z")) - TimeDelta::hours(16);
            let mut before = timetable.next_after(start).unwrap();
            for step in 0..40 {
                let asked = start + TimeDelta::milliseconds(step * 3_183_793);
                let next = timetable.next_after(asked).unwrap();
                assert!(next > asked && next >= before, "{name}: {next} after {asked}, {before} before");
                assert_eq!(
                    timetable.next_after(next - TimeDelta::milliseconds(1)),
                    Some(next),
                    "{name}: asked just before"
                );
                let following = timetable.next_after(next).unwrap();
                assert!(following > next, "{name}: {following} after {next}");
                let between = next + (following - next) / 2;
                assert_eq!(timetable.next_after(between), Some(following), "{name}: asked at {between}");
                before = next;
            }
        }
    }
}

#[test]
fn an_outage_of_any_length_ends_at_its_last_tick() {
    let now = at("2026-10-25T01:17:23.5Z");
    for timetable in every_kind() {
        for back in [1, 59, 3_600, 86_400, 40 * 86_400, 3_650 * 86_400] {
            let Some(tick) = timetable.next_after(now - TimeDelta::seconds(back)).filter(|tick| *tick <= now) else {
                continue;
            };
            let last = timetable.last(tick, now);
            assert!(tick <= last && last <= now, "{timetable:?} {last}");
            assert!(timetable.next_after(last).unwrap() > now, "{timetable:?}: {last} is not the last before {now}");
            assert_eq!(
                timetable.next_after(last - TimeDelta::seconds(1)),
                Some(last),
                "{timetable:?}: {last} is no tick"
            );
        }
    }
}

#[test]
fn a_tick_is_missed_after_a_minute_or_when_the_next_one_has_come() {
    let due = |missed: &str, cron: &str, tick: &str, now: &str| {
        let schedule: Schedule = serde_json::from_value(json!({"cron": cron, "missed": missed})).unwrap();
        let due = schedule.timetable().unwrap().due(at(tick), at(now)).unwrap();
        let shown = |at: DateTime<Utc>| at.format("%H:%M:%S").to_string();
        (due.fire.map(shown), shown(due.next), due.missed)
    };
    let (noon, hourly) = ("2026-01-01T12:00:00Z", "0 * * * *");
    let fires = |tick: &str, next: &str, missed| (Some(tick.to_owned()), next.to_owned(), missed);
    let skips = |next: &str| (None, next.to_owned(), true);
    for policy in ["skip", "run_once"] {
        assert_eq!(due(policy, hourly, noon, noon), fires("12:00:00", "13:00:00", false));
        assert_eq!(due(policy, hourly, noon, "2026-01-01T12:01:00Z"), fires("12:00:00", "13:00:00", false));
        // The ones before were missed; this one was not.
        assert_eq!(due(policy, hourly, noon, "2026-01-01T15:00:30Z"), fires("15:00:00", "16:00:00", true));
        assert_eq!(due(policy, "* * * * * *", noon, "2026-01-01T12:00:02.5Z"), fires("12:00:02", "12:00:03", true));
    }
    assert_eq!(due("skip", hourly, noon, "2026-01-01T12:01:01Z"), skips("13:00:00"));
    assert_eq!(due("skip", hourly, noon, "2026-01-01T15:30:00Z"), skips("16:00:00"));
    assert_eq!(due("run_once", hourly, noon, "2026-01-01T12:01:01Z"), fires("12:00:00", "13:00:00", true));
    assert_eq!(due("run_once", hourly, noon, "2026-01-01T15:30:00Z"), fires("15:00:00", "16:00:00", true));
}

#[test]
fn what_is_wrong_is_said_with_an_example_of_what_is_right() {
    let mistakes = |cron: &str, zone: &str| {
        let schedule: Schedule = serde_json::from_value(json!({"cron": cron, "time_zone": zone})).unwrap();
        schedule.mistakes()
    };
    for cron in [
        "",
        "often",
        "* * * *",
        "* * * * * * *",
        "0 0 1 1 * 2030 2031",
        "61 * * * *",
        "* 24 * * *",
        "*/0 * * * *",
        ", * * * *",
        "0 1, * * *",
        "0 0 * * MON,,TUE",
        "5-1 * * * *",
        "@often",
        "* * * * MON#6",
        "0 \u{e4} * * *",
        "+ + + + +",
    ] {
        let found = mistakes(cron, "UTC");
        assert_eq!(found.len(), 1, "{cron}: {found:?}");
        let (member, mistake) = &found[0];
        assert!(*member == "cron" && mistake.contains("`30 2 * * MON-FRI`"), "{cron}: {mistake}");
    }
    for cron in ["0 0 30 2 *", "0 0 31 4,6,9,11 *", "0 0 31 2 +MON", "* * * * +"] {
        assert_eq!(mistakes(cron, "UTC"), [("cron", format!("`{cron}` never fires: there is no such date"))]);
    }
    assert_eq!(mistakes(&"*,".repeat(200), "UTC"), [("cron", "has 400 bytes: at most 255".to_owned())]);
    for (zone, hint) in [
        ("Berlin", "perhaps Europe/Berlin"),
        ("europe/berlin", "perhaps Europe/Berlin"),
        ("new york", "perhaps America/New_York"),
        ("utc", "perhaps UTC"),
        ("CEST", "UTC, or an IANA name such as Europe/Berlin"),
        ("", "UTC, or an IANA name such as Europe/Berlin"),
        ("+02:00", "UTC, or an IANA name such as Europe/Berlin"),
    ] {
        assert_eq!(mistakes("* * * * *", zone), [("time_zone", format!("`{zone}` is not a time zone: {hint}"))]);
    }
    assert_eq!(mistakes("often", "Berlin").len(), 2, "both are said at once");
}
