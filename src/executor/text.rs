//! Bytes from a pipe become chunks of valid text, cut at line ends where that is possible.

use std::time::Duration;

use tokio::time::Instant;

const CHUNK_BYTES: usize = 16 * 1024;
/// How long an unfinished line is held back: somebody may be waiting for a prompt or a progress bar.
const FLUSH_AFTER: Duration = Duration::from_millis(100);

/// Bytes becoming chunks of text.
#[derive(Default)]
pub(super) struct Text {
    /// The beginning of a character whose end was not read yet.
    carry: Vec<u8>,
    pending: String,
    /// When the unfinished line is to be sent as it is.
    pub(super) due: Option<Instant>,
}

impl Text {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let joined;
        let bytes = if self.carry.is_empty() {
            bytes
        } else {
            joined = [std::mem::take(&mut self.carry).as_slice(), bytes].concat();
            &joined
        };
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            if chunk.valid().contains('\0') {
                // Postgres refuses NUL in text.
                self.pending.push_str(&chunk.valid().replace('\0', "\u{fffd}"));
            } else {
                self.pending.push_str(chunk.valid());
            }
            let unfinished = chunks.peek().is_none()
                && std::str::from_utf8(chunk.invalid()).is_err_and(|error| error.error_len().is_none());
            if unfinished {
                self.carry = chunk.invalid().to_vec();
            } else if !chunk.invalid().is_empty() {
                self.pending.push('\u{fffd}');
            }
        }
        if self.due.is_none() && !self.pending.is_empty() {
            self.due = Some(Instant::now() + FLUSH_AFTER);
        }
    }

    /// The next chunk: whole lines where possible, all there is if `unfinished` may go too.
    pub(super) fn take(&mut self, unfinished: bool) -> Option<String> {
        let window = &self.pending[..self.pending.floor_char_boundary(CHUNK_BYTES)];
        let lines = window.rfind('\n').map(|end| end + 1);
        let end = if window.len() < self.pending.len() {
            lines.unwrap_or(window.len())
        } else if unfinished {
            window.len()
        } else {
            lines?
        };
        if end == 0 {
            return None;
        }
        let chunk = self.pending.drain(..end).collect();
        self.due = (!self.pending.is_empty()).then(|| Instant::now() + FLUSH_AFTER);
        Some(chunk)
    }

    pub(super) fn end(&mut self) {
        if !std::mem::take(&mut self.carry).is_empty() {
            self.pending.push('\u{fffd}');
        }
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    #[test]
    fn bytes_in_any_pieces_become_the_same_text_in_chunks_that_are_not_too_long() {
        bolero::check!().with_type().for_each(|pieces: &Vec<Vec<u8>>| {
            let (mut text, mut chunks) = (Text::default(), Vec::new());
            for piece in pieces {
                text.push(piece);
                chunks.extend(std::iter::from_fn(|| text.take(piece.len() % 2 == 0)));
            }
            text.end();
            chunks.extend(std::iter::from_fn(|| text.take(true)));
            assert!(chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() <= CHUNK_BYTES));
            let whole = String::from_utf8_lossy(&pieces.concat()).replace('\0', "\u{fffd}");
            assert_eq!(chunks.concat(), whole);
        });
    }
}
