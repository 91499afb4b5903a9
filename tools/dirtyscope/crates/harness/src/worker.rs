// SPDX-License-Identifier: GPL-2.0-only

//! Work that may hang: it is done by another process of this program, which is watched.
//!
//! A task that waits in the kernel for a lock that nobody releases can't be killed, and its process
//! doesn't end. So it isn't waited for: what blocks it is reported, and the process is left alone.
//!
//! A worker has the same arguments as who started it. What it is to do, and in which log it writes what
//! it does, is in its environment.

use crate::{Log, process::stacks};
use anyhow::{Context as _, Result};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    env,
    io::{BufRead, BufReader, Write, stdin, stdout},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// The environment variable that says what a worker is to do.
pub const JOB: &str = "DIRTYSCOPE_WORKER";

/// How long a process may take to be killed that isn't blocked.
const KILLED: Duration = Duration::from_secs(1);

/// What a worker is to do, and where it logs it.
#[derive(Serialize, Deserialize)]
struct Assignment<T> {
    log: PathBuf,
    job: T,
}

/// A process of this program that sends messages.
pub struct Worker {
    child: Child,
    requests: ChildStdin,
    lines: Receiver<String>,
}

/// What a worker did.
pub enum Reported<T> {
    Message(T),
    Ended(ExitStatus),
    /// Nothing for too long. Says what its tasks wait for.
    Hung(String),
}

impl Worker {
    /// Starts this program once more, to do `job`.
    pub fn start(job: &impl Serialize, log: &Path) -> Result<Self> {
        let assignment = Assignment { log: log.to_owned(), job };
        let mut command = Command::new(env::current_exe()?);
        command.args(env::args_os().skip(1)).env(JOB, serde_json::to_string(&assignment)?);
        Self::run(command)
    }

    fn run(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start a worker")?;
        let requests = child.stdin.take().context("a worker without input")?;
        let out = child.stdout.take().context("a worker without output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            // Ends with the worker, or with us.
            BufReader::new(out).lines().map_while(Result::ok).try_for_each(|l| sender.send(l))
        });
        Ok(Self { child, requests, lines })
    }

    /// Asks it for something, see [`requests`]. That it has ended is noticed when it doesn't answer.
    pub fn request(&mut self, request: &impl Serialize) -> Result<()> {
        let _ = writeln!(self.requests, "{}", serde_json::to_string(request)?);
        Ok(())
    }

    /// Waits for its next message, at most for `limit`.
    pub fn next<T: DeserializeOwned>(&mut self, limit: Duration) -> Result<Reported<T>> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => {
                let message = serde_json::from_str(&line);
                Ok(Reported::Message(message.with_context(|| format!("a worker says {line:?}"))?))
            }
            Err(RecvTimeoutError::Disconnected) => match wait(&mut self.child, limit)? {
                Some(status) => Ok(Reported::Ended(status)),
                None => Ok(Reported::Hung(stacks(self.child.id()))),
            },
            Err(RecvTimeoutError::Timeout) => {
                let stacks = stacks(self.child.id());
                self.abandon()?;
                Ok(Reported::Hung(stacks))
            }
        }
    }

    /// Ends what isn't blocked in the kernel, and doesn't wait for the rest.
    pub fn abandon(&mut self) -> Result<()> {
        self.child.kill().context("kill a worker")?;
        // What isn't blocked may take a moment, and still write to the log.
        wait(&mut self.child, KILLED).map(drop)
    }

    /// Lets it end, as it does without further requests. Says what was wrong with that, if anything.
    pub fn finish(self, limit: Duration) -> Result<Option<String>> {
        let Self { mut child, requests, lines } = self;
        drop(requests);
        match lines.recv_timeout(limit) {
            Ok(line) => Ok(Some(format!("it says {line:?}"))),
            Err(RecvTimeoutError::Disconnected) => Ok(match wait(&mut child, limit)? {
                Some(status) => (!status.success()).then(|| format!("it ended, {status}")),
                None => Some(format!("it hung when it ended\n{}", stacks(child.id()))),
            }),
            Err(RecvTimeoutError::Timeout) => {
                let stacks = stacks(child.id());
                child.kill().context("kill a worker")?;
                Ok(Some(format!("it hung for {} s\n{stacks}", limit.as_secs())))
            }
        }
    }
}

/// Waits for the end of a process, which may hang in the kernel when it closes its files.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let begin = Instant::now();
    loop {
        let status = child.try_wait()?;
        if status.is_some() || begin.elapsed() > limit {
            return Ok(status);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// What this process is to do, and its log, if it is a worker. It doesn't survive who started it.
pub fn job<T: DeserializeOwned>() -> Result<Option<(T, Log)>> {
    let Some(text) = env::var_os(JOB) else { return Ok(None) };
    set_parent_process_death_signal(Some(Signal::KILL)).context("prctl PR_SET_PDEATHSIG")?;
    let text = text.to_str().context(JOB)?;
    let Assignment { log, job } = serde_json::from_str(text).context(JOB)?;
    Ok(Some((job, Log::open(&log)?)))
}

/// What is asked of this worker, until there is no more.
pub fn requests<T: DeserializeOwned>() -> impl Iterator<Item = Result<T>> {
    stdin().lines().map(|line| Ok(serde_json::from_str(&line?)?))
}

/// Sends a message to who started this worker.
pub fn send(message: &impl Serialize) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{}", serde_json::to_string(message)?)?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(script: &str) -> Option<String> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Worker::run(command).unwrap().finish(Duration::from_millis(500)).unwrap()
    }

    #[test]
    fn a_worker_that_does_not_end_well_is_noticed() {
        assert_eq!(finish("cat"), None);
        assert_eq!(finish("exit 3").unwrap(), "it ended, exit status: 3");
        assert!(finish("kill -SEGV $$").unwrap().contains("SIGSEGV"));
        assert_eq!(finish("echo 1").unwrap(), "it says \"1\"");
        assert!(
            finish("exec >&-; exec sleep 100").unwrap().starts_with("it hung when it ended\ntask ")
        );
        assert!(finish("exec sleep 100").unwrap().starts_with("it hung for 0 s\ntask "));
    }

    #[test]
    fn a_worker_that_hangs_is_noticed() {
        let mut command = Command::new("sleep");
        command.arg("100");
        let mut worker = Worker::run(command).unwrap();
        let reported = worker.next::<u32>(Duration::from_millis(100)).unwrap();
        assert!(matches!(reported, Reported::Hung(stacks) if stacks.starts_with("task ")));
    }
}
