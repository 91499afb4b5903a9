// SPDX-License-Identifier: GPL-2.0-only

use crate::{
    Bitmap, Errno,
    device::{Command, Device, Limits, Op, Outcome, cut, pages},
};
use std::{collections::BTreeMap, ops::Range};

/// The most pages of which type1 keeps account in one mapping, or in one bitmap.
pub const BITMAP_PAGES_MAX: u64 = i32::MAX as u64;

/// What a device may do to a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection {
    /// `VFIO_DMA_MAP_FLAG_READ`
    pub read: bool,
    /// `VFIO_DMA_MAP_FLAG_WRITE`
    pub write: bool,
}

impl Protection {
    /// Nothing: no mapping may have this.
    pub const NONE: Self = Self { read: false, write: false };
    /// Read only.
    pub const READ: Self = Self { read: true, write: false };
    /// Write only.
    pub const WRITE: Self = Self { read: false, write: true };
    /// Read and write.
    pub const READ_WRITE: Self = Self { read: true, write: true };

    fn allows(self, wanted: Self) -> bool {
        self.read >= wanted.read && self.write >= wanted.write
    }
}

/// The arguments of `VFIO_IOMMU_MAP_DMA`, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where the device sees it.
    pub iova: u64,
    /// Where the process has it.
    pub vaddr: u64,
    /// How much it is.
    pub size: u64,
    /// What the device may do to it.
    pub protection: Protection,
}

/// What a user says of the buffer for a bitmap: `struct vfio_bitmap` without the pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapBuffer {
    /// Bytes of a page, one bit each.
    pub pgsize: u64,
    /// Bytes of the buffer.
    pub size: u64,
}

impl BitmapBuffer {
    /// The smallest buffer for `size` bytes of IOVA.
    pub fn covering(size: u64, page_size: u64) -> Self {
        Self { pgsize: page_size, size: bitmap_bytes(size / page_size) }
    }

    /// Whether it is good for `size` bytes of IOVA.
    fn check(&self, size: u64) -> Result<(), Errno> {
        let pages = size.checked_div(self.pgsize).ok_or(Errno::EINVAL)?;
        let big_enough = pages > 0 && self.size >= bitmap_bytes(pages);
        (big_enough && self.size <= bitmap_bytes(BITMAP_PAGES_MAX))
            .then_some(())
            .ok_or(Errno::EINVAL)
    }
}

/// Bytes of a bitmap of `pages` pages: whole words of 64 bits.
fn bitmap_bytes(pages: u64) -> u64 {
    pages.div_ceil(64) * 8
}

/// Names an open device of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceId(u32);

/// Part of a mapping's state; its IOVA is its key.
struct Mapped {
    size: u64,
    /// Bytes from its begin on for which the process has memory.
    backed: u64,
    protection: Protection,
    /// One bit a page, while tracking is on.
    dirty: Option<Bitmap>,
}

/// Where a mapping ends, and where its memory does.
struct Ends {
    end: u64,
    backed_end: u64,
}

/// A type1 v2 container, and the devices that are open in it.
///
/// Invariant: mappings don't overlap, and all of them have a bitmap or none, as `tracking` says.
pub struct Container {
    page_size: u64,
    mappings: BTreeMap<u64, Mapped>,
    dma_avail: u32,
    tracking: bool,
    devices: BTreeMap<DeviceId, Device>,
    next_device: u32,
}

impl Container {
    /// A container without mappings. `page_size` is the smallest that the IOMMU driver supports,
    /// `dma_entry_limit` its limit on mappings.
    pub fn new(page_size: u64, dma_entry_limit: u32) -> Self {
        Self {
            page_size,
            mappings: BTreeMap::new(),
            dma_avail: dma_entry_limit,
            tracking: false,
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

    /// IOVA and size of all mappings, ascending.
    pub fn mappings(&self) -> impl Iterator<Item = (u64, u64)> {
        self.mappings.iter().map(|(&iova, mapped)| (iova, mapped.size))
    }

    /// `VFIO_IOMMU_MAP_DMA`
    pub fn map(&mut self, new: &Mapping) -> Result<(), Errno> {
        self.map_backed(new, new.size)
    }

    /// `VFIO_IOMMU_MAP_DMA` where the process has memory for the first `backed` bytes only: devices
    /// fault on the others.
    pub fn map_backed(&mut self, new: &Mapping, backed: u64) -> Result<(), Errno> {
        if new.size == 0 {
            return Err(Errno::EINVAL);
        }
        let last = last_of(new.iova, new.size)?;
        last_of(new.vaddr, new.size)?;
        if new.protection == Protection::NONE
            || (new.iova | new.vaddr | new.size) % self.page_size != 0
        {
            return Err(Errno::EINVAL);
        }
        if self.overlapping(new.iova, last).next().is_some() {
            return Err(Errno::EEXIST);
        }
        if self.dma_avail == 0 {
            return Err(Errno::ENOSPC);
        }
        let dirty = self.tracking.then(|| self.new_bitmap(new.size)).transpose()?;

        self.dma_avail -= 1;
        self.mappings
            .insert(new.iova, Mapped { size: new.size, backed, protection: new.protection, dirty });
        Ok(())
    }

    /// `VFIO_IOMMU_UNMAP_DMA` without flags. Returns how many bytes were unmapped.
    pub fn unmap(&mut self, iova: u64, size: u64) -> Result<u64, Errno> {
        let last = self.check_unmap(iova, size)?;
        Ok(self.remove(iova, last))
    }

    /// `VFIO_IOMMU_UNMAP_DMA` with `VFIO_DMA_UNMAP_FLAG_ALL`.
    pub fn unmap_all(&mut self) -> u64 {
        self.remove(0, u64::MAX)
    }

    /// `VFIO_IOMMU_UNMAP_DMA` with `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`. Returns how many bytes
    /// were unmapped, and the bitmap, whose first page is at `iova`.
    pub fn unmap_dirty(
        &mut self,
        iova: u64,
        size: u64,
        buffer: &BitmapBuffer,
    ) -> Result<(u64, Bitmap), Errno> {
        buffer.check(size)?;
        let last = self.check_unmap(iova, size)?;
        if !self.tracking || buffer.pgsize != self.page_size {
            return Err(Errno::EINVAL);
        }
        let bitmap = self.collect(iova, size);
        Ok((self.remove(iova, last), bitmap))
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with `VFIO_IOMMU_DIRTY_PAGES_FLAG_START`: what is pinned is dirty
    /// from now on. While tracking it does nothing.
    pub fn start(&mut self) -> Result<(), Errno> {
        if self.tracking {
            return Ok(());
        }
        if self.mappings.values().any(|m| m.size / self.page_size > BITMAP_PAGES_MAX) {
            return Err(Errno::EINVAL);
        }
        for (&iova, mapped) in &mut self.mappings {
            let mut dirty = Bitmap::new(mapped.size / self.page_size);
            set_pinned(&mut dirty, &self.devices, iova, mapped.size, self.page_size);
            mapped.dirty = Some(dirty);
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
    /// that are pinned.
    pub fn get_bitmap(
        &mut self,
        iova: u64,
        size: u64,
        buffer: &BitmapBuffer,
    ) -> Result<Bitmap, Errno> {
        if size == 0 {
            return Err(Errno::EINVAL);
        }
        let last = last_of(iova, size)?;
        buffer.check(size)?;
        if buffer.pgsize != self.page_size
            || (iova | size) % self.page_size != 0
            || !self.tracking
            || self.bisects(iova, last)
        {
            return Err(Errno::EINVAL);
        }
        let bitmap = self.collect(iova, size);
        for (&start, mapped) in self.mappings.range_mut(iova..=last) {
            if let Some(dirty) = &mut mapped.dirty {
                dirty.clear();
                set_pinned(dirty, &self.devices, start, mapped.size, self.page_size);
            }
        }
        Ok(bitmap)
    }

    /// Opens a device.
    pub fn open(&mut self, limits: Limits) -> DeviceId {
        let id = DeviceId(self.next_device);
        self.next_device += 1;
        self.devices.insert(id, Device::new(limits));
        id
    }

    /// Closes a device, which gives back its pins.
    pub fn close(&mut self, id: DeviceId) {
        self.devices.remove(&id);
    }

    /// `VFIO_DEVICE_RESET`, which gives back the device's pins.
    pub fn reset(&mut self, id: DeviceId) {
        self.device(id).revoke_all();
    }

    /// The pins a device holds.
    pub fn pins(&self, id: DeviceId) -> u64 {
        self.devices[&id].held()
    }

    /// Runs a command.
    pub fn command(&mut self, id: DeviceId, command: &Command) -> Outcome {
        let (status, count, transferred) = match self.try_command(id, command) {
            Ok(done) => done,
            Err(e) => (Err(e), 0, 0),
        };
        Outcome { status, count, transferred }
    }

    fn try_command(&mut self, id: DeviceId, command: &Command) -> Result<Done, Errno> {
        let op = command.op.ok_or(Errno::EOPNOTSUPP)?;
        let range = self.device(id).check_range(command)?;
        let length = command.length;
        match op {
            Op::Pin => self.pin(id, range).map(|()| (Ok(()), length, 0)),
            Op::Unpin => self.unpin(id, range).map(|()| (Ok(()), length, 0)),
            Op::Write | Op::Read => self.check_pinned(id, range).map(|()| (Ok(()), length, length)),
            Op::DmaWrite => Ok(self.dma(id, range, Protection::READ_WRITE)),
            Op::DmaRead => Ok(self.dma(id, range, Protection::READ)),
        }
    }

    fn pin(&mut self, id: DeviceId, range: Range<u64>) -> Result<(), Errno> {
        self.check_whole_pages(&range)?;
        let Limits { max_pins, pin_batch, .. } = self.device(id).limits;
        let count = (range.end - range.start) / self.page_size;
        if count > max_pins.saturating_sub(self.device(id).held()) {
            return Err(Errno::ENOSPC);
        }
        for batch in cut(range.clone(), pin_batch) {
            if let Err(e) = self.pin_batch(id, batch.clone()) {
                for page in pages(range.start..batch.start, self.page_size) {
                    self.device(id).unpin(page);
                }
                return Err(e);
            }
        }
        Ok(())
    }

    /// Pins one batch, or nothing of it: then none of its pages was ever pinned, none is dirty.
    fn pin_batch(&mut self, id: DeviceId, batch: Range<u64>) -> Result<(), Errno> {
        let page_size = self.page_size;
        if pages(batch.clone(), page_size).any(|page| !self.device(id).has_room_for(page)) {
            return Err(Errno::ENOSPC);
        }
        for page in pages(batch.clone(), page_size) {
            if page >= self.mapping_at(page, Protection::READ_WRITE)?.backed_end {
                return Err(Errno::EFAULT);
            }
        }
        for page in pages(batch, page_size) {
            self.device(id).pin(page);
            self.mark(page..page + page_size);
        }
        Ok(())
    }

    fn unpin(&mut self, id: DeviceId, range: Range<u64>) -> Result<(), Errno> {
        self.check_whole_pages(&range)?;
        self.check_pinned(id, range.clone())?;
        for page in pages(range, self.page_size) {
            self.device(id).unpin(page);
        }
        Ok(())
    }

    /// `vfio_dma_rw()` in chunks, up to the first that fails. Within a chunk, mapping by mapping.
    fn dma(&mut self, id: DeviceId, range: Range<u64>, wanted: Protection) -> Done {
        let start = range.start;
        let dma_chunk = self.device(id).limits.dma_chunk;
        for chunk in cut(range.clone(), dma_chunk) {
            let mut next = chunk.start;
            while next < chunk.end {
                let mapping = match self.mapping_at(next, wanted) {
                    Ok(mapping) => mapping,
                    Err(e) => return (Err(e), chunk.start - start, next - start),
                };
                let end = mapping.end.min(chunk.end);
                let written = end.min(mapping.backed_end).max(next);
                if wanted.write && next < written {
                    self.mark(next..written);
                }
                if written < end {
                    return (Err(Errno::EFAULT), chunk.start - start, written - start);
                }
                next = end;
            }
        }
        let length = range.end - start;
        (Ok(()), length, length)
    }

    /// Makes the pages that `range` touches dirty. It lies in one mapping.
    fn mark(&mut self, range: Range<u64>) {
        let page_size = self.page_size;
        if let Some((&iova, mapped)) = self.mappings.range_mut(..=range.start).next_back() {
            if let Some(dirty) = &mut mapped.dirty {
                let first = (range.start - iova) / page_size;
                dirty.set(first..(range.end - iova).div_ceil(page_size));
            }
        }
    }

    /// The mapping that `iova` lies in, if it allows what is `wanted`.
    fn mapping_at(&self, iova: u64, wanted: Protection) -> Result<Ends, Errno> {
        let (&start, mapped) = self.overlapping(iova, iova).next().ok_or(Errno::EINVAL)?;
        if !mapped.protection.allows(wanted) {
            return Err(Errno::EPERM);
        }
        let end = |bytes| start.saturating_add(bytes);
        Ok(Ends { end: end(mapped.size), backed_end: end(mapped.backed) })
    }

    /// The mappings that have bytes of `[iova, last]`.
    fn overlapping(&self, iova: u64, last: u64) -> impl Iterator<Item = (&u64, &Mapped)> {
        let before = self.mappings.range(..iova).next_back();
        before
            .into_iter()
            .filter(move |(start, mapped)| iova - **start < mapped.size)
            .chain(self.mappings.range(iova..=last))
    }

    /// Whether `[iova, last]` contains part of a mapping only.
    fn bisects(&self, iova: u64, last: u64) -> bool {
        self.overlapping(iova, last)
            .any(|(&start, mapped)| start < iova || start + (mapped.size - 1) > last)
    }

    /// What is dirty in `[iova, iova + size)`, a range that bisects no mapping.
    fn collect(&self, iova: u64, size: u64) -> Bitmap {
        let mut bitmap = Bitmap::new(size / self.page_size);
        for (&start, mapped) in self.mappings.range(iova..=iova + (size - 1)) {
            if let Some(dirty) = &mapped.dirty {
                bitmap.merge(dirty, (start - iova) / self.page_size);
            }
        }
        bitmap
    }

    /// Removes the mappings in `[iova, last]`, which revokes pins in them. Returns their bytes.
    fn remove(&mut self, iova: u64, last: u64) -> u64 {
        let found: Vec<_> = self.mappings.range(iova..=last).map(|(&at, m)| (at, m.size)).collect();
        for &(start, size) in &found {
            for device in self.devices.values_mut() {
                device.revoke(start..start.saturating_add(size));
            }
            self.mappings.remove(&start);
            self.dma_avail += 1;
        }
        found.iter().map(|(_, size)| size).sum()
    }

    fn check_unmap(&self, iova: u64, size: u64) -> Result<u64, Errno> {
        if size == 0 || (iova | size) % self.page_size != 0 {
            return Err(Errno::EINVAL);
        }
        let last = last_of(iova, size)?;
        if self.bisects(iova, last) {
            return Err(Errno::EINVAL);
        }
        Ok(last)
    }

    fn check_whole_pages(&self, range: &Range<u64>) -> Result<(), Errno> {
        let whole = (range.start | range.end) % self.page_size == 0;
        whole.then_some(()).ok_or(Errno::EINVAL)
    }

    fn check_pinned(&mut self, id: DeviceId, range: Range<u64>) -> Result<(), Errno> {
        let pages = pages(range, self.page_size);
        let pinned = self.device(id).all_pinned(pages);
        pinned.then_some(()).ok_or(Errno::ENXIO)
    }

    fn new_bitmap(&self, size: u64) -> Result<Bitmap, Errno> {
        let pages = size / self.page_size;
        (pages <= BITMAP_PAGES_MAX).then(|| Bitmap::new(pages)).ok_or(Errno::EINVAL)
    }

    fn device(&mut self, id: DeviceId) -> &mut Device {
        self.devices.get_mut(&id).expect("an open device")
    }
}

/// Status, COUNT, and bytes transferred of a command.
type Done = (Result<(), Errno>, u64, u64);

/// The last byte of a range that has any.
fn last_of(start: u64, size: u64) -> Result<u64, Errno> {
    start.checked_add(size - 1).ok_or(Errno::EOVERFLOW)
}

/// Sets the pages of a mapping that any device has pinned.
fn set_pinned(
    dirty: &mut Bitmap,
    devices: &BTreeMap<DeviceId, Device>,
    iova: u64,
    size: u64,
    page_size: u64,
) {
    for device in devices.values() {
        for page in device.pinned(iova..iova.saturating_add(size)) {
            let page = (page - iova) / page_size;
            dirty.set(page..page + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const LIMITS: Limits = Limits {
        max_pins: 256,
        page_pins: 3,
        max_length: 1 << 20,
        pin_batch: 64 * PAGE,
        dma_chunk: 16 * PAGE,
    };

    fn mapping(iova: u64, pages: u64) -> Mapping {
        Mapping { iova, vaddr: 0x7000_0000, size: pages * PAGE, protection: Protection::READ_WRITE }
    }

    /// A container with `pages` pages at 0, and a device in it.
    fn container(pages: u64) -> (Container, DeviceId) {
        let mut container = Container::new(PAGE, 10);
        container.map(&mapping(0, pages)).unwrap();
        let id = container.open(LIMITS);
        (container, id)
    }

    fn run(container: &mut Container, id: DeviceId, op: Op, iova: u64, length: u64) -> Outcome {
        let op = Some(op);
        container.command(id, &Command { op, iova, length })
    }

    fn ok(container: &mut Container, id: DeviceId, op: Op, iova: u64, length: u64) {
        let outcome = run(container, id, op, iova, length);
        assert_eq!((outcome.status, outcome.count), (Ok(()), length), "{op:?}");
    }

    fn fails(
        container: &mut Container,
        id: DeviceId,
        op: Op,
        iova: u64,
        length: u64,
        errno: Errno,
    ) -> Outcome {
        let outcome = run(container, id, op, iova, length);
        assert_eq!(outcome.status, Err(errno), "{op:?} of {iova:#x}+{length:#x}");
        outcome
    }

    /// Reads the bitmap of pages `[0, pages)`.
    fn read(container: &mut Container, pages: u64) -> Vec<Range<u64>> {
        let size = pages * PAGE;
        let buffer = BitmapBuffer::covering(size, PAGE);
        container.get_bitmap(0, size, &buffer).unwrap().runs()
    }

    #[test]
    fn pinned_pages_are_dirty_until_the_read_after_unpinning() {
        let (mut c, dev) = container(16);
        ok(&mut c, dev, Op::Pin, 2 * PAGE, 3 * PAGE);
        c.start().unwrap();
        assert_eq!(read(&mut c, 16), [2..5]);
        assert_eq!(read(&mut c, 16), [2..5]);
        ok(&mut c, dev, Op::Unpin, 3 * PAGE, PAGE);
        assert_eq!(read(&mut c, 16), [2..5]);
        assert_eq!(read(&mut c, 16), [2..3, 4..5]);
    }

    #[test]
    fn dma_writes_are_dirty_once() {
        let (mut c, dev) = container(40);
        c.start().unwrap();
        ok(&mut c, dev, Op::DmaWrite, PAGE - 1, 2);
        ok(&mut c, dev, Op::DmaWrite, 20 * PAGE + 5, 1);
        ok(&mut c, dev, Op::DmaRead, 0, 40 * PAGE);
        assert_eq!(read(&mut c, 40), [0..2, 20..21]);
        assert_eq!(read(&mut c, 40), []);
    }

    #[test]
    fn start_is_idempotent_and_stop_forgets() {
        let (mut c, dev) = container(4);
        c.start().unwrap();
        ok(&mut c, dev, Op::DmaWrite, 0, 8);
        c.start().unwrap();
        assert_eq!(read(&mut c, 4), [0..1]);
        ok(&mut c, dev, Op::DmaWrite, 0, 8);
        c.stop();
        c.stop();
        let buffer = BitmapBuffer::covering(4 * PAGE, PAGE);
        assert_eq!(c.get_bitmap(0, 4 * PAGE, &buffer), Err(Errno::EINVAL));
        c.start().unwrap();
        assert_eq!(read(&mut c, 4), []);
    }

    #[test]
    fn start_fails_as_a_whole() {
        let (mut c, _) = container(4);
        c.map(&mapping(1 << 50, BITMAP_PAGES_MAX + 1)).unwrap();
        assert_eq!(c.start(), Err(Errno::EINVAL));
        assert!(!c.tracking());
        c.unmap(1 << 50, (BITMAP_PAGES_MAX + 1) * PAGE).unwrap();
        c.start().unwrap();
        let too_big = mapping(1 << 50, BITMAP_PAGES_MAX + 1);
        assert_eq!(c.map(&too_big), Err(Errno::EINVAL));
    }

    #[test]
    fn ranges_may_club_but_not_bisect() {
        let (mut c, dev) = container(10);
        c.map(&mapping(10 * PAGE, 5)).unwrap();
        c.map(&mapping(20 * PAGE, 5)).unwrap();
        c.start().unwrap();
        ok(&mut c, dev, Op::DmaWrite, 9 * PAGE, 2 * PAGE);
        ok(&mut c, dev, Op::DmaWrite, 24 * PAGE, 1);
        let get = |c: &mut Container, first: u64, pages: u64| {
            let buffer = BitmapBuffer::covering(pages * PAGE, PAGE);
            c.get_bitmap(first * PAGE, pages * PAGE, &buffer).map(|b| b.runs())
        };
        for (first, pages) in [(1, 9), (0, 9), (0, 14), (11, 20), (0, 24), (21, 1)] {
            assert_eq!(get(&mut c, first, pages), Err(Errno::EINVAL), "{first}+{pages}");
        }
        assert_eq!(get(&mut c, 15, 5), Ok(vec![]));
        assert_eq!(get(&mut c, 10, 20), Ok(vec![0..1, 14..15]));
        assert_eq!(read(&mut c, 30), [9..10]);
    }

    #[test]
    fn arguments_of_a_read() {
        let (mut c, _) = container(100);
        c.start().unwrap();
        let size = 100 * PAGE;
        let good = BitmapBuffer::covering(size, PAGE);
        assert_eq!(good.size, 16);
        let get = |c: &mut Container, iova, size, buffer| c.get_bitmap(iova, size, &buffer).err();
        assert_eq!(get(&mut c, 0, size, good), None);
        assert_eq!(get(&mut c, 0, 0, good), Some(Errno::EINVAL));
        assert_eq!(get(&mut c, 1, size, good), Some(Errno::EINVAL));
        assert_eq!(get(&mut c, 0, size + 1, good), Some(Errno::EINVAL));
        assert_eq!(get(&mut c, PAGE, u64::MAX, good), Some(Errno::EOVERFLOW));
        for (pgsize, size_of_buffer) in [(0, 16), (2 * PAGE, 16), (PAGE, 8), (PAGE, 1 << 29)] {
            let bad = BitmapBuffer { pgsize, size: size_of_buffer };
            assert_eq!(get(&mut c, 0, size, bad), Some(Errno::EINVAL), "{bad:?}");
        }
    }

    #[test]
    fn unmap_revokes_and_reports() {
        let (mut c, dev) = container(8);
        c.map(&mapping(8 * PAGE, 8)).unwrap();
        assert_eq!(c.dma_avail(), 8);
        ok(&mut c, dev, Op::Pin, 6 * PAGE, 4 * PAGE);
        ok(&mut c, dev, Op::Pin, 6 * PAGE, PAGE);
        assert_eq!(c.pins(dev), 5);
        c.start().unwrap();
        ok(&mut c, dev, Op::DmaWrite, PAGE, 1);

        let buffer = BitmapBuffer::covering(8 * PAGE, PAGE);
        let (bytes, bitmap) = c.unmap_dirty(0, 8 * PAGE, &buffer).unwrap();
        assert_eq!(bytes, 8 * PAGE);
        assert_eq!(bitmap.runs(), [1..2, 6..8]);
        assert_eq!((c.pins(dev), c.dma_avail()), (2, 9));
        fails(&mut c, dev, Op::Write, 6 * PAGE, PAGE, Errno::ENXIO);
        ok(&mut c, dev, Op::Write, 8 * PAGE, 2 * PAGE);

        assert_eq!(c.unmap(9 * PAGE, PAGE), Err(Errno::EINVAL));
        assert_eq!(c.unmap(0, 8 * PAGE), Ok(0));
        assert_eq!(c.unmap_all(), 8 * PAGE);
        assert_eq!((c.pins(dev), c.dma_avail()), (0, 10));
    }

    #[test]
    fn arguments_of_a_map() {
        let (mut c, _) = container(4);
        let good = mapping(8 * PAGE, 4);
        let mut map = |m: Mapping| c.map(&m).err();
        assert_eq!(map(Mapping { size: 0, ..good }), Some(Errno::EINVAL));
        assert_eq!(map(Mapping { size: 1, ..good }), Some(Errno::EINVAL));
        assert_eq!(map(Mapping { iova: 1, ..good }), Some(Errno::EINVAL));
        assert_eq!(map(Mapping { vaddr: 1, ..good }), Some(Errno::EINVAL));
        let nothing = Protection::NONE;
        assert_eq!(map(Mapping { protection: nothing, ..good }), Some(Errno::EINVAL));
        assert_eq!(map(Mapping { iova: 3 * PAGE, ..good }), Some(Errno::EEXIST));
        assert_eq!(map(Mapping { iova: u64::MAX - PAGE + 1, ..good }), Some(Errno::EOVERFLOW));
        for i in 0..9 {
            assert_eq!(map(mapping((100 + i) * PAGE, 1)), None);
        }
        assert_eq!(map(mapping(200 * PAGE, 1)), Some(Errno::ENOSPC));
    }

    #[test]
    fn errors_of_the_device_come_in_order() {
        let (mut c, dev) = container(300);
        let unknown = Command { op: None, iova: 0, length: 0 };
        assert_eq!(c.command(dev, &unknown).status, Err(Errno::EOPNOTSUPP));
        let f = &mut c;
        fails(f, dev, Op::Pin, 1, 0, Errno::EINVAL);
        fails(f, dev, Op::Pin, 1, u64::MAX, Errno::EOVERFLOW);
        fails(f, dev, Op::Pin, 1, LIMITS.max_length + 1, Errno::E2BIG);
        fails(f, dev, Op::Pin, 1, 257 * PAGE, Errno::E2BIG);
        fails(f, dev, Op::Pin, 1, PAGE, Errno::EINVAL);
        fails(f, dev, Op::Unpin, 0, PAGE, Errno::ENXIO);
        ok(f, dev, Op::Pin, 0, PAGE);
        fails(f, dev, Op::Pin, 0, 256 * PAGE, Errno::ENOSPC);
        fails(f, dev, Op::Unpin, 0, 2 * PAGE, Errno::ENXIO);
        fails(f, dev, Op::Write, PAGE - 1, 2, Errno::ENXIO);
        fails(f, dev, Op::Pin, 300 * PAGE, PAGE, Errno::EINVAL);
        assert_eq!(f.pins(dev), 1);
    }

    #[test]
    fn pins_that_fail_in_a_later_batch_leave_nothing_but_what_was_pinned_for_a_moment() {
        let (mut c, dev) = container(100);
        c.start().unwrap();
        fails(&mut c, dev, Op::Pin, 10 * PAGE, 100 * PAGE, Errno::EINVAL);
        assert_eq!(c.pins(dev), 0);
        assert_eq!(read(&mut c, 100), [10..64]);
        assert_eq!(read(&mut c, 100), []);
    }

    #[test]
    fn dma_stops_where_the_mapping_does() {
        let (mut c, dev) = container(20);
        c.start().unwrap();
        let outcome = fails(&mut c, dev, Op::DmaWrite, PAGE, 30 * PAGE, Errno::EINVAL);
        assert_eq!((outcome.count, outcome.transferred), (15 * PAGE, 19 * PAGE));
        assert_eq!(read(&mut c, 20), [1..20]);
    }

    #[test]
    fn protections() {
        let (mut c, dev) = container(1);
        for (i, protection) in [(1, Protection::READ), (2, Protection::WRITE)] {
            let iova = i * PAGE;
            c.map(&Mapping { protection, ..mapping(iova, 1) }).unwrap();
            fails(&mut c, dev, Op::Pin, iova, PAGE, Errno::EPERM);
            fails(&mut c, dev, Op::DmaWrite, iova, 1, Errno::EPERM);
        }
        ok(&mut c, dev, Op::DmaRead, PAGE, PAGE);
        fails(&mut c, dev, Op::DmaRead, 2 * PAGE, PAGE, Errno::EPERM);
    }

    #[test]
    fn a_page_is_pinned_while_any_device_pins_it() {
        let (mut c, one) = container(4);
        let two = c.open(LIMITS);
        ok(&mut c, one, Op::Pin, 0, PAGE);
        ok(&mut c, two, Op::Pin, 0, 2 * PAGE);
        c.start().unwrap();
        c.close(two);
        assert_eq!(read(&mut c, 4), [0..2]);
        assert_eq!(read(&mut c, 4), [0..1]);
        c.reset(one);
        assert_eq!(read(&mut c, 4), [0..1]);
        assert_eq!(read(&mut c, 4), []);
    }

    #[test]
    fn the_last_page_of_the_address_space() {
        let mut c = Container::new(PAGE, 10);
        c.map(&mapping(PAGE.wrapping_neg(), 1)).unwrap();
        let dev = c.open(LIMITS);
        c.start().unwrap();
        ok(&mut c, dev, Op::DmaWrite, PAGE.wrapping_neg(), PAGE - 1);
        fails(&mut c, dev, Op::Pin, PAGE.wrapping_neg(), PAGE, Errno::EOVERFLOW);
        let buffer = BitmapBuffer::covering(PAGE, PAGE);
        let bitmap = c.get_bitmap(PAGE.wrapping_neg(), PAGE, &buffer).unwrap();
        assert_eq!(bitmap.runs(), [0..1]);
        assert_eq!(c.unmap(PAGE.wrapping_neg(), PAGE), Ok(PAGE));
    }
}
