//! What a statement does to the transaction it is in, by its text: the server says so only when it is too late to cut.
//!
//! It knows the functions of this product that write ([`WRITERS`]) and no others. It does not know `prepare` and `execute` as SQL,
//! two-phase commits, procedures that commit by themselves, and `commit and chain`; an `explain` of a write passes for one.

/// The functions in `migrations/` that write when they are called by a `select`.
pub const WRITERS: &[&str] = &[
    "advance_schedule",
    "cancel_run",
    "enqueue_run",
    "enqueue_run_as",
    "force_release_run",
    "meet_slot",
    "promote",
    "promote_if_free",
    "record_refusals",
    "replace_holder",
    "resume_workflow",
    "start_due",
];

/// Statements that write nothing, by their first word. The rest of those not looked into are taken for writes.
const READERS: &[&str] = &[
    "checkpoint",
    "close",
    "deallocate",
    "discard",
    "fetch",
    "listen",
    "lock",
    "move",
    "notify",
    "prepare",
    "release",
    "reset",
    "savepoint",
    "set",
    "show",
    "unlisten",
];

/// What a statement does to its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing that a commit would keep.
    Read,
    /// It leaves something to be committed.
    Write,
    /// From here on a commit takes a statement of its own.
    Begin,
    /// It commits what was written.
    Commit,
    /// It gives up what was written.
    Rollback,
}

/// What each of the statements in a text does, in their order.
pub fn kinds(text: &[u8]) -> Vec<Kind> {
    let text = String::from_utf8_lossy(text).to_lowercase();
    let tokens = tokens(&text);
    tokens.split(|token| *token == ";").filter(|statement| !statement.is_empty()).map(kind).collect()
}

fn kind(tokens: &[&str]) -> Kind {
    match tokens.iter().find(|token| **token != "(").copied().unwrap_or_default() {
        "begin" | "start" => Kind::Begin,
        "commit" | "end" => Kind::Commit,
        "rollback" if tokens.contains(&"to") => Kind::Read,
        "rollback" | "abort" => Kind::Rollback,
        "select" | "with" | "values" | "table" | "explain" | "declare" | "execute" if !writes(tokens) => Kind::Read,
        first if READERS.contains(&first) => Kind::Read,
        _ => Kind::Write,
    }
}

fn writes(tokens: &[&str]) -> bool {
    tokens.iter().enumerate().any(|(at, token)| {
        let next = tokens.get(at + 1).copied().unwrap_or_default();
        match *token {
            "insert" | "merge" => next == "into",
            "delete" => next == "from",
            // Not the lock of a `for update` or `for no key update`.
            "update" => !matches!(tokens[at.saturating_sub(1)], "for" | "key"),
            name => next == "(" && WRITERS.contains(&name),
        }
    })
}

/// The words and signs of a text, without comments and whatever is quoted.
fn tokens(text: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("--") {
            past(rest, 2, "\n")
        } else if rest.starts_with("/*") {
            past(rest, 2, "*/")
        } else if let Some(opening) = backslashed(rest) {
            opening
        } else if first == '\'' || first == '"' {
            past(rest, 1, &rest[..1])
        } else if let Some(tag) = dollar_tag(rest) {
            past(rest, tag.len(), tag)
        } else if in_word(first) {
            rest.find(|c| !in_word(c)).unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        if in_word(first) && backslashed(rest).is_none() || matches!(first, '(' | ';') {
            tokens.push(&rest[..length]);
        }
        rest = rest[length..].trim_start();
    }
    tokens
}

fn in_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `end` is behind, looked for from `from` on.
fn past(text: &str, from: usize, end: &str) -> usize {
    text[from..].find(end).map_or(text.len(), |at| from + at + end.len())
}

/// The length of an `e'...'`, in which a backslash may escape the quote.
fn backslashed(text: &str) -> Option<usize> {
    let inside = text.strip_prefix("e'")?;
    let mut escaped = false;
    let end = inside.find(|c| {
        let ends = c == '\'' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    });
    Some(end.map_or(text.len(), |at| 2 + at + 1))
}

/// The `$tag$` that a quoted text begins with; `$1` is none.
fn dollar_tag(text: &str) -> Option<&str> {
    let inside = text.strip_prefix('$')?;
    let length = inside.find('$')?;
    let named = inside[..length].chars().all(in_word) && !inside.starts_with(|c: char| c.is_ascii_digit());
    named.then(|| &text[..length + 2])
}
