// SPDX-License-Identifier: GPL-2.0-only

use crate::{Device, Result};
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
        let control = vfio_device_feature_dma_logging_control {
            page_size,
            num_ranges: ranges.len() as u32,
            ranges: ranges.as_ptr() as u64,
            ..Default::default()
        };
        let feature = SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
        // SAFETY: The kernel reads as many ranges as there are, and writes the structure only.
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
}
