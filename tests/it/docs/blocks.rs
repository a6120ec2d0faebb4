//! The fenced blocks of README.md and docs/*.md. The info string begins with the language; what follows it is for these tests.

use std::path::{Path, PathBuf};

/// A page for people.
pub struct Page {
    pub path: PathBuf,
    /// As one would link to it: `docs/api.md`.
    pub name: String,
    pub text: String,
}

/// A fenced block of a page.
pub struct Block {
    /// Where it is, for who has to mend it.
    pub place: String,
    pub language: String,
    /// What else the info string says.
    pub marks: Vec<String>,
    pub lines: Vec<String>,
}

impl Block {
    pub fn has(&self, mark: &str) -> bool {
        self.marks.iter().any(|own| own == mark)
    }

    /// Why it is not run.
    pub fn not_run(&self) -> Option<&str> {
        self.marks.iter().find_map(|mark| mark.strip_prefix("no-run")).map(|why| why.trim_start_matches(':'))
    }

    /// The file that it is to be, for the blocks that follow.
    pub fn file(&self) -> Option<&str> {
        self.marks.iter().map(String::as_str).find(|mark| mark.contains('.'))
    }

    /// The statuses of refusals that its requests are expected to meet, in order.
    pub fn refusals(&self) -> Vec<u16> {
        self.marks.iter().filter_map(|mark| mark.parse().ok()).collect()
    }

    pub fn text(&self) -> String {
        self.lines.join("\n")
    }
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and all of docs/*.md.
pub fn pages() -> Vec<Page> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    paths.sort();
    paths.insert(0, root().join("README.md"));
    let page = |path: PathBuf| Page {
        name: path.strip_prefix(root()).unwrap().display().to_string(),
        text: std::fs::read_to_string(&path).unwrap(),
        path,
    };
    paths.into_iter().map(page).collect()
}

impl Page {
    pub fn blocks(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = Vec::new();
        let mut open = false;
        for (at, line) in self.text.lines().enumerate() {
            match line.strip_prefix("```") {
                Some(_) if open => open = false,
                Some(info) => {
                    open = true;
                    let mut words = info.split_whitespace().map(str::to_owned);
                    let place = format!("{}:{}", self.name, at + 1);
                    let language = words.next().unwrap_or_default();
                    blocks.push(Block { place, language, marks: words.collect(), lines: Vec::new() });
                }
                None if open => blocks.last_mut().unwrap().lines.push(line.to_owned()),
                None => {}
            }
        }
        assert!(!open, "{}: a block without an end", self.name);
        blocks
    }

    /// Its lines outside of blocks.
    pub fn prose(&self) -> impl Iterator<Item = &str> {
        let mut open = false;
        self.text.lines().filter(move |line| {
            let fence = line.starts_with("```");
            open ^= fence;
            !open && !fence
        })
    }
}
