// SPDX-License-Identifier: GPL-2.0-only

//! What a device owes its user that logs its own writes: `VFIO_DEVICE_FEATURE_DMA_LOGGING_*`.

use crate::{Bitmap, Errno, Errnos};
use std::{collections::BTreeSet, ops::Range};

/// Ranges of IOVA that START takes: as many as there are in a page of the kernel's.
pub const LOG_RANGES_MAX: usize = 256;

/// The smallest page that REPORT takes.
const SMALLEST_PAGE: u64 = 4096;

/// A device's log of what it has written.
///
/// What was written in the ranges that START has named *must* be in the REPORT of it that comes next. What
/// *may* be there beyond that are the pages of the device that such a write touched, since a device
/// logs pages; and those of any other write while it logs, which it need not keep apart. A REPORT of a
/// part of a page leaves the rest of it logged: of that nobody was told.
#[derive(Clone, Debug)]
pub struct DeviceLog {
    /// Bytes of a page of the device.
    page: u64,
    /// What START has named, while it logs.
    ranges: Option<Vec<Range<u64>>>,
    /// Bytes that must be reported.
    must: Vec<Range<u64>>,
    /// Pages of the device that may be.
    may: BTreeSet<u64>,
}

/// What a REPORT must say, and what it may: a bit for each page of the size that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogReport {
    /// These bits must be set.
    pub must: Bitmap,
    /// No others may be.
    pub may: Bitmap,
}

impl DeviceLog {
    /// Of a device that doesn't log yet, and then does so in pages of this size.
    pub fn new(page: u64) -> Self {
        Self { page, ranges: None, must: Vec::new(), may: BTreeSet::new() }
    }

    /// Whether it logs.
    pub fn is_on(&self) -> bool {
        self.ranges.is_some()
    }

    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_START` with ranges of first byte and length, multiples of the page
    /// size that it hints at.
    pub fn start(&mut self, ranges: &[(u64, u64)], page_size: u64) -> Result<(), Errnos> {
        let mut wrong = Errnos::when(self.is_on() || ranges.is_empty(), Errno::EINVAL);
        wrong = wrong | Errnos::when(ranges.len() > LOG_RANGES_MAX, Errno::E2BIG);
        let mut good = Vec::<Range<u64>>::new();
        for &(iova, length) in ranges {
            let aligned = [iova, length].iter().all(|at| at & page_size.wrapping_sub(1) == 0);
            wrong = wrong | Errnos::when(!aligned, Errno::EINVAL);
            let Some(end) = iova.checked_add(length) else {
                wrong = wrong | Errno::EOVERFLOW;
                continue;
            };
            let overlaps = good.iter().any(|range| iova < range.end && range.start < end);
            wrong = wrong | Errnos::when(overlaps, Errno::EINVAL);
            good.push(iova..end);
        }
        wrong.check()?;
        self.ranges = Some(good);
        Ok(())
    }

    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`, and what closing the device does.
    pub fn stop(&mut self) {
        *self = Self::new(self.page);
    }

    /// The device has written these bytes, or may have if that isn't `certain`.
    pub fn written(&mut self, bytes: Range<u64>, certain: bool) {
        let Some(ranges) = &self.ranges else { return };
        if bytes.is_empty() {
            return;
        }
        self.may.extend(bytes.start / self.page..=(bytes.end - 1) / self.page);
        let wanted = ranges.iter().map(|range| overlap(range, &bytes));
        self.must.extend(wanted.filter(|bytes| certain && !bytes.is_empty()));
    }

    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`
    pub fn report(&mut self, iova: u64, length: u64, page_size: u64) -> Result<LogReport, Errnos> {
        let is_size = page_size.is_power_of_two() && page_size >= SMALLEST_PAGE;
        let wrong = Errnos::when(!is_size || !self.is_on(), Errno::EINVAL)
            | Errnos::when(iova.checked_add(length).is_none(), Errno::EOVERFLOW);
        wrong.check()?;

        let (asked, pages) = (iova..iova + length, length.div_ceil(page_size));
        let bits = |bytes: &Range<u64>| {
            let end = bytes.end.saturating_sub(iova).div_ceil(page_size).min(pages);
            (bytes.start.saturating_sub(iova) / page_size).min(end)..end
        };
        let mut report = LogReport { must: Bitmap::new(pages), may: Bitmap::new(pages) };
        for bytes in self.must.iter().map(|bytes| overlap(bytes, &asked)) {
            if !bytes.is_empty() {
                report.must.set(bits(&bytes));
            }
        }
        for bytes in self.may.iter().map(|&page| self.bytes(page)) {
            report.may.set(bits(&bytes));
        }
        self.forget(&asked);
        Ok(report)
    }

    /// These bytes were reported.
    fn forget(&mut self, asked: &Range<u64>) {
        let rest = |bytes: &Range<u64>| {
            let before = bytes.start..bytes.end.min(asked.start);
            let after = bytes.start.max(asked.end)..bytes.end;
            [before, after].into_iter().filter(|part| !part.is_empty())
        };
        self.must = self.must.iter().flat_map(rest).collect();
        let whole = |page: &u64| {
            let bytes = page * self.page..(page + 1) * self.page;
            asked.start <= bytes.start && bytes.end <= asked.end
        };
        self.may.retain(|page| !whole(page));
    }

    fn bytes(&self, page: u64) -> Range<u64> {
        page * self.page..(page + 1) * self.page
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.max(b.start)..a.end.min(b.end)
}

impl LogReport {
    /// How a bitmap differs from it that a device has reported.
    pub fn diff(&self, reported: &Bitmap) -> crate::BitmapDifference {
        crate::BitmapDifference {
            lost: self.must.diff(reported).lost,
            spurious: self.may.diff(reported).spurious,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn logging(ranges: &[(u64, u64)]) -> DeviceLog {
        let mut log = DeviceLog::new(PAGE);
        log.start(ranges, PAGE).unwrap();
        log
    }

    /// What must, and what may be reported.
    fn runs(log: &mut DeviceLog, iova: u64, length: u64, page: u64) -> [Vec<Range<u64>>; 2] {
        let report = log.report(iova, length, page).unwrap();
        [report.must.runs(), report.may.runs()]
    }

    #[test]
    fn what_is_written_is_reported_once() {
        let mut log = logging(&[(0, 8 * PAGE), (16 * PAGE, PAGE)]);
        log.written(PAGE + 5..2 * PAGE + 1, true);
        log.written(16 * PAGE..18 * PAGE, true);
        log.written(4 * PAGE..5 * PAGE, false);
        let all = runs(&mut log, 0, 20 * PAGE, PAGE);
        assert_eq!(all, [vec![1..3, 16..17], vec![1..3, 4..5, 16..18]]);
        assert_eq!(runs(&mut log, 0, 20 * PAGE, PAGE), [[], []]);
    }

    #[test]
    fn other_page_sizes() {
        let mut log = logging(&[(0, 64 * PAGE)]);
        log.written(3 * PAGE..5 * PAGE, true);
        assert_eq!(runs(&mut log.clone(), 0, 64 * PAGE, 4 * PAGE), [[0..2], [0..2]]);
        // Two bits that aren't pages have a part of page 3.
        assert_eq!(runs(&mut log, PAGE / 2, 8 * PAGE, PAGE), [[2..5], [2..5]]);
    }

    #[test]
    fn the_rest_of_a_page_stays() {
        let mut log = logging(&[(0, 64 * PAGE)]);
        log.written(PAGE..2 * PAGE, true);
        assert_eq!(runs(&mut log, 0, PAGE + 100, PAGE), [[1..2], [1..2]]);
        // The first bytes may be reported once more.
        assert_eq!(runs(&mut log, PAGE, 100, PAGE), [vec![], vec![0..1]]);
        assert_eq!(runs(&mut log, PAGE, PAGE, PAGE), [[0..1], [0..1]]);
        assert_eq!(runs(&mut log, 0, 64 * PAGE, PAGE), [[], []]);
        log.written(PAGE..2 * PAGE, true);
        assert_eq!(runs(&mut log, PAGE + 1, PAGE - 1, PAGE), [[0..1], [0..1]]);
        assert_eq!(runs(&mut log, 0, 64 * PAGE, PAGE), [[1..2], [1..2]]);
    }

    #[test]
    fn what_must_be_reported_is_lost_and_what_may_not_is_spurious() {
        let bits = |pages| {
            let mut bitmap = Bitmap::new(4);
            bitmap.set(pages);
            bitmap
        };
        let report = LogReport { must: bits(1..2), may: bits(1..3) };
        let differs = |reported| {
            let crate::BitmapDifference { lost, spurious } = report.diff(&bits(reported));
            (lost, spurious)
        };
        assert_eq!(differs(1..2), (vec![], vec![]));
        assert_eq!(differs(1..3), (vec![], vec![]));
        assert_eq!(differs(2..4), (vec![1..2], vec![3..4]));
    }

    #[test]
    fn ranges_may_touch_in_any_order() {
        logging(&[(PAGE, PAGE), (0, PAGE), (2 * PAGE, PAGE)]);
    }

    #[test]
    fn what_is_refused() {
        let mut log = DeviceLog::new(PAGE);
        assert_eq!(log.report(0, PAGE, PAGE), Err(Errno::EINVAL.into()));
        let many = |n| (0..n).map(|i| (i * PAGE, PAGE)).collect::<Vec<_>>();
        for (ranges, page, errno) in [
            (vec![], PAGE, Errno::EINVAL),
            (many(257), PAGE, Errno::E2BIG),
            (vec![(1, PAGE)], PAGE, Errno::EINVAL),
            (vec![(0, PAGE)], 2 * PAGE, Errno::EINVAL),
            (vec![(PAGE, PAGE)], 0, Errno::EINVAL),
            (vec![(0, 2 * PAGE), (PAGE, PAGE)], PAGE, Errno::EINVAL),
            (vec![(u64::MAX - PAGE + 1, PAGE)], PAGE, Errno::EOVERFLOW),
        ] {
            assert_eq!(log.start(&ranges, page), Err(errno.into()), "{ranges:x?}, {page:#x}");
        }
        log.start(&many(256), PAGE).unwrap();
        assert_eq!(log.start(&many(1), PAGE), Err(Errno::EINVAL.into()));
        for page in [0, 2048, 3 * PAGE] {
            assert_eq!(log.report(0, PAGE, page), Err(Errno::EINVAL.into()));
        }
        assert_eq!(log.report(PAGE, u64::MAX, PAGE), Err(Errno::EOVERFLOW.into()));
        log.stop();
        assert_eq!(log.report(0, PAGE, PAGE), Err(Errno::EINVAL.into()));
    }
}
