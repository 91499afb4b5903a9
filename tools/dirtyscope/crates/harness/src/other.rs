// SPDX-License-Identifier: GPL-2.0-only

use crate::stacks;
use anyhow::{Context as _, Result, bail};
use std::{
    env,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Another process of this program. It is killed when this is dropped.
pub struct OtherProcess(Child);

impl OtherProcess {
    /// Starts one. Returns what it says first, too: a line.
    pub fn start(arguments: &[&str]) -> Result<(Self, String)> {
        let mut command = Command::new(env::current_exe()?);
        let child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut this = Self(child);
        let mut line = String::new();
        BufReader::new(this.0.stdout.take().context("no stdout")?).read_line(&mut line)?;
        if line.is_empty() {
            bail!("dirtyscope {} has ended, {}", arguments.join(" "), this.0.wait()?);
        }
        Ok((this, line.trim_end().into()))
    }

    /// Kills it. Fails if it is still there so long afterwards.
    pub fn kill(&mut self, limit: Duration) -> Result<()> {
        self.0.kill().context("kill")?;
        let begin = Instant::now();
        while self.0.try_wait()?.is_none() {
            if begin.elapsed() > limit {
                bail!("a process can't be killed:\n{}", stacks(self.0.id()));
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
