//! API keys: what they look like, what they may, and for which workflows.

use std::fmt;
use std::fmt::Write as _;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// Most scopes or patterns that somebody may list.
const MOST_PATTERNS: usize = 100;
/// Longest pattern: that of a full workflow id.
const LONGEST_PATTERN: usize = 193;

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Look at everything but keys.
    Read,
    /// Start runs, cancel them and run them again.
    Enqueue,
    /// Claim runs and act for them.
    Work,
    /// Define and pause workflows, commands and HTTP targets among them, make keys, and all of the others.
    Admin,
}

impl Scope {
    /// Each of them.
    pub const ALL: [Self; 4] = [Self::Read, Self::Enqueue, Self::Work, Self::Admin];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Enqueue => "enqueue",
            Self::Work => "work",
            Self::Admin => "admin",
        }
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{}` is no scope: read, enqueue, work or admin", text.escape_debug());
        Self::ALL.into_iter().find(|scope| scope.as_str() == text).ok_or_else(wrong)
    }
}

/// Which workflows a key is for: those whose full id one of the patterns matches, where `*` stands for any characters, none too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Patterns(Vec<String>);

impl Patterns {
    /// These patterns: 1 to 100, of the characters of workflow ids and `*`.
    ///
    /// # Errors
    /// Which one is none, and why.
    pub fn new(patterns: Vec<String>) -> Result<Self, String> {
        if !(1..=MOST_PATTERNS).contains(&patterns.len()) {
            return Err(format!(
                "has {} entries: 1 to {MOST_PATTERNS}; leave it out for all workflows",
                patterns.len()
            ));
        }
        let known = |c: char| c.is_ascii_alphanumeric() || "._-@*".contains(c);
        let is_good = |text: &String| (1..=LONGEST_PATTERN).contains(&text.len()) && text.chars().all(known);
        match patterns.iter().find(|text| !is_good(text)) {
            None => Ok(Self(patterns)),
            Some(wrong) => {
                Err(format!("`{}` is not a workflow id, or a pattern such as deploy@*", wrong.escape_debug()))
            }
        }
    }

    /// Whether it is for this workflow.
    pub fn matches(&self, workflow_id: &str) -> bool {
        self.0.iter().any(|pattern| matches(pattern.as_bytes(), workflow_id.as_bytes()))
    }

    /// The same as a regular expression of Postgres.
    pub fn regex(&self) -> String {
        let patterns: Vec<_> = self.0.iter().map(|text| text.replace('.', "\\.").replace('*', ".*")).collect();
        format!("^(?:{})$", patterns.join("|"))
    }

    /// As they were given.
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

/// Without going back further than to the last `*`: however many there are, it takes no longer than their product.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut seen, mut star) = (0, 0, None);
    while seen < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, seen));
                at += 1;
            }
            Some(byte) if *byte == text[seen] => (at, seen) = (at + 1, seen + 1),
            _ => match star {
                Some((from, until)) => {
                    star = Some((from, until + 1));
                    (at, seen) = (from + 1, until + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

/// What somebody shows to be let in: `st_<id>_<secret>`. Printing it is handing it out.
pub struct Token {
    /// What it is known by.
    pub id: String,
    secret: String,
}

impl Token {
    /// A new one of random bytes.
    pub fn new(id: [u8; 6], secret: [u8; 32]) -> Self {
        Self { id: hex(&id), secret: hex(&secret) }
    }

    /// The hash that is kept. The secret is 256 random bits, so a fast one will do: slow ones are for what can be guessed.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.secret.as_bytes()).into()
    }

    /// Whether its secret is the one of `hash`, in a time that says nothing about how much of it is right.
    pub fn is_of(&self, hash: &[u8]) -> bool {
        self.hash().ct_eq(hash).into()
    }

    /// The text itself, to be shown once.
    pub fn reveal(&self) -> String {
        format!("st_{}_{}", self.id, self.secret)
    }
}

impl FromStr for Token {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (id, secret) = text.strip_prefix("st_").and_then(|rest| rest.split_once('_')).ok_or(())?;
        let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if id.len() != 12 || secret.len() != 64 || !is_hex(id) || !is_hex(secret) {
            return Err(());
        }
        Ok(Self { id: id.to_owned(), secret: secret.to_owned() })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "st_{}_***", self.id)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // a String takes everything
        text
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn patterns(list: &[&str]) -> Patterns {
        Patterns::new(list.iter().map(|text| (*text).to_owned()).collect()).unwrap()
    }

    #[test]
    fn a_star_stands_for_any_characters_and_nothing_else_does() {
        for (pattern, good, bad) in [
            ("deploy@*", vec!["deploy@prod", "deploy@a@b"], vec!["deploy", "deployer@x", "xdeploy@y"]),
            ("etl-*", vec!["etl-", "etl-a", "etl-a@b"], vec!["etl", "aetl-"]),
            ("a.b", vec!["a.b"], vec!["axb", "a.b.c", ""]),
            ("*a*b", vec!["ab", "xaxb", "aabab"], vec!["ba", "abx"]),
            ("*", vec!["x", ""], vec![]),
        ] {
            good.iter().for_each(|id| assert!(patterns(&[pattern]).matches(id), "{pattern} {id}"));
            bad.iter().for_each(|id| assert!(!patterns(&[pattern]).matches(id), "{pattern} {id}"));
        }
        assert!(patterns(&["x", "y*"]).matches("yes"));
        assert_eq!(patterns(&["a.b@*", "c"]).regex(), r"^(?:a\.b@.*|c)$");
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for list in [vec![], vec![String::new()], vec!["a b".into()], vec!["a|b".into()], vec!["x".into(); 101]] {
            assert!(Patterns::new(list.clone()).is_err(), "{list:?}");
        }
    }

    #[test]
    fn a_token_is_read_as_it_was_shown_and_is_not_printed() {
        let token = Token::new([1; 6], [0xab; 32]);
        let again: Token = token.reveal().parse().unwrap();
        assert!(again.is_of(&token.hash()) && again.id == "010101010101");
        assert!(!Token::new([1; 6], [0xac; 32]).is_of(&token.hash()));
        assert_eq!(format!("{token:?}"), "st_010101010101_***");
        let shown = token.reveal();
        for wrong in ["", "st_", "st_010101010101", &shown[1..], &shown.to_uppercase(), &format!("{shown}a")] {
            assert!(wrong.parse::<Token>().is_err(), "{wrong}");
        }
    }
}
