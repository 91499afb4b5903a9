// SPDX-License-Identifier: GPL-2.0-only

use rustix::io::Errno;
use std::{fmt, io};

/// What went wrong: what was tried on what, the errno, and what to do about it if that is known.
#[derive(Debug)]
pub struct Error {
    what: String,
    errno: Option<Errno>,
    hint: &'static str,
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// `what` was tried, and the kernel said `errno`.
    pub(crate) fn new(what: impl Into<String>, errno: Errno) -> Self {
        Self { what: what.into(), errno: Some(errno), hint: "" }
    }

    /// `what` is wrong although no call failed.
    pub(crate) fn other(what: impl Into<String>) -> Self {
        Self { what: what.into(), errno: None, hint: "" }
    }

    pub(crate) fn hint(self, hint: &'static str) -> Self {
        Self { hint, ..self }
    }

    /// The errno, as in `errno.h`; 0 if no call failed.
    pub fn errno(&self) -> i32 {
        self.errno.map_or(0, Errno::raw_os_error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(errno) = self.errno {
            write!(f, ": {}", io::Error::from(errno))?;
        }
        if !self.hint.is_empty() {
            write!(f, "; {}", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
