// SPDX-License-Identifier: GPL-2.0-only

//! Where threads wait for each other, so that what they do next is done at the same time.

use std::{
    hint::spin_loop,
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

/// How long they wait at most: one may be in something long, which is what the others are to meet, or not run at
/// all, as its CPU has no time.
const PATIENCE: Duration = Duration::from_micros(500);

/// Who has ended is waited for no more.
const ENDED: u32 = u32::MAX;

/// Counts, for each thread, the meetings that it came to.
pub struct Meeting {
    came: Vec<AtomicU32>,
}

/// A thread that takes part; not any more once this is dropped.
pub struct Member<'a> {
    meeting: &'a Meeting,
    number: usize,
}

impl Meeting {
    /// Of so many threads.
    pub fn of(threads: usize) -> Self {
        Self { came: (0..threads).map(|_| AtomicU32::new(0)).collect() }
    }

    /// A thread takes part. Waits for all the others.
    pub fn begin(&self, number: usize) -> Member<'_> {
        let member = Member { meeting: self, number };
        member.wait(None);
        member
    }

    /// Whether a thread takes part no more.
    pub fn has_ended(&self, number: usize) -> bool {
        self.came[number].load(SeqCst) == ENDED
    }
}

impl Member<'_> {
    /// Waits for the others to come to as many meetings, for a short time.
    pub fn meet(&self) {
        self.wait(Some(PATIENCE));
    }

    fn wait(&self, limit: Option<Duration>) {
        let came = &self.meeting.came;
        let mine = came[self.number].fetch_add(1, SeqCst) + 1;
        let begin = Instant::now();
        while came.iter().any(|others| others.load(SeqCst) < mine) {
            if limit.is_some_and(|limit| begin.elapsed() > limit) {
                return;
            }
            // Whoever is waited for may be on this CPU.
            (0..20).for_each(|_| spin_loop());
            thread::yield_now();
        }
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.meeting.came[self.number].store(ENDED, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn who_is_early_waits() {
        let (meeting, late) = (Meeting::of(2), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(5));
                late.store(true, SeqCst);
                drop(meeting.begin(1));
            });
            let member = meeting.begin(0);
            assert!(late.load(SeqCst));
            // Nobody else is there any more, or comes.
            member.meet();
            assert!(!meeting.has_ended(0) && meeting.has_ended(1));
        });
    }

    #[test]
    fn who_does_not_come_is_not_waited_for_long() {
        let meeting = Meeting::of(2);
        let member = Member { meeting: &meeting, number: 0 };
        let begin = Instant::now();
        member.meet();
        assert!(begin.elapsed() >= PATIENCE);
    }
}
