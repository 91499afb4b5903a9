// SPDX-License-Identifier: GPL-2.0-only

//! How long this process was in the calls that this crate makes: of what a run takes, that is the kernel's share.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Nanoseconds, of all threads together.
static TIME: AtomicU64 = AtomicU64::new(0);

/// Until now, all threads together.
pub fn time() -> Duration {
    Duration::from_nanos(TIME.load(Relaxed))
}

/// Makes a call that counts.
pub(crate) fn timed<T>(call: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let value = call();
    TIME.fetch_add(begin.elapsed().as_nanos() as u64, Relaxed);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_add_up() {
        const PAUSE: Duration = Duration::from_millis(2);
        let before = time();
        assert_eq!(
            timed(|| {
                std::thread::sleep(PAUSE);
                7
            }),
            7
        );
        timed(|| std::thread::sleep(PAUSE));
        assert!(time() >= before + 2 * PAUSE);
    }
}
