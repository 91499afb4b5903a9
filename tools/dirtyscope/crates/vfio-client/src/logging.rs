// SPDX-License-Identifier: GPL-2.0-only

use crate::{Device, Memory, Result};
use std::ops::Range;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET as GET,
    VFIO_DEVICE_FEATURE_SET as SET, vfio_device_feature_dma_logging_control,
    vfio_device_feature_dma_logging_range, vfio_device_feature_dma_logging_report,
};

impl Device {
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`: logs what is written to these ranges. Returns the page
    /// size that the device chose, in bytes.
    pub fn start_logging(&self, ranges: &[Range<u64>], page_size: u64) -> Result<u64> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|range| vfio_device_feature_dma_logging_range {
                iova: range.start,
                length: range.end - range.start,
            })
            .collect();
        let (count, address) = (ranges.len() as u32, ranges.as_ptr() as u64);
        // SAFETY: There are so many ranges.
        unsafe { self.start_logging_raw(page_size, count, address) }
    }

    /// As [`Self::start_logging`], with `count` ranges that should be in `memory` at `offset`, be that its
    /// guard.
    pub fn start_logging_from(
        &self,
        page_size: u64,
        count: u32,
        memory: &Memory,
        offset: usize,
    ) -> Result<u64> {
        let bytes = count as usize * size_of::<vfio_device_feature_dma_logging_range>();
        assert!(offset + bytes <= memory.span(), "{count} ranges at {offset:#x}");
        // SAFETY: So many are in the memory, or its guard.
        unsafe { self.start_logging_raw(page_size, count, memory.address(offset)) }
    }

    /// # Safety
    ///
    /// What the kernel finds at `address`, if it may read `count` ranges there, is memory of ours.
    unsafe fn start_logging_raw(&self, page_size: u64, count: u32, address: u64) -> Result<u64> {
        let control = vfio_device_feature_dma_logging_control {
            page_size,
            num_ranges: count,
            ranges: address,
            ..Default::default()
        };
        let feature = SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
        // SAFETY: The kernel reads ranges, of which the caller promises that it may, and writes the
        // structure only.
        let control = unsafe { self.feature_with(feature, control) }?;
        Ok(control.page_size)
    }

    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`
    pub fn stop_logging(&self) -> Result<()> {
        // SAFETY: There is no data.
        unsafe { self.feature_with(SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, ()) }
    }

    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`: which pages of a range were written, a bit for each,
    /// and forgets it. Panics if `page_size` isn't a power of two.
    pub fn logged(&self, range: Range<u64>, page_size: u64) -> Result<Vec<u64>> {
        assert!(page_size.is_power_of_two(), "pages of {page_size:#x} bytes");
        let (iova, length) = (range.start, range.end - range.start);
        let pages = length.div_ceil(page_size);
        let mut words = vec![0u64; pages.div_ceil(u64::BITS.into()) as usize];
        let report = vfio_device_feature_dma_logging_report {
            iova,
            length,
            page_size,
            bitmap: words.as_mut_ptr() as u64,
        };
        // SAFETY: The kernel sets bits of whole words, of which there are enough for the range.
        unsafe { self.feature_with(GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, report) }?;
        Ok(words)
    }

    /// As [`Self::logged`], into `memory` at `offset`, of any range, which may go beyond the end, and with any
    /// page size: those of less than 4 KiB and those that are no power of two the kernel has to refuse. Panics if the bitmap goes beyond the guard.
    pub fn logged_into(
        &self,
        iova: u64,
        length: u64,
        page_size: u64,
        memory: &Memory,
        offset: usize,
    ) -> Result<()> {
        // The kernel may take it for the largest power of two in it.
        let smallest = (1 << page_size.trailing_zeros().min(63)).max(1);
        let bytes = length.div_ceil(smallest).div_ceil(8).next_multiple_of(8);
        let inside = memory.span().checked_sub(offset).is_some_and(|rest| bytes <= rest as u64);
        assert!(inside, "a bitmap of {bytes:#x} bytes at {offset:#x}");
        let bitmap = memory.address(offset);
        let report = vfio_device_feature_dma_logging_report { iova, length, page_size, bitmap };
        // SAFETY: The kernel sets bits of whole words, for which there is room in the memory or its guard.
        unsafe { self.feature_with(GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, report) }?;
        Ok(())
    }
}
