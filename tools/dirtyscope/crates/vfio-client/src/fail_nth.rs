// SPDX-License-Identifier: GPL-2.0-only

//! Allocations that fail on purpose, one at a time: `Documentation/fault-injection`.
//!
//! `/proc/thread-self/fail-nth` counts down with every allocation (or copy from and to user memory) of
//! this thread that may be made to fail, and the one at which it gets to 0 fails. It is armed for
//! the system calls of this crate only: nothing that the process does for itself between two of them
//! counts, or fails.

use crate::{Error, Result, calls::timed};
use rustix::io::Errno;
use std::{
    cell::Cell,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

const PATH: &str = "/proc/thread-self/fail-nth";

thread_local! {
    /// How many may still succeed, and the next one fails; 0 if none is to fail.
    static LEFT: Cell<u32> = const { Cell::new(0) };
}

/// Calls `f`, in whose system calls the `n`th allocation fails, counted from 1. Returns what it returned,
/// and whether there were so many.
///
/// Fails if the kernel has no fault injection.
pub fn with_failure<T>(n: u32, f: impl FnOnce() -> T) -> Result<(T, bool)> {
    Counter::open()?;
    LEFT.set(n);
    let value = f();
    Ok((value, LEFT.replace(0) == 0))
}

/// Makes a system call, which counts: see [`with_failure`]. Also for what closes files when it is
/// dropped.
pub fn counted<T>(call: impl FnOnce() -> T) -> T {
    let left = LEFT.get();
    if left == 0 {
        return timed(call);
    }
    let counter = Counter::open().expect("it was there before");
    counter.arm(left);
    let value = call();
    LEFT.set(counter.disarm());
    value
}

/// The same for the kernel's workers that belong to no CPU, one of which runs what this thread has
/// queued: each has a counter of its own.
///
/// Which one it will be isn't known, so all are armed. What they do for others counts, too.
pub struct Workers(Vec<Counter>);

impl Workers {
    /// The `n`th allocation of each fails.
    pub fn arm(n: u32) -> Result<Self> {
        let processes = fs::read_dir("/proc")
            .map_err(|e| Error::new("read /proc", Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
        let directories = processes.filter_map(|entry| Some(entry.ok()?.path()));
        let workers = directories.filter(|directory| {
            let name = fs::read_to_string(directory.join("comm")).unwrap_or_default();
            name.starts_with("kworker/u")
        });
        // One may have ended meanwhile.
        let counters: Vec<_> =
            workers.filter_map(|directory| Counter::at(&directory.join("fail-nth")).ok()).collect();
        for counter in &counters {
            counter.arm(n);
        }
        Ok(Self(counters))
    }

    /// Whether any of them had so many. From now on none fails.
    pub fn disarm(self) -> bool {
        let left = self.0.iter().map(Counter::disarm);
        left.fold(false, |used, left| used | (left == 0))
    }
}

/// The counter of a thread.
struct Counter(File);

impl Counter {
    fn open() -> Result<Self> {
        Self::at(Path::new(PATH))
    }

    fn at(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path);
        Ok(Self(file.map_err(|e| {
            let errno = Errno::from_io_error(&e).unwrap_or(Errno::IO);
            Error::new(format!("open {}", path.display()), errno)
                .hint("boot a kernel with CONFIG_FAULT_INJECTION and CONFIG_FAILSLAB, as root")
        })?))
    }

    fn arm(&self, n: u32) {
        self.0.write_at(n.to_string().as_bytes(), 0).expect("write to fail-nth");
    }

    /// What is left of it.
    fn disarm(&self) -> u32 {
        let mut text = [0; 16];
        let left = match self.0.read_at(&mut text, 0) {
            Ok(len) => {
                let text = std::str::from_utf8(&text[..len]).unwrap_or_default();
                text.trim_end().parse().expect("fail-nth is a number")
            }
            // The copy of the number was the next, and failed.
            Err(_) => 1,
        };
        // So may be the copy of this one.
        if self.0.write_at(b"0", 0).is_err() {
            self.0.write_at(b"0", 0).expect("write to fail-nth");
        }
        left
    }
}
