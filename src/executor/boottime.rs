//! CLOCK_BOOTTIME: `Instant` stands still while the machine is suspended, and a lease does not.

use std::ops::Add;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};
use serde::{Deserialize, Serialize};

/// A point in time on this machine's CLOCK_BOOTTIME, the same for all of its processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Boottime(Duration);

impl Boottime {
    /// Later than any other.
    pub const NEVER: Self = Self(Duration::MAX);

    /// Now.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        Self(Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or_default()))
    }

    /// How long ago this was.
    pub fn elapsed(self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }

    /// As the kernel takes it.
    pub(crate) fn timespec(self) -> Timespec {
        Timespec { tv_sec: i64::try_from(self.0.as_secs()).unwrap_or(i64::MAX), tv_nsec: self.0.subsec_nanos().into() }
    }
}

impl Add<Duration> for Boottime {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}
