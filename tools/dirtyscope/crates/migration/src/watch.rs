// SPDX-License-Identifier: GPL-2.0-only

//! What is common to all migrations: the VMM is asked how it stands, and waits have a limit.

use crate::vmm::{Migration, Stage};
use anyhow::{Context as _, Result, bail};
use events::{Event, Pass};
use harness::{Progress, Recorder};
use std::{
    cell::RefCell,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// How often a VMM is asked how things stand.
const POLL: Duration = Duration::from_millis(10);

/// Waits for things, and says meanwhile how they stand.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    recorder: &'a RefCell<Recorder>,
    limit: Duration,
}

impl<'a> Watch<'a> {
    /// After `limit`, something that should happen by itself doesn't.
    pub fn new(recorder: &'a RefCell<Recorder>, limit: Duration) -> Self {
        Self { recorder, limit }
    }

    /// Records something at once.
    pub fn say(&self, event: Event) -> Result<()> {
        self.recorder.borrow_mut().record(&event)
    }

    /// Begins to wait for something.
    pub fn wait(&self, what: &'static str) -> Wait<'a> {
        Wait { watch: *self, what, since: Instant::now(), progress: Progress::new() }
    }

    /// Waits until a migration is as it should be, as long as it is in one of these stages. `now` says
    /// how it stands.
    pub fn migrating(
        &self,
        now: impl Fn() -> Result<Migration>,
        stages: &[Stage],
        done: impl Fn(&Migration) -> bool,
    ) -> Result<Migration> {
        let mut wait = self.wait("for the migration");
        let mut passes = 0;
        loop {
            let migration = now()?;
            let Migration { stage, sent, remaining, .. } = migration;
            if migration.passes > passes {
                passes = migration.passes;
                self.say(Event::Pass(Pass { number: passes, sent, remaining }))?;
            }
            if done(&migration) {
                return Ok(migration);
            }
            if !stages.contains(&stage) {
                let why = migration.error.unwrap_or_else(|| "the VMM doesn't say why".into());
                bail!("the migration is {stage:?}: {why}");
            }
            wait.poll(|| {
                let (sent, left) = (sent >> 10, remaining >> 10);
                format!("{stage:?}, pass {passes}, {sent} KiB sent, {left} KiB left")
            })?;
        }
    }

    /// Waits until a destination has taken everything. `now` says how that stands.
    pub fn arrived(&self, now: impl Fn() -> Result<Migration>) -> Result<()> {
        let mut wait = self.wait("for the destination to complete");
        loop {
            let migration = now()?;
            match migration.stage {
                Stage::Completed => return Ok(()),
                Stage::Failed => {
                    bail!("the destination failed: {}", migration.error.unwrap_or_default())
                }
                stage => wait.poll(|| format!("{stage:?}"))?,
            }
        }
    }
}

/// A wait for something, with a limit.
pub struct Wait<'a> {
    watch: Watch<'a>,
    what: &'static str,
    since: Instant,
    progress: Progress,
}

impl Wait<'_> {
    /// Sleeps a bit; fails if that was done for too long. `now` says how it stands.
    pub fn poll(&mut self, now: impl Fn() -> String) -> Result<()> {
        self.poll_after(POLL, now)
    }

    /// As [`Wait::poll`], but sleeps for so long.
    pub fn poll_after(&mut self, interval: Duration, now: impl Fn() -> String) -> Result<()> {
        let limit = self.watch.limit;
        if self.since.elapsed() > limit {
            bail!("waited {} s {}: {}", limit.as_secs(), self.what, now());
        }
        if self.progress.is_due() {
            let text = format!("waiting {}: {}", self.what, now());
            self.watch.say(Event::Progress { text })?;
        }
        thread::sleep(interval);
        Ok(())
    }
}

/// A directory for what machines leave in the file system, in memory if there is a place for that.
/// Removed when dropped.
pub fn new_directory() -> Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("dirtyscope-");
    let shm = Path::new("/dev/shm");
    let directory = if shm.is_dir() { builder.tempdir_in(shm) } else { builder.tempdir() };
    directory.context("make a directory for the machines")
}
