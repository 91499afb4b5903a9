// SPDX-License-Identifier: GPL-2.0-only

//! What the devices of a container do.

use super::{Container, DeviceId};
use crate::{
    Errno, Errnos, Protection,
    device::{Command, CommandKind, CommandOutcome, Limits, cut, pages},
    mapping::Mapped,
};
use std::ops::Range;

/// Status, COUNT, and bytes transferred of a command.
pub(super) type Done = (Result<(), Errnos>, u64, u64);

/// A batch of pins that fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinFailure {
    /// The batch's pages, in bytes of IOVA.
    pub batch: Range<u64>,
    /// The first page of it that can't be pinned; the batch's first if that isn't why it fails.
    pub page: u64,
    /// Why: what is wrong with any of its pages.
    pub errnos: Errnos,
}

impl Container {
    /// Runs a command.
    pub fn command(&mut self, id: DeviceId, command: &Command) -> CommandOutcome {
        let (status, count, transferred) = match self.try_command(id, command) {
            Ok(done) => done,
            Err(errnos) => (Err(errnos), 0, 0),
        };
        CommandOutcome { status, count, transferred }
    }

    fn try_command(&mut self, id: DeviceId, command: &Command) -> Result<Done, Errnos> {
        let kind = command.kind.ok_or(Errno::EOPNOTSUPP)?;
        if let Some(done) = self.raw_command(id, kind, command) {
            return done;
        }
        let range = self.device(id).check_range(command)?;
        let length = command.length;
        match kind {
            CommandKind::Pin => self.pin(id, range).map(|()| (Ok(()), length, 0)),
            CommandKind::Unpin => self.unpin(id, range).map(|()| (Ok(()), length, 0)),
            CommandKind::Write | CommandKind::Read => {
                self.check_pinned(id, range).map(|()| (Ok(()), length, length))
            }
            CommandKind::DmaWrite => Ok(self.dma(id, range, Protection::READ_WRITE)),
            // Those of raw pins have been run.
            _ => Ok(self.dma(id, range, Protection::READ)),
        }
    }

    fn pin(&mut self, id: DeviceId, range: Range<u64>) -> Result<(), Errnos> {
        self.check_whole_pages(&range)?;
        let Limits { max_pins, pin_batch, .. } = self.device(id).limits;
        let count = (range.end - range.start) / self.page_size;
        if count > max_pins.saturating_sub(self.device(id).held()) {
            return Err(Errno::ENOSPC.into());
        }
        for batch in cut(range.clone(), pin_batch) {
            if let Some(failure) = self.pin_failure(id, batch.clone()) {
                for page in pages(range.start..batch.start, self.page_size) {
                    self.device(id).unpin(page);
                }
                return Err(failure.errnos);
            }
            let page_size = self.page_size;
            for page in pages(batch, page_size) {
                self.device(id).pin(page);
                self.mark(page..page + page_size);
            }
            self.promote(self.devices[&id].group);
        }
        Ok(())
    }

    /// Why pinning a batch would fail, if it would. Then none of its pages was ever pinned, and none
    /// is dirty.
    ///
    /// A page that is pinned already is pinned once more, whatever became of the process's memory.
    pub fn pin_failure(&self, id: DeviceId, batch: Range<u64>) -> Option<PinFailure> {
        let device = &self.devices[&id];
        if pages(batch.clone(), self.page_size).any(|page| !device.has_room_for(page)) {
            let (page, errnos) = (batch.start, Errno::ENOSPC.into());
            return Some(PinFailure { batch, page, errnos });
        }
        let mut unlocked = self.unlocked();
        let mut failure: Option<PinFailure> = None;
        for page in pages(batch.clone(), self.page_size) {
            if let Err(errnos) =
                self.pin_errnos(page, Protection::READ_WRITE, &mut unlocked).check()
            {
                let batch = batch.clone();
                let first = failure.get_or_insert(PinFailure { batch, page, errnos });
                first.errnos = first.errnos | errnos;
            }
        }
        failure
    }

    /// What is wrong with a page to pin, of which the user may lock so many more that are `unlocked`.
    pub(super) fn pin_errnos(
        &self,
        page: u64,
        wanted: Protection,
        unlocked: &mut Option<u64>,
    ) -> Errnos {
        if self.lacks_vaddr() {
            return Errno::EBUSY.into();
        }
        let Some(mapping) = self.mapping_at(page) else { return Errno::EINVAL.into() };
        if self.is_pinned(page) {
            return Errnos::when(!mapping.protection.allows(wanted), Errno::EPERM);
        }
        let mut too_many = false;
        if let Some(pages) = unlocked.as_mut().filter(|_| mapping.limited) {
            too_many = *pages == 0;
            *pages = pages.saturating_sub(1);
        }
        self.access_errnos(mapping, page, wanted) | Errnos::when(too_many, Errno::ENOMEM)
    }

    /// How many pages more the user may lock, if there is a limit.
    pub(super) fn unlocked(&self) -> Option<u64> {
        // What an IOMMU maps is locked already.
        let limit = self.lock_limit.filter(|_| !self.has_iommu());
        limit.map(|limit| limit.saturating_sub(self.locked_pages()))
    }

    /// Whether any device has pinned `page`.
    pub fn is_pinned(&self, page: u64) -> bool {
        self.devices.values().any(|device| device.has(page))
    }

    fn unpin(&mut self, id: DeviceId, range: Range<u64>) -> Result<(), Errnos> {
        self.check_whole_pages(&range)?;
        self.check_pinned(id, range.clone())?;
        for page in pages(range, self.page_size) {
            self.device(id).unpin(page);
        }
        Ok(())
    }

    /// `vfio_dma_rw()` in chunks, up to the first that fails. Within a chunk, mapping by mapping, up
    /// to where there is no memory.
    fn dma(&mut self, id: DeviceId, range: Range<u64>, wanted: Protection) -> Done {
        let start = range.start;
        let dma_chunk = self.device(id).limits.dma_chunk;
        for chunk in cut(range.clone(), dma_chunk) {
            let count = chunk.start - start;
            let mut next = chunk.start;
            while next < chunk.end {
                let Some(mapping) = self.mapping_at(next) else {
                    return (Err(Errno::EINVAL.into()), count, next - start);
                };
                if let Err(errnos) = self.access_errnos(mapping, next, wanted).check() {
                    return (Err(errnos), count, next - start);
                }
                let end = mapping.end();
                let accessible = mapping.accessible_until(next, self.page_size);
                let end = end.min(chunk.end);
                let done = end.min(accessible);
                if wanted.write {
                    self.mark(next..done);
                }
                if done < end {
                    return (Err(Errno::EFAULT.into()), count, done - start);
                }
                next = end;
            }
        }
        let length = range.end - start;
        (Ok(()), length, length)
    }

    /// Makes the pages that `range` touches dirty. It lies in one mapping.
    pub(super) fn mark(&mut self, range: Range<u64>) {
        let page_size = self.page_size;
        if let Some((&iova, mapped)) = self.mappings.range_mut(..=range.start).next_back() {
            if let Some(dirty) = &mut mapped.dirty {
                let first = (range.start - iova) / page_size;
                dirty.set(first..(range.end - iova).div_ceil(page_size));
            }
        }
    }

    /// The mapping that `iova` lies in.
    fn mapping_at(&self, iova: u64) -> Option<&Mapped> {
        self.overlapping(iova, iova).next()
    }

    /// What is wrong with an access to the byte at `iova` of a mapping.
    fn access_errnos(&self, mapping: &Mapped, iova: u64, wanted: Protection) -> Errnos {
        let accessible = mapping.accessible_until(iova, self.page_size) > iova;
        Errnos::when(!mapping.protection.allows(wanted), Errno::EPERM)
            | Errnos::when(!accessible, Errno::EFAULT)
    }

    fn check_whole_pages(&self, range: &Range<u64>) -> Result<(), Errnos> {
        let whole = (range.start | range.end) % self.page_size == 0;
        Errnos::when(!whole, Errno::EINVAL).check()
    }

    fn check_pinned(&self, id: DeviceId, range: Range<u64>) -> Result<(), Errnos> {
        let pinned = self.devices[&id].all_pinned(pages(range, self.page_size));
        Errnos::when(!pinned, Errno::ENXIO).check()
    }
}
