// SPDX-License-Identifier: GPL-2.0-only

use std::time::{Duration, Instant};

/// How often a word is due.
const PERIOD: Duration = Duration::from_secs(2);

/// Tells the user how something stands that takes longer, in comments of the report.
pub struct Progress {
    last: Instant,
}

impl Progress {
    /// Of something that begins now.
    pub fn new() -> Self {
        Self { last: Instant::now() }
    }

    /// Says how it stands, if it is time to.
    pub fn say(&mut self, now: impl Fn() -> String) {
        if self.last.elapsed() >= PERIOD {
            self.last = Instant::now();
            println!("# ... {}", now());
        }
    }
}
