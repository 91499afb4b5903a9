// SPDX-License-Identifier: GPL-2.0-only

use anyhow::{Context as _, Result, bail};
use std::{fmt, fs, io::ErrorKind, path::Path};

/// How a VM ended, as a line: `exit N`, `timeout SECONDS`, `died STATUS` or `failed STATUS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest ended it, with the exit status of the tool in it.
    Exit(i32),
    /// It was ended after so many seconds.
    Timeout(u64),
    /// It ended without a word, such as by a panic or a reset; with QEMU's exit status.
    Died(i32),
    /// It could not be run; with the status of what was to run it.
    Failed(i32),
    /// The user doesn't want to wait for it.
    Stopped,
}

impl Ending {
    /// Reads it from a file, if that is there.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let what = || path.display().to_string();
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text).with_context(what).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(what),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let wrong =
            || format!("{text:?} is none of exit N, timeout SECONDS, died STATUS, failed STATUS");
        let (what, number) = text.trim().split_once(' ').with_context(wrong)?;
        let status = || number.parse().with_context(wrong);
        Ok(match what {
            "exit" => Self::Exit(status()?),
            "timeout" => Self::Timeout(number.parse().with_context(wrong)?),
            "died" => Self::Died(status()?),
            "failed" => Self::Failed(status()?),
            _ => bail!(wrong()),
        })
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(0) => write!(f, "dirtyscope ended"),
            Self::Exit(40) => {
                write!(f, "dirtyscope in the VM, or the VM's setup, ended with status 40 or more")
            }
            Self::Exit(status) => write!(f, "dirtyscope in the VM ended with status {status}"),
            Self::Timeout(seconds) => write!(f, "the VM was stopped after {seconds} s"),
            Self::Died(status) => write!(
                f,
                "the kernel died: the VM panicked or was reset (QEMU ended with status {status})"
            ),
            Self::Failed(status) => write!(f, "the VM could not be run (status {status})"),
            Self::Stopped => write!(f, "stopped by the user"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        assert_eq!(Ending::parse("exit 4\n").unwrap(), Ending::Exit(4));
        assert_eq!(Ending::parse("timeout 300\n").unwrap(), Ending::Timeout(300));
        assert_eq!(Ending::parse("died 0").unwrap(), Ending::Died(0));
        assert_eq!(Ending::parse("failed 1").unwrap(), Ending::Failed(1));
        for wrong in ["", "exit", "exit x", "left 0"] {
            let error = format!("{:#}", Ending::parse(wrong).unwrap_err());
            assert!(error.contains("none of exit N"), "{error}");
        }
    }
}
