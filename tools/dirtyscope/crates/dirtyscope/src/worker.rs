// SPDX-License-Identifier: GPL-2.0-only

//! Work that may hang: it is done by another process of this program, which is watched.
//!
//! A task that waits in the kernel for a lock that nobody gives back can't be killed, and its process
//! doesn't end. So it isn't waited for: what blocks it is reported, and the process is left alone.

use anyhow::{Context as _, Result};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    env,
    ffi::OsString,
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader, Write as _, stdout},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

/// A process of this program that sends messages.
pub struct Worker {
    child: Child,
    lines: Receiver<String>,
}

/// What a worker did.
pub enum Event<T> {
    Message(T),
    Ended(ExitStatus),
    /// Nothing for too long. Says what its tasks wait for.
    Hung(String),
}

impl Worker {
    /// Starts this program with these arguments.
    pub fn start(arguments: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start a worker")?;
        let out = child.stdout.take().context("a worker without output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            // Ends with the worker, or with us.
            BufReader::new(out).lines().map_while(Result::ok).try_for_each(|l| sender.send(l))
        });
        Ok(Self { child, lines })
    }

    /// Waits for the next message, at most for `limit`.
    pub fn next<T: DeserializeOwned>(&mut self, limit: Duration) -> Result<Event<T>> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => {
                let message = serde_json::from_str(&line);
                Ok(Event::Message(message.with_context(|| format!("a worker says {line:?}"))?))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(Event::Ended(self.child.wait()?)),
            Err(RecvTimeoutError::Timeout) => {
                let stacks = stacks(self.child.id());
                self.abandon()?;
                let what = format!("hung: nothing happened for {} s", limit.as_secs());
                Ok(Event::Hung(format!("{what}\n{stacks}")))
            }
        }
    }

    /// Ends what isn't blocked in the kernel, and doesn't wait for the rest.
    pub fn abandon(&mut self) -> Result<()> {
        self.child.kill().context("kill a worker")
    }
}

/// How many tasks of a process wait in the kernel and can't be interrupted.
pub fn count_blocked(pid: u32) -> usize {
    tasks(pid).iter().filter(|task| state(task).starts_with('D')).count()
}

fn tasks(pid: u32) -> Vec<PathBuf> {
    let folder = fs::read_dir(format!("/proc/{pid}/task"));
    folder.into_iter().flatten().flatten().map(|task| task.path()).collect()
}

fn state(task: &Path) -> String {
    let status = fs::read_to_string(task.join("status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.unwrap_or("?").trim().to_owned()
}

/// What the tasks of a process wait for in the kernel. Those that can't be interrupted are the ones
/// that hang, if there are any.
pub fn stacks(pid: u32) -> String {
    let tasks = tasks(pid);
    let blocked = |task: &&PathBuf| state(task).starts_with('D');
    let any_blocked = tasks.iter().any(|task| blocked(&task));

    let mut text = String::new();
    for task in tasks.iter().filter(|task| blocked(task) || !any_blocked) {
        let id = task.file_name().unwrap_or_default().to_string_lossy();
        let _ = writeln!(text, "task {id}: {}", state(task));
        let stack = fs::read_to_string(task.join("stack")).unwrap_or_default();
        for line in stack.lines() {
            let _ = writeln!(text, "    {}", line.trim_start_matches("[<0>] "));
        }
    }
    text.trim_end().to_owned()
}

/// What a worker does first: it doesn't survive who started it.
pub fn begin() -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("prctl PR_SET_PDEATHSIG")
}

/// Sends a message to who started this worker.
pub fn send(message: &impl Serialize) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{}", serde_json::to_string(message)?)?;
    Ok(out.flush()?)
}
