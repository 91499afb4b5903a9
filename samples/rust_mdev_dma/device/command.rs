// SPDX-License-Identifier: GPL-2.0

//! Commands: see the uapi header.

use core::ops::Range;
use kernel::{page::PAGE_SIZE, prelude::*};

const PAGE: u64 = PAGE_SIZE as u64;

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
    if (range.start | range.end) % PAGE != 0 {
        return Err(EINVAL);
    }
    Ok(range)
}

#[cfg(kunit_suites)]
#[kernel::macros::kunit_tests(rust_mdev_dma_command)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        ops: 0b10,
        pins: 1,
        length: 2 * PAGE,
    };

    fn range(op: u32, iova: u64, length: u64) -> Result<Range<u64>> {
        LIMITS.range(&Command {
            op,
            iova,
            length,
            seed: 0,
        })
    }

    #[test]
    fn errors_in_the_order_of_the_header() {
        assert_eq!(range(1, 5, 7), Ok(5..12));
        for op in [0, 2, 32, u32::MAX] {
            assert_eq!(range(op, 0, 0), Err(EOPNOTSUPP));
        }
        assert_eq!(range(1, u64::MAX, 0), Err(EINVAL));
        assert_eq!(range(1, u64::MAX, u64::MAX), Err(EOVERFLOW));
        assert_eq!(range(1, 0, 2 * PAGE + 1), Err(E2BIG));
        assert_eq!(range(1, 0, 2 * PAGE), Ok(0..2 * PAGE));
    }

    #[test]
    fn whole_pages_or_none() {
        assert_eq!(whole_pages(PAGE..3 * PAGE), Ok(PAGE..3 * PAGE));
        assert_eq!(whole_pages(PAGE + 1..3 * PAGE), Err(EINVAL));
        assert_eq!(whole_pages(PAGE..3 * PAGE - 1), Err(EINVAL));
    }
}
