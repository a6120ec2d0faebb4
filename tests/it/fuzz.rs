//! What strangers send, as text of any kind: it is read or refused, in no time, and never a panic. A second each; `make fuzz` takes a
//! minute. Targets of what is private are beside it, in modules of this name.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use singletrack::domain::workflow::check_key;
use singletrack::domain::{Lease, Missed, Patterns, Schedule, Token, TraceContext};
use singletrack::store::events::Position;

/// What one input may take, on a machine that does other things too.
const QUICK: Duration = Duration::from_secs(2);

/// A text made of these words, one for each byte.
fn words(bytes: &[u8], words: &[&str]) -> String {
    bytes.iter().map(|byte| words[usize::from(*byte) % words.len()]).collect()
}

#[test]
fn a_cron_of_any_kind_is_refused_or_has_ticks_one_after_the_other() {
    const PARTS: [&str; 16] =
        ["*", "*", "*", "0", "1", "2", "5", "12", "28", "29", "30", "31", "59", "FEB", "MON", "?"];
    const BETWEEN: [&str; 8] = ["/", "-", ",", "#", "L,", "W,", "", "+"];
    let part = |byte: u8| PARTS[usize::from(byte) % PARTS.len()];
    // Most fields are one part.
    let field = |[first, between, last]: [u8; 3]| match BETWEEN.get(usize::from(between) / 8) {
        Some(between) => format!("{}{between}{}", part(first), part(last)),
        None => part(first).to_owned(),
    };
    bolero::check!().with_type().for_each(|(fields, at, zone): &([[u8; 3]; 6], u32, u8)| {
        let time_zone = ["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Nowhere/At_All"][usize::from(*zone) % 4];
        // With a field for seconds or without.
        let cron = fields.map(field)[usize::from(*zone >> 7)..].join(" ");
        let schedule = Schedule { cron, time_zone: time_zone.into(), missed: Missed::RunOnce, input: None };
        let since = Instant::now();
        if let Ok(timetable) = schedule.timetable() {
            let now: DateTime<Utc> = DateTime::from_timestamp(i64::from(*at), 0).unwrap();
            let first = timetable.next_after(now).expect("one that never fires is refused");
            let second = timetable.next_after(first).expect("the calendar repeats");
            assert!(now < first && first < second, "{schedule:?}: {now}, {first}, {second}");
            let due = timetable.due(first, second).expect("ticks follow");
            assert!(due.fire == Some(second) && due.next > second, "{schedule:?}: {due:?}");
        }
        assert!(since.elapsed() < QUICK, "{schedule:?} took {:?}", since.elapsed());
    });
}

#[test]
fn a_lease_token_is_read_as_what_it_was_made_of_and_nothing_else_is_one() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        for text in [text.clone().into_owned(), format!("st1_{text}")] {
            if let Some(lease) = Lease::of_token(&text) {
                assert_eq!(lease.token().as_deref(), Some(&*text));
            }
        }
        if let Some((parts, _)) = bytes.split_first_chunk::<40>() {
            let part = |from: usize| uuid::Uuid::from_slice(&parts[from..from + 16]).unwrap();
            let fence = i64::from_be_bytes(parts[32..].try_into().unwrap());
            let lease = Lease { run_id: part(0), fence, secret: Some(part(16)) };
            assert_eq!(Lease::of_token(&lease.token().unwrap()), Some(lease));
        }
    });
}

#[test]
fn a_key_of_the_api_is_read_as_what_it_was_made_of_and_nothing_else_is_one() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let text = words(bytes, &["st", "_", "0", "9", "a", "f", "g", "0123456789ab", "0123456789abcdef", "é", "\0"]);
        if let Ok(token) = text.parse::<Token>() {
            assert_eq!(token.reveal(), text);
            assert!(token.is_of(&token.hash()) && !token.is_of(bytes));
        }
    });
}

#[test]
fn an_idempotency_key_that_is_let_in_is_one_that_postgres_and_headers_can_hold() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        if check_key(&text).is_ok() {
            assert!(!text.is_empty() && text.chars().count() <= 255 && !text.contains('\0'));
            assert!(reqwest::header::HeaderValue::from_bytes(text.as_bytes()).is_ok(), "{text:?}");
        }
    });
}

#[test]
fn the_id_of_an_event_is_read_as_what_it_was_written_as() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let text = words(bytes, &["0", "1", "9", "-", "+", " ", "9223372036854775807", "18446744073709551615", "٣"]);
        if let Ok(position) = text.parse::<Position>() {
            let again: Position = position.to_string().parse().unwrap();
            assert_eq!(again, position, "{text:?}");
        }
    });
}

#[test]
fn the_patterns_of_a_key_match_in_no_time() {
    bolero::check!().with_type().with_max_len(256).for_each(|(pattern, id): &(Vec<u8>, Vec<u8>)| {
        let pattern = words(pattern, &["*", "*", "a", "b", "@", "."]);
        let since = Instant::now();
        if let Ok(patterns) = Patterns::new(vec![pattern.clone()]) {
            let id = words(id, &["a", "b", "@", "."]);
            assert!(!patterns.matches(&id) || pattern.contains('*') || pattern == id, "{pattern} {id}");
        }
        assert!(since.elapsed() < QUICK, "{pattern} took {:?}", since.elapsed());
    });
}

#[test]
fn a_trace_context_that_is_read_is_written_as_the_standard_has_it() {
    const WORDS: [&str; 12] =
        ["00", "-", "0", "f", "a1", "01", "ff", "cc", "G", "+", "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"];
    bolero::check!().for_each(|bytes: &[u8]| {
        let text = words(bytes, &WORDS);
        if let Ok(context) = text.parse::<TraceContext>() {
            assert_eq!(context.to_string().parse(), Ok(context));
            assert_eq!(context.to_string()[2..], text[2..55], "{text}");
        }
    });
}
