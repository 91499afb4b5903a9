// SPDX-License-Identifier: GPL-2.0-only

//! What is common to all migrations: QEMU is asked how it stands, and waits have a limit.

use anyhow::{Context as _, Result, bail, ensure};
use events::{Event, Pass};
use harness::{Progress, Recorder};
use qemu_client::{Migration, MigrationCapability, MigrationStatus, Monitor, RunState};
use std::{
    cell::RefCell,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// How often QEMU is asked how things stand.
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

    /// Waits until a migration is as it should be, as long as it is in one of these states.
    pub fn migrating(
        &self,
        monitor: &Monitor,
        states: &[MigrationStatus],
        done: impl Fn(&Migration) -> bool,
    ) -> Result<Migration> {
        let mut wait = self.wait("for the migration");
        let mut passes = 0;
        loop {
            let migration = monitor.migration()?;
            if migration.dirty_syncs > passes {
                passes = migration.dirty_syncs;
                let (sent, remaining) = (migration.transferred, migration.remaining);
                self.say(Event::Pass(Pass { number: passes, sent, remaining }))?;
            }
            if done(&migration) {
                return Ok(migration);
            }
            let status = migration.status;
            if !states.contains(&status) {
                let why = migration.error.unwrap_or_else(|| "QEMU doesn't say why".into());
                bail!("the migration is {status:?}: {why}");
            }
            wait.poll(|| {
                let Migration { dirty_syncs, transferred, remaining, .. } = migration;
                let (sent, left) = (transferred >> 10, remaining >> 10);
                format!("{status:?}, pass {dirty_syncs}, {sent} KiB sent, {left} KiB left")
            })?;
        }
    }

    /// Waits until a destination has taken everything.
    pub fn arrived(&self, there: &Monitor) -> Result<()> {
        let mut wait = self.wait("for the destination to complete");
        loop {
            let migration = there.migration()?;
            match migration.status {
                MigrationStatus::Completed => return Ok(()),
                MigrationStatus::Failed => {
                    bail!("the destination failed: {}", migration.error.unwrap_or_default())
                }
                status => wait.poll(|| format!("{status:?}"))?,
            }
        }
    }
}

/// Begins a migration by this socket, with these capabilities at both ends, which then stays in pre-copy.
pub fn begin(
    here: &Monitor,
    there: &Monitor,
    socket: &Path,
    capabilities: &[MigrationCapability],
) -> Result<()> {
    here.set_capabilities(capabilities, true)?;
    there.set_capabilities(capabilities, true)?;
    let uri = format!("unix:{}", socket.display());
    there.migrate_incoming(&uri)?;
    here.hold_pre_copy()?;
    Ok(here.migrate(&uri)?)
}

/// Fails unless a machine runs, which it should after a migration that didn't succeed.
pub fn runs_on(monitor: &Monitor) -> Result<()> {
    let state = monitor.run_state()?;
    ensure!(state == RunState::running, "the machine is {state:?}, it should have gone on");
    Ok(())
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
        let limit = self.watch.limit;
        if self.since.elapsed() > limit {
            bail!("waited {} s {}: {}", limit.as_secs(), self.what, now());
        }
        if self.progress.is_due() {
            let text = format!("waiting {}: {}", self.what, now());
            self.watch.say(Event::Progress { text })?;
        }
        thread::sleep(POLL);
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
