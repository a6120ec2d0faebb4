//! Where a run stands in a trace: W3C Trace Context, level 1 (<https://www.w3.org/TR/trace-context/>).

use std::fmt;
use std::str::FromStr;

/// A span, as the header `traceparent` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; never 0.
    pub trace_id: u128,
    /// The span; never 0.
    pub span_id: u64,
    /// Bit 0: it is recorded.
    pub flags: u8,
}

/// It is not a `traceparent`: the standard has it ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoTraceContext;

impl FromStr for TraceContext {
    type Err = NoTraceContext;

    /// Of a version that is newer than 00 what both have is read.
    fn from_str(text: &str) -> Result<Self, NoTraceContext> {
        let mut parts = text.split('-');
        let mut part = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits).ok_or(NoTraceContext)?;
            // from_str_radix takes a sign and capitals.
            let is_hex = part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            u128::from_str_radix(part, 16).ok().filter(|_| is_hex).ok_or(NoTraceContext)
        };
        let [version, trace_id, span_id, flags] = [part(2)?, part(32)?, part(16)?, part(2)?];
        if version == 0xff || trace_id == 0 || span_id == 0 || (version == 0 && parts.next().is_some()) {
            return Err(NoTraceContext);
        }
        let [Ok(span_id), Ok(flags)] = [u64::try_from(span_id), u64::try_from(flags)] else {
            return Err(NoTraceContext);
        };
        Ok(Self { trace_id, span_id, flags: flags.to_le_bytes()[0] })
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, self.flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standards_own_examples_are_read_and_written() {
        for text in [
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        ] {
            assert_eq!(text.parse::<TraceContext>().map(|context| context.to_string()), Ok(text.to_owned()));
        }
        let newer = "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-the-future".parse::<TraceContext>();
        let read = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned();
        assert_eq!(newer.map(|context| context.to_string()), Ok(read));
    }

    #[test]
    fn what_is_ill_formed_is_none() {
        for text in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
        ] {
            assert_eq!(text.parse::<TraceContext>(), Err(NoTraceContext), "{text}");
        }
    }
}
