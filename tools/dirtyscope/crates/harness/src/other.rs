// SPDX-License-Identifier: GPL-2.0-only

use crate::stacks;
use anyhow::{Context as _, Result, bail};
use std::{
    env,
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Another process of this program. It is killed when this is dropped.
pub struct OtherProcess {
    child: Child,
    says: BufReader<ChildStdout>,
}

impl OtherProcess {
    /// Starts one. Returns what it says first, too: a line.
    pub fn start(arguments: &[&str]) -> Result<(Self, String)> {
        let mut command = Command::new(env::current_exe()?);
        let piped = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = piped.spawn()?;
        let says = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut this = Self { child, says };
        let line = this.line().with_context(|| format!("dirtyscope {}", arguments.join(" ")))?;
        Ok((this, line))
    }

    /// Waits for what it says next: a line.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.says.read_line(&mut line)?;
        if line.is_empty() {
            bail!("it has ended, {}", self.child.wait()?);
        }
        Ok(line.trim_end().into())
    }

    /// Kills it. Fails if it is still there so long afterwards.
    pub fn kill(&mut self, limit: Duration) -> Result<()> {
        self.child.kill().context("kill")?;
        let begin = Instant::now();
        while self.child.try_wait()?.is_none() {
            if begin.elapsed() > limit {
                bail!("a process can't be killed:\n{}", stacks(self.child.id()));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for OtherProcess {
    fn drop(&mut self) {
        // One that can't be killed isn't waited for.
        let _ = self.kill(Duration::from_secs(20));
    }
}
