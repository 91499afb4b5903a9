// SPDX-License-Identifier: GPL-2.0

//! Commands: see the uapi header.

use core::ops::Range;
use kernel::{page::PAGE_SIZE, prelude::*};

/// What a device takes on.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// OPS: bit n is set if operation n exists.
    pub(super) ops: u32,
    /// Maximum number of pins.
    pub(super) pins: u64,
    /// Maximum size of a range.
    pub(super) length: u64,
}

impl Limits {
    /// Whether operation `op` exists.
    pub(super) fn offers(&self, op: u32) -> bool {
        op < u32::BITS && self.ops & 1 << op != 0
    }

    /// The range of a command. Fails with `EOPNOTSUPP`, `EINVAL`, `EOVERFLOW` or `E2BIG` as the
    /// header says.
    pub(super) fn range(&self, command: &Command) -> Result<Range<u64>> {
        let &Command {
            op, iova, length, ..
        } = command;
        if !self.offers(op) {
            return Err(EOPNOTSUPP);
        }
        if length == 0 {
            return Err(EINVAL);
        }
        let end = iova.checked_add(length).ok_or(EOVERFLOW)?;
        if length > self.length {
            return Err(E2BIG);
        }
        Ok(iova..end)
    }
}

/// A command.
#[derive(Clone, Copy, Default)]
pub(super) struct Command {
    pub(super) op: u32,
    pub(super) iova: u64,
    pub(super) length: u64,
    pub(super) seed: u64,
}

/// The result of a command.
#[derive(Default)]
pub(super) struct Outcome {
    /// 0 or an errno.
    pub(super) status: u32,
    /// Bytes processed.
    pub(super) count: u64,
    /// Digest of what was read.
    pub(super) digest: u64,
}

/// Fails with `EINVAL` unless `range` is whole pages.
pub(super) fn whole_pages(range: Range<u64>) -> Result<Range<u64>> {
    if (range.start | range.end) % PAGE_SIZE as u64 != 0 {
        return Err(EINVAL);
    }
    Ok(range)
}
