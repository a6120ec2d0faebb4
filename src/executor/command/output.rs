//! The run's output: a JSON object in the last line of standard output.

use serde_json::Value;

use crate::executor::output::object;

/// The last line that is not blank, of a stream that may be endless or one single line.
pub(super) struct LastLine {
    limit: usize,
    line: Line,
    last: Option<Line>,
}

#[derive(Default)]
struct Line {
    bytes: Vec<u8>,
    too_long: bool,
}

/// What the last line turned out to be.
#[derive(Debug, PartialEq)]
pub(super) enum Found {
    Nothing,
    TooLong,
    Object(Value),
}

impl LastLine {
    pub(super) fn new(limit: usize) -> LastLine {
        LastLine { limit, line: Line::default(), last: None }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            if self.line.too_long || self.line.bytes.len() + text.len() > self.limit {
                self.line.too_long = true;
            } else {
                self.line.bytes.extend_from_slice(text);
            }
            if ends {
                self.end_line();
            }
        }
    }

    pub(super) fn found(mut self) -> Found {
        self.end_line();
        match self.last {
            None => Found::Nothing,
            Some(line) if line.too_long => Found::TooLong,
            Some(line) => object(&line.bytes).map_or(Found::Nothing, Found::Object),
        }
    }

    fn end_line(&mut self) {
        if self.line.too_long || !self.line.bytes.trim_ascii().is_empty() {
            // Swapped, not replaced: the two buffers serve all lines.
            std::mem::swap(self.last.get_or_insert_default(), &mut self.line);
        }
        self.line.bytes.clear();
        self.line.too_long = false;
    }
}
