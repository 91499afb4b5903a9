// SPDX-License-Identifier: GPL-2.0-only

//! Threads that stay from round to round: to start one takes longer than most of what it does.

use anyhow::{Result, anyhow};
use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread::{self, JoinHandle},
};

/// A thread that does jobs, one after the other. Dropped, it ends.
pub struct Hand<J, D> {
    jobs: Option<Sender<J>>,
    done: Receiver<D>,
    thread: Option<JoinHandle<()>>,
}

impl<J: Send + 'static, D: Send + 'static> Hand<J, D> {
    /// That does its jobs so.
    pub fn new(mut work: impl FnMut(J) -> D + Send + 'static) -> Self {
        let (jobs, todo) = channel::<J>();
        let (results, done) = channel();
        let thread = thread::spawn(move || {
            for job in todo {
                if results.send(work(job)).is_err() {
                    break;
                }
            }
        });
        Self { jobs: Some(jobs), done, thread: Some(thread) }
    }

    /// Has it begin a job.
    pub fn begin(&self, job: J) -> Result<()> {
        let jobs = self.jobs.as_ref().ok_or_else(|| anyhow!("a thread that ends"))?;
        jobs.send(job).map_err(|_| anyhow!("a thread panicked"))
    }

    /// Waits for the end of the job.
    pub fn end(&self) -> Result<D> {
        self.done.recv().map_err(|_| anyhow!("a thread panicked"))
    }
}

impl<J, D> Drop for Hand<J, D> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It has said so already if it panicked.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_does_one_job_after_the_other_and_may_panic() {
        let hand = Hand::new(|n: u32| 10 / n);
        for n in [1, 2, 5] {
            hand.begin(n).unwrap();
            assert_eq!(hand.end().unwrap(), 10 / n);
        }
        hand.begin(0).unwrap();
        assert!(hand.end().is_err());
    }
}
