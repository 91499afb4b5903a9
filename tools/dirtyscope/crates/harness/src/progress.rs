// SPDX-License-Identifier: GPL-2.0-only

use std::time::{Duration, Instant};

/// How often a word is due.
const PERIOD: Duration = Duration::from_secs(2);

/// When to say how something stands that takes long.
pub struct Progress {
    last: Instant,
}

impl Progress {
    /// Of something that begins now.
    pub fn new() -> Self {
        Self { last: Instant::now() }
    }

    /// Whether it is time to say so.
    pub fn is_due(&mut self) -> bool {
        let due = self.last.elapsed() >= PERIOD;
        if due {
            self.last = Instant::now();
        }
        due
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}
