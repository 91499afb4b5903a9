// SPDX-License-Identifier: GPL-2.0-only

//! A machine's memory as its devices see it, and which of it they have written.

use crate::{Error, Result, Vmm};
use std::{
    mem::take,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{MutexGuard, PoisonError},
};
use vfio_client::{BitmapArgs, DirtyTracking};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// What devices see of a machine's memory, and what is known to be dirty of the rest.
#[derive(Default)]
pub(crate) struct Mapped {
    /// Regions that are mapped for them. Each is a mapping of type1's, which knows nothing smaller.
    regions: Vec<Range<u64>>,
    /// Bytes of a page of bitmaps, while dirty pages are tracked.
    tracked: Option<u64>,
    /// What bitmaps of UNMAP said since it was asked last what is dirty.
    unmapped: Vec<Range<u64>>,
}

impl Vmm {
    /// Hides a region from the devices, from this address on, as a guest does that has something else there for
    /// a while, or an IOMMU of the guest's. What it contains stays, and is migrated.
    pub fn hide(&self, address: u64) -> Result<()> {
        let mut mapped = self.mapped();
        let at = mapped.regions.iter().position(|region| region.start == address);
        let at = at.ok_or_else(|| Error::Memory(format!("nothing is mapped at {address:#x}")))?;
        let region = mapped.regions[at].clone();
        let length = region.end - region.start;
        match mapped.tracked {
            // Of what isn't mapped, type1 knows nothing, and there is no asking it later. Nor before: a
            // page that is written after GET_BITMAP and before UNMAP would be in neither. UNMAP
            // itself says it, when no device can write any more.
            Some(page) => {
                let words = self.tracking()?.unmap(region.start, length, &bitmap(length, page))?;
                // Not sent right here: the connection is another thread's. It asks for them next time.
                mapped.unmapped.extend(runs(&words, region.start, page));
            }
            None => self.container.vfio_dma_unmap(region.start, length as usize)?,
        }
        mapped.regions.remove(at);
        Ok(())
    }

    /// Shows devices a region that was hidden. While dirty pages are tracked, type1 tracks it, too: all that is
    /// written from now on is in the next bitmap.
    pub fn show(&self, address: u64) -> Result<()> {
        let mut mapped = self.mapped();
        let none = || Error::Memory(format!("no region begins at {address:#x}"));
        let region = self.memory.find_region(GuestAddress(address)).ok_or_else(none)?;
        if region.start_addr().0 != address {
            return Err(none());
        }
        // SAFETY: The region belongs to `self`, and nothing has a reference into it. It is unmapped from
        // the container before it is freed (see `drop`); until then `GuestMemoryMmap`, which
        // never makes references, is all that accesses it.
        unsafe { self.container.vfio_dma_map(address, region.size(), region.as_ptr())? };
        mapped.regions.push(address..address + region.len());
        Ok(())
    }

    /// Hides all memory.
    pub fn unmap(&self) -> Result<()> {
        let regions = self.mapped().regions.clone();
        // Each, whatever becomes of the others.
        let hidden: Vec<_> = regions.iter().map(|region| self.hide(region.start)).collect();
        hidden.into_iter().collect()
    }

    /// Begins to track dirty pages: of what is mapped, and of what will be.
    pub(crate) fn start_tracking(&self) -> Result<()> {
        let mut mapped = self.mapped();
        let tracking = self.tracking()?;
        let page = page_size(&tracking)?;
        tracking.start()?;
        // Of a migration that has failed, something may be left.
        (mapped.tracked, mapped.unmapped) = (Some(page), Vec::new());
        Ok(())
    }

    /// Ends that.
    pub(crate) fn stop_tracking(&self) -> Result<()> {
        let mut mapped = self.mapped();
        mapped.tracked = None;
        Ok(self.tracking()?.stop()?)
    }

    /// The pages that were written since this was asked last.
    ///
    /// Reading a bitmap clears it, so what it says must be sent, and sent afterwards: a page that is written
    /// while it is sent may arrive half old, but is then dirty in the next bitmap.
    pub(crate) fn dirty(&self) -> Result<Vec<Range<u64>>> {
        // Locked until the end: nothing is unmapped that this is about to ask for.
        let mut mapped = self.mapped();
        let page = mapped.tracked.ok_or_else(|| Error::Unable("nothing is tracked".into()))?;
        let tracking = self.tracking()?;
        let mut dirty = take(&mut mapped.unmapped);
        // A mapping each: type1 doesn't tell of parts of mappings.
        for &Range { start, end } in &mapped.regions {
            let words = tracking.bitmap(start, end - start, &bitmap(end - start, page))?;
            dirty.extend(runs(&words, start, page));
        }
        Ok(dirty)
    }

    /// The regions of its memory, mapped or not.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Range<u64>> {
        self.memory.iter().map(|region| region.start_addr().0..region.last_addr().0 + 1)
    }

    fn tracking(&self) -> Result<DirtyTracking<'_>> {
        // SAFETY: The container's file stays open as long as it is borrowed.
        let container = unsafe { BorrowedFd::borrow_raw(self.container.as_raw_fd()) };
        Ok(DirtyTracking::of(container)?)
    }

    /// A panic elsewhere doesn't matter: it is changed last, when all has succeeded.
    fn mapped(&self) -> MutexGuard<'_, Mapped> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The page size of bitmaps: type1 takes none but the smallest that it names.
fn page_size(tracking: &DirtyTracking<'_>) -> Result<u64> {
    let info = tracking.info()?;
    let info = info.ok_or_else(|| Error::Unable("type1 doesn't track dirty pages".into()))?;
    Ok(info.pgsize_bitmap & info.pgsize_bitmap.wrapping_neg())
}

/// What a bitmap of so many bytes of memory is: whole words.
fn bitmap(length: u64, page: u64) -> BitmapArgs {
    BitmapArgs { pgsize: page, size: (length / page).div_ceil(64) * 8 }
}

/// The runs of pages that a bitmap says are dirty, which begins with the page at `start`.
fn runs(words: &[u64], start: u64, page: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let is_dirty = |bit: &u64| words[(bit / 64) as usize] & (1 << (bit % 64)) != 0;
    let bits = (0..64 * words.len() as u64).filter(is_dirty);
    for address in bits.map(|bit| start + bit * page) {
        match runs.last_mut() {
            Some(run) if run.end == address => run.end += page,
            _ => runs.push(address..address + page),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_are_runs() {
        assert_eq!(runs(&[0, 0], 0, 4096), []);
        let words = [(1 << 63) | 0b1101, 0b11];
        let expected = [0x10_0000..0x10_1000, 0x10_2000..0x10_4000, 0x13_f000..0x14_2000];
        assert_eq!(runs(&words, 0x10_0000, 4096), expected);
    }
}
