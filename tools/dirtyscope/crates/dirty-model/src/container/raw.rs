// SPDX-License-Identifier: GPL-2.0-only

//! Raw pins: one `vfio_pin_pages()` with what software gives, whatever it is.
//!
//! Its contract, in `drivers/vfio/vfio_main.c` and what its callers rely on: the sub-page offset is
//! ignored, and `npage` counts from the page that contains the IOVA. Pages are pinned that are mapped
//! with the protection, all of them or none.

use super::{Container, DeviceId, commands::Done};
use crate::{Command, CommandKind, Errno, Errnos, Protection, RawPin, device::Limits};

/// `IOMMU_READ`
const READ: u64 = 1;

/// `IOMMU_WRITE`
const WRITE: u64 = 2;

impl Container {
    /// Runs a command if it is one of raw pins.
    pub(super) fn raw_command(
        &mut self,
        id: DeviceId,
        kind: CommandKind,
        command: &Command,
    ) -> Option<Result<Done, Errnos>> {
        let &Command { iova, length, .. } = command;
        let pin = |protection| RawPin { iova, length, protection };
        let done = match kind {
            CommandKind::RawPin(protection) => self.raw_pin(id, pin(protection)),
            CommandKind::RawUnpin(protection) => self.raw_unpin(id, pin(protection)),
            CommandKind::RawWrite => self.raw_access(id, pin(WRITE)),
            CommandKind::RawRead => self.raw_access(id, pin(READ)),
            _ => return None,
        };
        Some(done)
    }

    fn raw_pin(&mut self, id: DeviceId, pin: RawPin) -> Result<Done, Errnos> {
        self.check_raw(id, &pin)?;
        let page_size = self.page_size;
        let device = self.device(id);
        if pin.length / page_size > device.limits.max_pins.saturating_sub(device.held()) {
            return Err(Errno::ENOSPC.into());
        }
        self.raw_pin_errnos(id, &pin).check()?;
        self.device(id).raw_pin(pin);
        self.promote(self.devices[&id].group);
        for page in pin.pages(page_size) {
            self.mark(page..page.saturating_add(page_size));
        }
        Ok((Ok(()), pin.length, 0))
    }

    /// What is wrong with the pages of a raw pin, and what `vfio_pin_pages()` refuses by itself.
    fn raw_pin_errnos(&self, id: DeviceId, pin: &RawPin) -> Errnos {
        let Limits { raw_pages, .. } = self.devices[&id].limits;
        let count = pin.length / self.page_size;
        let first = pin.iova - pin.iova % self.page_size;
        let too_many = Errnos::when(raw_pages.is_some_and(|max| count > max), Errno::E2BIG);
        let Some(more) = pin.length.checked_sub(1) else { return Errno::EINVAL.into() };
        if first.checked_add(more).is_none() {
            return too_many | Errno::EOVERFLOW;
        }
        let mut errnos =
            too_many | Errnos::when(pin.protection & !(READ | WRITE) != 0, Errno::EPERM);
        let wanted = wanted(pin);
        let mut unlocked = self.unlocked();
        for page in pin.pages(self.page_size) {
            errnos = errnos | self.pin_errnos(page, wanted, &mut unlocked);
        }
        errnos
    }

    /// The pages of a raw pin that could be pinned before one that can't be: they were pinned for a
    /// moment. None if all of it can be pinned, or if it isn't tried.
    pub fn raw_pinned_before_failure(&self, id: DeviceId, pin: &RawPin) -> Vec<u64> {
        let count = pin.length / self.page_size;
        let device = &self.devices[&id];
        let refused = device.limits.raw_pages.is_none_or(|max| count > max)
            || count > device.limits.max_pins.saturating_sub(device.held());
        let (first, mut before) = (pin.iova - pin.iova % self.page_size, Vec::new());
        let last = pin.length.checked_sub(1).and_then(|more| first.checked_add(more));
        if refused || pin.length % self.page_size != 0 || last.is_none() {
            return before;
        }
        if pin.protection & !(READ | WRITE) != 0 {
            return before;
        }
        let wanted = wanted(pin);
        let mut unlocked = self.unlocked();
        for page in pin.pages(self.page_size) {
            if self.pin_errnos(page, wanted, &mut unlocked).check().is_err() {
                return before;
            }
            before.push(page);
        }
        Vec::new()
    }

    fn raw_unpin(&mut self, id: DeviceId, pin: RawPin) -> Result<Done, Errnos> {
        self.check_raw(id, &pin)?;
        self.device(id).raw_unpin(pin)?;
        Ok((Ok(()), pin.length, 0))
    }

    /// An access through the pages of a raw pin with at least this protection.
    fn raw_access(&mut self, id: DeviceId, pin: RawPin) -> Result<Done, Errnos> {
        self.check_raw(id, &pin)?;
        let offset = pin.iova % self.page_size;
        (pin.iova - offset).checked_add(pin.length).ok_or(Errno::EOVERFLOW)?;
        let same = |one: &&RawPin| (one.iova, one.length) == (pin.iova, pin.length);
        let mut pins = self.raw_pins(id).iter().filter(same).peekable();
        pins.peek().ok_or(Errno::ENXIO)?;
        if !pins.any(|one| one.protection & pin.protection != 0) {
            return Err(Errno::EACCES.into());
        }
        let bytes = pin.length - offset;
        Ok((Ok(()), bytes, bytes))
    }

    /// What the device refuses.
    fn check_raw(&mut self, id: DeviceId, pin: &RawPin) -> Result<(), Errno> {
        let page_size = self.page_size;
        let Limits { raw_pages, max_length, .. } = self.device(id).limits;
        raw_pages.ok_or(Errno::EOPNOTSUPP)?;
        if pin.length % page_size != 0 || u32::try_from(pin.protection).is_err() {
            return Err(Errno::EINVAL);
        }
        if pin.length > max_length {
            return Err(Errno::E2BIG);
        }
        Ok(())
    }
}

/// What a raw pin needs of a mapping.
fn wanted(pin: &RawPin) -> Protection {
    Protection { read: pin.protection & READ != 0, write: pin.protection & WRITE != 0 }
}
