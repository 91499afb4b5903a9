// SPDX-License-Identifier: GPL-2.0

//! DMA logging: `VFIO_DEVICE_FEATURE_DMA_LOGGING_*`, the device's own dirty page tracking.
//!
//! VFIO reports the log through an `iova_bitmap`, which exists only with `CONFIG_IOMMUFD_DRIVER`.
//! Without it, the user could start logging, but every report would fail.

use super::{Device, OpenDevice, Operations};
use crate::bindings;
use core::{marker::PhantomData, ops::Range};
use kernel::{
    error::from_result,
    page::PAGE_SIZE,
    prelude::*,
    rbtree::{RBTree, RBTreeNode},
};

/// Whether this kernel supports DMA logging.
pub(crate) const AVAILABLE: bool = cfg!(CONFIG_IOMMUFD_DRIVER);

const PAGE: u64 = PAGE_SIZE as u64;

/// Bytes of IOVA per word of the log, which has one bit per page.
const IOVA_PER_WORD: u64 = u64::BITS as u64 * PAGE;

/// Maximum number of words: what a device writes in the background is charged to nobody, and the
/// user can map little memory at any number of IOVAs. A word takes 64 bytes, so a log 16 MiB.
const MAX_WORDS: usize = 1 << 18;

/// The pages that a device has written, in the ranges that the user asked to log.
///
/// # Invariants
///
/// Words are keyed by the IOVA of bit 0, a multiple of [`IOVA_PER_WORD`]; none is 0. With `room`
/// there are [`MAX_WORDS`].
struct Log {
    ranges: KVec<Range<u64>>,
    words: RBTree<u64, u64>,
    /// How many more words there may be.
    room: usize,
    /// There was no memory or no room for a word: from now on all pages are reported as written.
    incomplete: bool,
}

impl Log {
    fn new(ranges: KVec<Range<u64>>) -> Self {
        Self {
            ranges,
            words: RBTree::new(),
            room: MAX_WORDS,
            incomplete: false,
        }
    }

    /// Logs the pages that `range` touches in the ranges asked for.
    fn add(&mut self, range: &Range<u64>) {
        for i in 0..self.ranges.len() {
            let Some(wanted) = self.ranges.get(i) else {
                break;
            };
            let (start, end) = (range.start.max(wanted.start), range.end.min(wanted.end));
            let mut next = Some(start & !(IOVA_PER_WORD - 1));
            // The last word of the address space has no next one.
            while let Some(base) = next.filter(|&base| base < end && !self.incomplete) {
                self.add_bits(base, bits(base, &(start..end)));
                next = base.checked_add(IOVA_PER_WORD);
            }
        }
    }

    /// Sets bits of the word at `base`.
    fn add_bits(&mut self, base: u64, bits: u64) {
        if let Some(word) = self.words.get_mut(&base) {
            *word |= bits;
            return;
        }
        let room = self.room.checked_sub(1);
        let node = RBTreeNode::new(base, bits, GFP_KERNEL_ACCOUNT);
        if let (Some(room), Ok(node)) = (room, node) {
            self.words.insert(node);
            self.room = room;
        } else {
            self.words = RBTree::new();
            self.incomplete = true;
        }
    }

    /// Calls `f` with each logged page that `range` touches, and removes it from the log if it is in
    /// `range` as a whole: of what was written in the rest of others, the user learns nothing yet.
    fn read_and_clear(&mut self, range: &Range<u64>, mut f: impl FnMut(Range<u64>)) {
        if range.is_empty() {
            return;
        }
        if self.incomplete {
            return f(range.clone());
        }
        let whole = whole_pages(range);
        let first = range.start & !(IOVA_PER_WORD - 1);
        let mut cursor = self.words.cursor_lower_bound_mut(&first);
        while let Some(mut at) = cursor {
            let (&base, word) = at.current_mut();
            if base >= range.end {
                break;
            }
            let found = *word & bits(base, range);
            *word &= !bits(base, &whole);
            for page in (0..u64::from(u64::BITS)).filter(|page| found >> page & 1 != 0) {
                let iova = base.wrapping_add(page.wrapping_mul(PAGE));
                f(iova..iova.saturating_add(PAGE));
            }
            cursor = if *word == 0 {
                self.room = self.room.saturating_add(1);
                at.remove_current().0
            } else {
                at.move_next()
            };
        }
    }
}

/// The bits of the word at `base` for the pages that `range` touches.
fn bits(base: u64, range: &Range<u64>) -> u64 {
    let page = |at: u64| at.saturating_sub(base).min(IOVA_PER_WORD).div_ceil(PAGE);
    let first = range.start.saturating_sub(base).min(IOVA_PER_WORD) / PAGE;
    match page(range.end).saturating_sub(first) {
        0 => 0,
        // CAST: At most 64.
        pages => u64::MAX.wrapping_shr(u64::BITS.wrapping_sub(pages as u32)) << first,
    }
}

/// The pages that are in `range` as a whole. No range can have the last byte of the address space, so
/// that byte's page doesn't need it.
fn whole_pages(range: &Range<u64>) -> Range<u64> {
    let end = match range.end {
        u64::MAX => u64::MAX,
        end => end & !(PAGE - 1),
    };
    range.start.checked_next_multiple_of(PAGE).unwrap_or(end)..end
}

/// DMA logging of a device: the log, or `None` while logging is off.
pub(super) struct Logging(Option<Log>);

impl Logging {
    pub(super) fn new() -> Self {
        Self(None)
    }

    /// Logs that `range` was written. To be called after the write: a report between the two would
    /// otherwise clear the log, and the user would copy the old contents.
    pub(super) fn written(&mut self, range: &Range<u64>) {
        if let Some(log) = &mut self.0 {
            log.add(range);
        }
    }

    fn start(&mut self, ranges: KVec<Range<u64>>) -> Result {
        if self.0.is_some() {
            return Err(EINVAL);
        }
        self.0 = Some(Log::new(ranges));
        Ok(())
    }
}

/// The C callbacks of a driver.
pub(super) struct VTable<T: Operations>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    pub(super) const VTABLE: bindings::vfio_log_ops = bindings::vfio_log_ops {
        log_start: Some(Self::start_callback),
        log_stop: Some(Self::stop_callback),
        log_read_and_clear: Some(Self::read_and_clear_callback),
    };

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open for `'a`.
    unsafe fn dev<'a>(vdev: *mut bindings::vfio_device) -> &'a OpenDevice<T> {
        // SAFETY: The caller promises that the device is open.
        unsafe { Device::<T>::open_from_raw(vdev) }
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open until this returns. `tree` is a valid
    /// interval tree of `nnodes` nodes, which nothing changes meanwhile. `page_size` is valid for
    /// writes.
    unsafe extern "C" fn start_callback(
        vdev: *mut bindings::vfio_device,
        tree: *mut bindings::rb_root_cached,
        nnodes: u32,
        page_size: *mut u64,
    ) -> c_int {
        // SAFETY: The caller promises that the device is open.
        let dev = unsafe { Self::dev(vdev) };

        from_result(|| {
            let mut ranges = KVec::with_capacity(nnodes as usize, GFP_KERNEL_ACCOUNT)?;
            // SAFETY: The caller promises that the tree is valid and nothing changes it.
            let mut node = unsafe { bindings::interval_tree_iter_first(tree, 0, usize::MAX) };
            while !node.is_null() {
                // SAFETY: The node is one of the tree, which the caller promises to be valid.
                let (start, last) = unsafe { ((*node).start as u64, (*node).last as u64) };
                ranges.push(start..last.saturating_add(1), GFP_KERNEL_ACCOUNT)?;
                // SAFETY: The node is in the tree, and the caller promises that it stays so.
                node = unsafe { bindings::interval_tree_iter_next(node, 0, usize::MAX) };
            }
            dev.logging().start(ranges)?;
            // SAFETY: The caller promises that `page_size` is valid for writes.
            unsafe { *page_size = PAGE };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open until this returns.
    unsafe extern "C" fn stop_callback(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: The caller promises that the device is open.
        *unsafe { Self::dev(vdev) }.logging() = Logging::new();
        0
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open until this returns. `dirty` is a valid
    /// bitmap that covers `length` bytes at `iova`.
    unsafe extern "C" fn read_and_clear_callback(
        vdev: *mut bindings::vfio_device,
        iova: c_ulong,
        length: c_ulong,
        dirty: *mut bindings::iova_bitmap,
    ) -> c_int {
        // SAFETY: The caller promises that the device is open.
        let dev = unsafe { Self::dev(vdev) };
        let range = iova as u64..(iova as u64).saturating_add(length as u64);

        from_result(|| {
            let mut logging = dev.logging();
            let log = logging.0.as_mut().ok_or(EINVAL)?;
            log.read_and_clear(&range, |pages| {
                let start = pages.start.max(range.start);
                let length = pages.end.min(range.end).saturating_sub(start);
                // SAFETY: The caller promises that the bitmap is valid and covers the range, which
                // this part is clamped to. This takes page faults with `logging` held, see
                // `Base::logging`.
                // CAST: Both are in the range, whose bounds are of this size.
                unsafe { set_dirty(dirty, start as usize, length as usize) };
            });
            Ok(0)
        })
    }
}

/// # Safety
///
/// `dirty` is a valid bitmap that covers `length` bytes at `iova`.
#[cfg(CONFIG_IOMMUFD_DRIVER)]
unsafe fn set_dirty(dirty: *mut bindings::iova_bitmap, iova: usize, length: usize) {
    // SAFETY: The caller promises that the bitmap is valid and covers the range.
    unsafe { bindings::iova_bitmap_set(dirty, iova, length) };
}

/// Never called: without `CONFIG_IOMMUFD_DRIVER` VFIO has no bitmap to pass.
///
/// # Safety
///
/// No requirements; unsafe to match the other definition.
#[cfg(not(CONFIG_IOMMUFD_DRIVER))]
unsafe fn set_dirty(_dirty: *mut bindings::iova_bitmap, _iova: usize, _length: usize) {}

#[cfg(kunit_suites)]
#[kunit_tests(rust_mdev_dma_log)]
mod tests {
    use super::*;

    const WORD: u64 = IOVA_PER_WORD;

    fn log_of(ranges: &[Range<u64>]) -> Result<Log> {
        let mut wanted = KVec::new();
        for range in ranges {
            wanted.push(range.clone(), GFP_KERNEL)?;
        }
        Ok(Log::new(wanted))
    }

    /// What a read of `range` reports.
    fn read(log: &mut Log, range: Range<u64>) -> Result<KVec<Range<u64>>> {
        let mut pages = KVec::new();
        let mut pushed = Ok(());
        log.read_and_clear(&range, |page| {
            if let Err(e) = pages.push(page, GFP_KERNEL) {
                pushed = Err(e.into());
            }
        });
        pushed.map(|()| pages)
    }

    #[test]
    fn bits_of_a_range() {
        assert_eq!(bits(WORD, &(0..WORD)), 0);
        assert_eq!(bits(WORD, &(2 * WORD..3 * WORD)), 0);
        assert_eq!(bits(WORD, &(WORD..WORD)), 0);
        assert_eq!(bits(WORD, &(0..u64::MAX)), u64::MAX);
        assert_eq!(bits(WORD, &(WORD..2 * WORD)), u64::MAX);
        assert_eq!(bits(0, &(0..1)), 1);
        assert_eq!(bits(0, &(PAGE - 1..PAGE + 1)), 0b11);
        assert_eq!(bits(0, &(PAGE..3 * PAGE)), 0b110);
        assert_eq!(bits(0, &(WORD - 1..WORD + 1)), 1 << 63);
        let last = u64::MAX & !(WORD - 1);
        assert_eq!(bits(last, &(u64::MAX - 1..u64::MAX)), 1 << 63);
    }

    #[test]
    fn a_page_is_reported_once() -> Result {
        let mut log = log_of(&[0..4 * WORD])?;
        log.add(&(PAGE + 5..PAGE + 6));
        log.add(&(PAGE..2 * PAGE));
        let pages = read(&mut log, 0..4 * WORD)?;
        assert_eq!(pages[..], [PAGE..2 * PAGE]);
        assert!(read(&mut log, 0..4 * WORD)?.is_empty());
        assert_eq!(log.words.iter().count(), 0);
        Ok(())
    }

    #[test]
    fn a_write_across_words() -> Result {
        let mut log = log_of(&[0..4 * WORD])?;
        log.add(&(WORD - PAGE..2 * WORD + PAGE));
        assert_eq!(log.words.iter().count(), 3);
        let pages = read(&mut log, 0..4 * WORD)?;
        assert_eq!(pages.len(), 66);
        assert_eq!(pages[0], WORD - PAGE..WORD);
        assert_eq!(pages[65], 2 * WORD..2 * WORD + PAGE);
        Ok(())
    }

    #[test]
    fn only_what_was_asked_for() -> Result {
        let mut log = log_of(&[2 * PAGE..3 * PAGE, 5 * PAGE..WORD + PAGE])?;
        log.add(&(0..4 * PAGE));
        log.add(&(WORD..2 * WORD));
        let pages = read(&mut log, 0..4 * WORD)?;
        assert_eq!(pages[..], [2 * PAGE..3 * PAGE, WORD..WORD + PAGE]);
        Ok(())
    }

    #[test]
    fn a_read_leaves_the_rest() -> Result {
        let mut log = log_of(&[0..4 * WORD])?;
        log.add(&(0..3 * PAGE));
        log.add(&(3 * WORD..3 * WORD + PAGE));
        assert_eq!(read(&mut log, PAGE..2 * PAGE)?[..], [PAGE..2 * PAGE]);
        assert!(read(&mut log, WORD..3 * WORD)?.is_empty());
        let pages = read(&mut log, 0..4 * WORD)?;
        assert_eq!(
            pages[..],
            [0..PAGE, 2 * PAGE..3 * PAGE, 3 * WORD..3 * WORD + PAGE]
        );
        Ok(())
    }

    #[test]
    fn after_a_failed_allocation_all_is_reported() -> Result {
        let mut log = log_of(&[0..WORD])?;
        log.incomplete = true;
        for _ in 0..2 {
            assert_eq!(read(&mut log, PAGE..4 * PAGE)?[..], [PAGE..4 * PAGE]);
        }
        assert!(read(&mut log, PAGE..PAGE)?.is_empty());
        Ok(())
    }

    #[test]
    fn a_page_stays_until_all_of_it_was_read() -> Result {
        let mut log = log_of(&[0..WORD])?;
        log.add(&(PAGE..3 * PAGE));
        let (first, second) = (PAGE..2 * PAGE, 2 * PAGE..3 * PAGE);
        for _ in 0..2 {
            let pages = read(&mut log, PAGE + 1..3 * PAGE - 1)?;
            assert_eq!(pages[..], [first.clone(), second.clone()]);
        }
        assert_eq!(
            read(&mut log, PAGE..3 * PAGE - 1)?[..],
            [first, second.clone()]
        );
        assert_eq!(read(&mut log, PAGE + 1..3 * PAGE)?[..], [second]);
        assert!(read(&mut log, 0..WORD)?.is_empty());
        Ok(())
    }

    #[test]
    fn the_end_of_the_address_space() -> Result {
        let last = u64::MAX - (PAGE - 1);
        let mut log = log_of(&[last - PAGE..u64::MAX])?;
        log.add(&(last - 1..u64::MAX));
        let pages = read(&mut log, 0..u64::MAX)?;
        assert_eq!(pages[..], [last - PAGE..last, last..u64::MAX]);
        assert!(read(&mut log, 0..u64::MAX)?.is_empty());
        Ok(())
    }

    #[test]
    fn without_room_all_is_reported() -> Result {
        let mut log = log_of(&[0..4 * WORD])?;
        log.room = 1;
        log.add(&(0..PAGE));
        assert_eq!(read(&mut log, 0..WORD)?[..], [0..PAGE]);
        log.add(&(WORD..WORD + PAGE));
        assert!(!log.incomplete);
        log.add(&(2 * WORD..2 * WORD + PAGE));
        assert!(log.incomplete && log.words.iter().count() == 0);
        assert_eq!(read(&mut log, PAGE..2 * PAGE)?[..], [PAGE..2 * PAGE]);
        Ok(())
    }

    #[test]
    fn it_starts_once() -> Result {
        let mut logging = Logging::new();
        logging.written(&(0..PAGE));
        logging.start(log_of(&[0..WORD])?.ranges)?;
        assert!(logging.start(KVec::new()).is_err());
        logging.written(&(0..PAGE));
        assert_eq!(logging.0.map_or(0, |log| log.words.iter().count()), 1);
        Ok(())
    }
}
