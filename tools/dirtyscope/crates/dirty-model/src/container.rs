// SPDX-License-Identifier: GPL-2.0-only

use crate::{
    BITMAP_PAGES_MAX, Bitmap, BitmapBuffer, Errno, Errnos, Mapping, Protection,
    device::{Device, Limits, RawPin},
    mapping::Mapped,
};
use std::{collections::BTreeMap, ops::Range};

mod commands;
mod groups;
mod raw;
#[cfg(test)]
mod tests;

pub use commands::PinFailure;
pub use groups::GroupKind;
use groups::{Group, all_of};

/// Names an open device of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(u32);

/// A mapping as others may see it.
#[derive(Clone, Copy, Debug)]
pub struct MappingView<'a> {
    /// First byte.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Its dirty pages, while they are being tracked.
    pub dirty: Option<&'a Bitmap>,
}

/// A type1 v2 container, its groups, and their devices that are open.
///
/// Invariant: mappings don't overlap, and all of them have a bitmap or none, as `tracking` says.
#[derive(Clone, Debug, Hash)]
pub struct Container {
    page_size: u64,
    mappings: BTreeMap<u64, Mapped>,
    dma_avail: u32,
    lock_limit: Option<u64>,
    tracking: bool,
    groups: BTreeMap<u32, Group>,
    devices: BTreeMap<DeviceId, Device>,
    next_device: u32,
}

impl Container {
    /// A container without groups and mappings. `page_size` is the smallest that the IOMMU driver supports,
    /// `dma_entry_limit` its limit on mappings.
    pub fn new(page_size: u64, dma_entry_limit: u32) -> Self {
        Self {
            page_size,
            mappings: BTreeMap::new(),
            dma_avail: dma_entry_limit,
            lock_limit: None,
            tracking: false,
            groups: BTreeMap::new(),
            devices: BTreeMap::new(),
            next_device: 0,
        }
    }

    /// How many more mappings there may be: `VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`.
    pub fn dma_avail(&self) -> u32 {
        self.dma_avail
    }

    /// Whether dirty pages are being tracked.
    pub fn tracking(&self) -> bool {
        self.tracking
    }

    /// All mappings, by ascending IOVA.
    pub fn mappings(&self) -> impl DoubleEndedIterator<Item = MappingView<'_>> {
        self.mappings.values().map(|mapped| {
            let &Mapped { iova, size, ref dirty, .. } = mapped;
            MappingView { iova, size, dirty: dirty.as_ref() }
        })
    }

    /// The mappings that lie in the range of a bitmap, ascending, each with whether `buffer` can hold
    /// its part of it: see [`Self::get_bitmap`].
    pub fn mappings_in(
        &self,
        iova: u64,
        size: u64,
        buffer: &BitmapBuffer,
    ) -> impl Iterator<Item = (MappingView<'_>, bool)> {
        let (page_size, writable) = (self.page_size, buffer.writable);
        let last = iova.saturating_add(size - 1);
        self.mappings.range(iova..=last).map(move |(_, mapped)| {
            let &Mapped { iova: start, size, ref dirty, .. } = mapped;
            let fits = mapped.bitmap_end(iova, page_size) <= writable;
            (MappingView { iova: start, size, dirty: dirty.as_ref() }, fits)
        })
    }

    /// From now on the user has no CAP_IPC_LOCK, and an RLIMIT_MEMLOCK of so many pages; or has it.
    /// Mappings that are made while the user has it are not limited.
    pub fn limit_locked_pages(&mut self, limit: Option<u64>) {
        self.lock_limit = limit;
    }

    /// Pages that count as locked memory of the process: all that are mapped if a group with an IOMMU
    /// is in the container, else each pinned page once, however many devices have pinned it how often.
    pub fn locked_pages(&self) -> u64 {
        if self.has_iommu() {
            return self.mappings.values().map(|mapped| mapped.size / self.page_size).sum();
        }
        self.pinned_pages(0..u64::MAX)
    }

    /// How many pages of the process the kernel has pinned, each as often as it is: once for an IOMMU if
    /// it is mapped for one, and once for devices, however many have pinned it how often.
    pub fn pages_held(&self) -> u64 {
        let pinned = self.pinned_pages(0..u64::MAX);
        if self.has_iommu() { self.locked_pages() + pinned } else { pinned }
    }

    /// How many pages of a range devices have pinned.
    fn pinned_pages(&self, range: Range<u64>) -> u64 {
        let pinned = self.devices.values().flat_map(|device| device.all_in(range.clone()));
        let mut pages: Vec<_> = pinned.collect();
        pages.sort_unstable();
        pages.dedup();
        pages.len() as u64
    }

    /// `VFIO_IOMMU_MAP_DMA`
    pub fn map(&mut self, new: &Mapping) -> Result<(), Errnos> {
        self.map_backed(new, new.size)
    }

    /// `VFIO_IOMMU_MAP_DMA` where the process has memory for the first `backed` bytes only: devices
    /// fault on the others.
    pub fn map_backed(&mut self, new: &Mapping, backed: u64) -> Result<(), Errnos> {
        self.map_errnos(new, backed).check()?;
        let dirty = self.tracking.then(|| Bitmap::new(new.size / self.page_size));
        self.dma_avail -= 1;
        let mut mapped = self.mapped(new, backed);
        mapped.dirty = dirty;
        self.mappings.insert(new.iova, mapped);
        Ok(())
    }

    /// `VFIO_IOMMU_MAP_DMA` with a flag that there isn't, which always fails.
    pub fn map_with_unknown_flag(&self, new: &Mapping) -> Errnos {
        self.map_errnos(new, new.size) | Errno::EINVAL
    }

    /// `VFIO_IOMMU_MAP_DMA` with `VFIO_DMA_MAP_FLAG_VADDR`, which gives an address to a mapping that has
    /// none, see [`Self::invalidate_vaddr`].
    pub fn update_vaddr(&mut self, new: &Mapping) -> Result<(), Errnos> {
        let errnos = self.mapping_errnos(new, new.protection == Protection::NONE);
        let Ok(last) = last_of(new.iova, new.size) else { return errnos.check() };
        let none = self.overlapping(new.iova, last).next().is_none();
        let mapped = self.mappings.get_mut(&new.iova);
        let mapped = mapped.filter(|mapped| mapped.size == new.size && !mapped.has_vaddr);
        let errno = if none { Errno::ENOENT } else { Errno::EINVAL };
        (errnos | Errnos::when(mapped.is_none(), errno)).check()?;
        if let Some(mapped) = mapped {
            mapped.has_vaddr = true;
        }
        Ok(())
    }

    /// `VFIO_IOMMU_UNMAP_DMA` without flags. Returns how many bytes were unmapped.
    pub fn unmap(&mut self, iova: u64, size: u64) -> Result<u64, Errnos> {
        self.range_errnos(iova, size).check()?;
        Ok(self.remove(iova, iova + (size - 1)))
    }

    /// `VFIO_IOMMU_UNMAP_DMA` with `VFIO_DMA_UNMAP_FLAG_ALL`, for which the range must be 0.
    pub fn unmap_all(&mut self, iova: u64, size: u64) -> Result<u64, Errnos> {
        no_range_errnos(iova, size).check()?;
        Ok(self.remove(0, u64::MAX))
    }

    /// `VFIO_IOMMU_UNMAP_DMA` with a flag that there isn't, which always fails.
    pub fn unmap_with_unknown_flag(&self, iova: u64, size: u64) -> Errnos {
        self.range_errnos(iova, size) | Errno::EINVAL
    }

    /// `VFIO_IOMMU_UNMAP_DMA` with `VFIO_DMA_UNMAP_FLAG_VADDR`, of a range or of `all`: the process's
    /// addresses of these mappings are invalid from now on. Returns how many bytes. Containers refuse
    /// that have groups without an IOMMU: their devices use addresses all the time.
    pub fn invalidate_vaddr(&mut self, iova: u64, size: u64, all: bool) -> Result<u64, Errnos> {
        let range = if all { no_range_errnos(iova, size) } else { self.range_errnos(iova, size) };
        (range | Errnos::when(self.has_emulated(), Errno::EBUSY)).check()?;
        let last = if all { u64::MAX } else { iova + (size - 1) };
        let again = self.mappings.range(iova..=last).any(|(_, mapped)| !mapped.has_vaddr);
        Errnos::when(again, Errno::EINVAL).check()?;
        let mut bytes = 0;
        for (_, mapped) in self.mappings.range_mut(iova..=last) {
            mapped.has_vaddr = false;
            bytes += mapped.size;
        }
        Ok(bytes)
    }

    /// Whether a mapping has no valid address: devices can't pin then, and no group can join.
    pub fn lacks_vaddr(&self) -> bool {
        self.mappings.values().any(|mapped| !mapped.has_vaddr)
    }

    /// `VFIO_IOMMU_UNMAP_DMA` with `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`. Returns how many bytes
    /// were unmapped, and the bitmap, whose first page is at `iova`. If the bitmap can't be written
    /// to the buffer, nothing is unmapped; but pins in the range are revoked by then.
    pub fn unmap_dirty(
        &mut self,
        iova: u64,
        size: u64,
        buffer: &BitmapBuffer,
    ) -> Result<(u64, Bitmap), Errnos> {
        self.check_read(iova, size, buffer)?;
        let last = iova + (size - 1);
        // Devices let go before the bitmap is written: afterwards they could make more pages dirty.
        for device in self.devices.values_mut() {
            device.revoke(iova..last.saturating_add(1));
        }
        let bitmap = self.collect(iova, size, buffer)?;
        Ok((self.remove(iova, last), bitmap))
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with `VFIO_IOMMU_DIRTY_PAGES_FLAG_START`: what is pinned is dirty
    /// from now on. While tracking it does nothing.
    pub fn start(&mut self) -> Result<(), Errnos> {
        if self.tracking {
            return Ok(());
        }
        if self.mappings.values().any(|m| m.size / self.page_size > BITMAP_PAGES_MAX) {
            return Err(Errno::EINVAL.into());
        }
        for mapped in self.mappings.values_mut() {
            mapped.dirty = Some(only_pinned(mapped, &self.devices, self.page_size));
        }
        self.tracking = true;
        Ok(())
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with `VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP`: forgets all.
    pub fn stop(&mut self) {
        self.tracking = false;
        for mapped in self.mappings.values_mut() {
            mapped.dirty = None;
        }
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with `VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP`. Returns the bitmap,
    /// whose first page is at `iova`; holes are 0. What was reported is forgotten, but for pages
    /// that are pinned. If the bitmap can't be written to the buffer, nothing is forgotten; where
    /// nothing is mapped, nothing is written.
    pub fn get_bitmap(
        &mut self,
        iova: u64,
        size: u64,
        buffer: &BitmapBuffer,
    ) -> Result<Bitmap, Errnos> {
        self.check_read(iova, size, buffer)?;
        let last = iova + (size - 1);
        let bitmap = self.collect(iova, size, buffer)?;
        for (_, mapped) in self.mappings.range_mut(iova..=last) {
            mapped.dirty = Some(only_pinned(mapped, &self.devices, self.page_size));
        }
        Ok(bitmap)
    }

    /// The process makes the memory under the pages of `range` inaccessible (`hidden`), or accessible
    /// again. Pins of it stay valid.
    pub fn set_hidden(&mut self, range: Range<u64>, hidden: bool) {
        let page_size = self.page_size;
        for page in crate::device::pages(range, page_size) {
            if let Some((_, mapped)) = self.mappings.range_mut(..=page).next_back() {
                if page <= mapped.last() {
                    mapped.set_hidden(page, hidden);
                }
            }
        }
    }

    /// Opens a device of a group that is in the container.
    pub fn open(&mut self, group: u32, limits: Limits) -> DeviceId {
        let id = DeviceId(self.next_device);
        self.next_device += 1;
        self.devices.insert(id, Device::new(group, limits, self.page_size));
        id
    }

    /// Closes a device, which drops its pins.
    pub fn close(&mut self, id: DeviceId) {
        self.devices.remove(&id);
    }

    /// `VFIO_DEVICE_RESET`, which drops the device's pins.
    pub fn reset(&mut self, id: DeviceId) {
        self.device(id).revoke_all();
    }

    /// A device unpins a range that is being unmapped: what `dma_unmap` owes, by itself. What an unmap
    /// has all devices do, one after the other, others may see half done.
    pub fn revoke(&mut self, id: DeviceId, range: Range<u64>) {
        self.device(id).revoke(range);
    }

    /// The pages that PIN has pinned of a device, by IOVA.
    pub fn pinned(&self, id: DeviceId) -> impl Iterator<Item = u64> {
        self.devices[&id].pinned(0..u64::MAX)
    }

    /// The raw pins of a device.
    pub fn raw_pins(&self, id: DeviceId) -> &[RawPin] {
        self.devices[&id].raw()
    }

    /// The pages that a device has pinned in any way, some of them more than once.
    pub fn all_pinned(&self, id: DeviceId) -> impl Iterator<Item = u64> {
        self.devices[&id].all_in(0..u64::MAX)
    }

    /// Whether any device has pinned a page of a range.
    pub fn has_pins_in(&self, range: Range<u64>) -> bool {
        self.devices.values().any(|device| device.all_in(range.clone()).next().is_some())
    }

    /// The pins a device holds.
    pub fn pins(&self, id: DeviceId) -> u64 {
        self.devices[&id].held()
    }

    /// What is wrong with a mapping to make, of itself and with all others.
    fn map_errnos(&self, new: &Mapping, backed: u64) -> Errnos {
        let last = last_of(new.iova, new.size);
        let overlaps = last.is_ok_and(|last| self.overlapping(new.iova, last).next().is_some());
        let iommu = match last {
            Ok(_) => self.iommu_map_errnos(&self.mapped(new, backed)),
            Err(_) => Errnos::NONE,
        };
        let too_large = self.tracking && new.size / self.page_size > BITMAP_PAGES_MAX;
        self.mapping_errnos(new, new.protection != Protection::NONE)
            | Errnos::when(overlaps, Errno::EEXIST)
            | Errnos::when(self.dma_avail == 0, Errno::ENOSPC)
            | Errnos::when(too_large, Errno::EINVAL)
            | iommu
    }

    /// The mapping that would come of it, without a bitmap.
    fn mapped(&self, new: &Mapping, backed: u64) -> Mapped {
        Mapped::new(new, backed, self.lock_limit.is_some())
    }

    /// What is wrong with the arguments of a map.
    fn mapping_errnos(&self, new: &Mapping, flags_good: bool) -> Errnos {
        let whole_pages = (new.iova | new.vaddr | new.size) % self.page_size == 0;
        let wraps = |start| last_of(start, new.size).map_or_else(Into::into, |_| Errnos::NONE);
        Errnos::when(!flags_good || !whole_pages, Errno::EINVAL)
            | wraps(new.iova)
            | wraps(new.vaddr)
    }

    /// What is wrong with a range to read or to unmap.
    fn range_errnos(&self, iova: u64, size: u64) -> Errnos {
        let whole_pages = (iova | size) % self.page_size == 0;
        let range = match last_of(iova, size) {
            Ok(last) => Errnos::when(self.bisects(iova, last), Errno::EINVAL),
            Err(errno) => errno.into(),
        };
        Errnos::when(!whole_pages, Errno::EINVAL) | range
    }

    /// Fails as [`Self::get_bitmap`] and [`Self::unmap_dirty`] do for their arguments alone, whether or not
    /// the buffer can be written.
    pub fn check_read(&self, iova: u64, size: u64, buffer: &BitmapBuffer) -> Result<(), Errnos> {
        self.read_errnos(iova, size, buffer).check()
    }

    /// What is wrong with the arguments of a read.
    fn read_errnos(&self, iova: u64, size: u64, buffer: &BitmapBuffer) -> Errnos {
        let impossible = !self.tracking || buffer.pgsize != self.page_size;
        self.range_errnos(iova, size)
            | buffer.errnos(size)
            | Errnos::when(impossible, Errno::EINVAL)
    }

    /// The mappings that have bytes of `[iova, last]`.
    fn overlapping(&self, iova: u64, last: u64) -> impl Iterator<Item = &Mapped> {
        let before = self.mappings.range(..iova).next_back();
        let inside = self.mappings.range(iova..=last);
        before.into_iter().chain(inside).map(|(_, m)| m).filter(move |m| m.last() >= iova)
    }

    /// Whether `[iova, last]` contains part of a mapping only.
    fn bisects(&self, iova: u64, last: u64) -> bool {
        self.overlapping(iova, last).any(|mapped| mapped.iova < iova || mapped.last() > last)
    }

    /// What is dirty in `[iova, iova + size)`, a range that bisects no mapping, if `buffer` can hold
    /// it.
    fn collect(&self, iova: u64, size: u64, buffer: &BitmapBuffer) -> Result<Bitmap, Errnos> {
        let mut bitmap = Bitmap::new(size / self.page_size);
        for (mapping, fits) in self.mappings_in(iova, size, buffer) {
            if !fits {
                return Err(Errno::EFAULT.into());
            }
            let first = (mapping.iova - iova) / self.page_size;
            if self.all_dirty() {
                bitmap.merge(&all_of(mapping.size / self.page_size), first);
            } else if let Some(dirty) = mapping.dirty {
                bitmap.merge(dirty, first);
            }
        }
        Ok(bitmap)
    }

    /// Removes the mappings in `[iova, last]`, which revokes pins in them. Returns their bytes.
    fn remove(&mut self, iova: u64, last: u64) -> u64 {
        let mut bytes = 0;
        while let Some((&start, mapped)) = self.mappings.range(iova..=last).next() {
            for device in self.devices.values_mut() {
                device.revoke(start..mapped.end());
            }
            bytes += mapped.size;
            self.mappings.remove(&start);
            self.dma_avail += 1;
        }
        bytes
    }

    fn device(&mut self, id: DeviceId) -> &mut Device {
        self.devices.get_mut(&id).expect("an open device")
    }
}

/// The last byte of a range, if it has any and doesn't wrap.
fn last_of(start: u64, size: u64) -> Result<u64, Errno> {
    let more = size.checked_sub(1).ok_or(Errno::EINVAL)?;
    start.checked_add(more).ok_or(Errno::EOVERFLOW)
}

/// What is wrong with a range that has to be 0.
fn no_range_errnos(iova: u64, size: u64) -> Errnos {
    Errnos::when((iova, size) != (0, 0), Errno::EINVAL)
}

/// The pages of a mapping that any device has pinned.
fn only_pinned(mapped: &Mapped, devices: &BTreeMap<DeviceId, Device>, page_size: u64) -> Bitmap {
    let mut dirty = Bitmap::new(mapped.size / page_size);
    for device in devices.values() {
        for page in device.all_in(mapped.iova..mapped.end()) {
            let page = (page - mapped.iova) / page_size;
            dirty.set(page..page + 1);
        }
    }
    dirty
}
