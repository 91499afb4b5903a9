// SPDX-License-Identifier: GPL-2.0-only

//! Raw pins: one `vfio_pin_pages()` with what software gives, whatever it is.
//!
//! Its contract, in `drivers/vfio/vfio_main.c` and what its callers rely on: the sub-page offset is
//! ignored, and `npage` counts from the page that contains the IOVA. Pages are pinned that are mapped
//! with the protection, all of them or none.

use super::{Container, DeviceId, commands::Done, last_of};
use crate::{Command, CommandKind, Errno, Errnos, Protection, RawPin, device::Limits};

/// `IOMMU_READ`
const READ: u64 = 1;

/// `IOMMU_WRITE`
const WRITE: u64 = 2;

/// All that there is.
const ANY: u64 = READ | WRITE;

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
        self.raw_refusal(id, &pin)?;
        self.raw_pin_errnos(id, &pin).check()?;
        self.device(id).raw_pin(pin);
        self.promote(self.devices[&id].group);
        let page_size = self.page_size;
        for page in pin.pages(page_size) {
            self.mark(page..page.saturating_add(page_size));
        }
        Ok((Ok(()), pin.length, 0))
    }

    /// What is wrong with the pages of a raw pin, and what `vfio_pin_pages()` refuses by itself.
    fn raw_pin_errnos(&self, id: DeviceId, pin: &RawPin) -> Errnos {
        let mut errnos = self.raw_call_errnos(id, pin);
        if self.raw_last(pin).is_err() {
            return errnos;
        }
        let (wanted, mut unlocked) = (wanted(pin), self.unlocked());
        for page in pin.pages(self.page_size) {
            errnos = errnos | self.pin_errnos(page, wanted, &mut unlocked);
        }
        errnos
    }

    /// What `vfio_pin_pages()` refuses before it looks at a page.
    fn raw_call_errnos(&self, id: DeviceId, pin: &RawPin) -> Errnos {
        let Limits { raw_pages, .. } = self.devices[&id].limits;
        let count = pin.length / self.page_size;
        let too_many = Errnos::when(raw_pages.is_some_and(|max| count > max), Errno::E2BIG);
        match self.raw_last(pin) {
            Ok(_) => too_many | Errnos::when(pin.protection & !ANY != 0, Errno::EPERM),
            Err(errno) => too_many | errno,
        }
    }

    /// The last byte of its pages, if it has any and they don't wrap.
    fn raw_last(&self, pin: &RawPin) -> Result<u64, Errno> {
        last_of(pin.iova - pin.iova % self.page_size, pin.length)
    }

    /// The pages of a raw pin that could be pinned before one that can't be: they were pinned for a
    /// moment. None if all of it can be pinned, or if it isn't tried.
    pub fn raw_pinned_before_failure(&self, id: DeviceId, pin: &RawPin) -> Vec<u64> {
        if self.raw_refusal(id, pin).is_err() || self.raw_call_errnos(id, pin) != Errnos::NONE {
            return Vec::new();
        }
        let (wanted, mut unlocked) = (wanted(pin), self.unlocked());
        let mut before = Vec::new();
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

    /// What the device refuses when it is to pin.
    fn raw_refusal(&self, id: DeviceId, pin: &RawPin) -> Result<(), Errno> {
        self.check_raw(id, pin)?;
        let device = &self.devices[&id];
        let room = device.limits.max_pins.saturating_sub(device.held());
        if pin.length / self.page_size > room {
            return Err(Errno::ENOSPC);
        }
        Ok(())
    }

    /// What the device refuses.
    fn check_raw(&self, id: DeviceId, pin: &RawPin) -> Result<(), Errno> {
        let page_size = self.page_size;
        let Limits { raw_pages, max_length, .. } = self.devices[&id].limits;
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
