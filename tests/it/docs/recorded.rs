//! What a command printed, beside what a page says it prints: the same but for ids, times and what takes how long.

use std::collections::HashMap;

use chrono::DateTime;
use uuid::Uuid;

/// Which id of a page stands for which one that was printed, and the other way round.
pub type Ids = HashMap<(bool, Uuid), Uuid>;

/// Whether `output` is what is shown, with the same ids in the same places. A line `...` stands for any lines.
pub fn same(shown: &[&str], output: &str, ids: &mut Ids) -> bool {
    let printed: Vec<&str> = output.lines().collect();
    let Some(pairs) = pairs(shown, &printed) else { return false };
    pairs.into_iter().all(|(shown, printed)| {
        let mut both = ids_of(shown).zip(ids_of(printed));
        both.all(|(shown, printed)| {
            *ids.entry((true, shown)).or_insert(printed) == printed
                && *ids.entry((false, printed)).or_insert(shown) == shown
        })
    })
}

/// Each line that is shown with the one that was printed.
fn pairs<'a>(shown: &[&'a str], printed: &[&'a str]) -> Option<Vec<(&'a str, &'a str)>> {
    match shown.split_first() {
        None => printed.is_empty().then(Vec::new),
        Some((line, rest)) if line.trim() == "..." => {
            (0..=printed.len()).find_map(|left_out| pairs(rest, &printed[left_out..]))
        }
        Some((line, rest)) => {
            let first = printed.first().filter(|printed| plain(printed) == plain(line))?;
            let mut more = pairs(rest, &printed[1..])?;
            more.insert(0, (line, first));
            Some(more)
        }
    }
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_ascii_alphanumeric() || "-:.+".contains(c)))
}

fn ids_of(line: &str) -> impl Iterator<Item = Uuid> {
    words(line).filter_map(|word| word.parse().ok())
}

/// A line with a word for each id, time and fraction; and one space for several.
fn plain(line: &str) -> String {
    let mut line = line.split_whitespace().collect::<Vec<_>>().join(" ");
    let found: Vec<String> = words(&line).map(str::to_owned).collect();
    for word in found {
        let kind = match word.as_str() {
            id if id.parse::<Uuid>().is_ok() => "<id>",
            time if DateTime::parse_from_rfc3339(time).is_ok() => "<time>",
            number if number.contains('.') && number.parse::<f64>().is_ok() => "<number>",
            _ => continue,
        };
        line = line.replacen(&word, kind, 1);
    }
    line
}

#[test]
fn ids_and_times_may_differ_and_nothing_else() {
    let [a, b] = [Uuid::now_v7(), Uuid::now_v7()];
    let shown =
        [format!("202 {a}"), "...".to_owned(), format!("{{\"at\":\"2026-11-22T15:55:34.464473Z\",\"of\":\"{a}\"}}")];
    let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
    let printed = |first, last| format!("202 {first}\nx\ny\n{{\"at\":\"2031-01-02T03:04:05Z\",\"of\":\"{last}\"}}");
    assert!(same(&shown, &printed(b, b), &mut Ids::new()));
    assert!(!same(&shown, &printed(b, a), &mut Ids::new()), "another run's id");
    let one: Vec<String> = [a, b].map(|id| id.to_string()).to_vec();
    let one: Vec<&str> = one.iter().map(String::as_str).collect();
    assert!(!same(&one, &format!("{a}\n{a}"), &mut Ids::new()), "one run that is shown as two");
    assert!(!same(&shown, &printed(b, b).replace("202", "200"), &mut Ids::new()));
    assert!(!same(&shown, &(printed(b, b) + "\nmore"), &mut Ids::new()));
}
