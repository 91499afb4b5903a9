// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result, sys};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// A child of this process that has a copy of its memory and shares its files, and does nothing. It
/// ends when this is dropped.
#[derive(Debug)]
pub struct Fork(Pid);

impl Fork {
    /// `fork()`
    pub fn new() -> Result<Self> {
        sys::fork_and_pause().map(Self).map_err(|e| Error::new("fork", e))
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        let killed = kill_process(self.0, Signal::KILL);
        let ended = killed.and_then(|()| waitpid(Some(self.0), WaitOptions::empty()));
        debug_assert!(ended.is_ok());
    }
}
