// SPDX-License-Identifier: GPL-2.0-only

//! A stream in memory that is shared: between the processes of a run, and with the host of a VM, which
//! still has it when the VM's kernel has died.
//!
//! ```text
//! 0    MAGIC, 8 bytes
//! 8    bytes of the stream that stay, u64 in the machine's byte order
//! 16   bytes of the stream in all, u64: those behind the former are of the test in progress, and
//!      may be taken back
//! 64   the stream
//! ```
//!
//! A reader that follows the stream reads what stays. What is behind it is for those who want to know
//! what was done when nobody goes on: see [`Reader::rest`].

use crate::Event;
use std::{
    fs::File,
    io::{Error, ErrorKind, Result},
    os::unix::fs::FileExt,
    path::Path,
};

/// What such memory begins with.
pub const MAGIC: [u8; 8] = *b"DSEVENT1";
/// Where the number of bytes that stay is.
pub const STAYS: usize = 8;
/// Where the number of all bytes is.
pub const ALL: usize = 16;
/// Where the stream begins.
pub const STREAM: usize = 64;

/// Follows a stream in a file.
pub struct Reader {
    file: File,
    /// Bytes of the stream that were read.
    delivered: u64,
}

impl Reader {
    /// Opens the file.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { file: File::open(path)?, delivered: 0 })
    }

    /// Events that have come since the last time, as far as they stay. None as long as nobody has
    /// begun a stream.
    pub fn read(&mut self) -> Result<Vec<Event>> {
        let mut magic = [0; MAGIC.len()];
        self.file.read_exact_at(&mut magic, 0)?;
        if magic != MAGIC {
            return Ok(Vec::new());
        }
        let end = self.number(STAYS)?;
        let events = self.events(end)?;
        self.delivered = end;
        Ok(events)
    }

    /// Events behind those that stay. They are complete if nobody writes any more.
    pub fn rest(&self) -> Result<Vec<Event>> {
        self.events(self.number(ALL)?.max(self.delivered))
    }

    fn number(&self, at: usize) -> Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, at as u64)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// The events from what was read up to byte `end` of the stream.
    fn events(&self, end: u64) -> Result<Vec<Event>> {
        let len =
            end.checked_sub(self.delivered).ok_or_else(|| invalid("the stream has shrunk"))?;
        if STREAM as u64 + end > self.file.metadata()?.len() {
            return Err(invalid("the stream is longer than its file"));
        }
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, STREAM as u64 + self.delivered)?;
        let text = String::from_utf8(bytes).map_err(invalid)?;
        text.lines().map(|line| Event::from_line(line).map_err(invalid)).collect()
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::InvalidData, error)
}
