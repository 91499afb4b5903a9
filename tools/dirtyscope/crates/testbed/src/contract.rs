// SPDX-License-Identifier: GPL-2.0-only

use crate::{Answer, Op, PAGE, operation};
use dirty_model::{
    Bitmap, Command, CommandKind, Container as Model, DeviceId, Errno, Errnos, Limits, Mapping,
    Protection, RawPin,
};
use mdev_dma::{Opcode, uapi};
use std::{collections::BTreeMap, ops::Range};
use vfio_client::uapi::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_VADDR,
};

/// The largest span of IOVA that is read as one range, in bytes.
pub(crate) const SPAN_MAX: u64 = 1 << 32;

/// Limits of a device, of which it has told two.
pub fn limits_of(max_pins: u64, max_length: u64) -> Limits {
    Limits {
        max_pins,
        page_pins: uapi::RUST_MDEV_DMA_PAGE_PINS,
        max_length,
        pin_batch: u64::from(uapi::RUST_MDEV_DMA_PIN_BATCH) * PAGE,
        dma_chunk: u64::from(uapi::RUST_MDEV_DMA_DMA_CHUNK),
        raw_pages: None,
    }
}

/// `VFIO_PIN_PAGES_MAX_ENTRIES`: pages of one raw pin.
pub const RAW_PAGES: u64 = PAGE / size_of::<u64>() as u64;

/// What the kernel owes: the model, and which of its devices is in which slot. It knows nothing of
/// what is in memory.
#[derive(Clone, Debug)]
pub struct Contract {
    pub model: Model,
    limits: Limits,
    devices: BTreeMap<usize, DeviceId>,
}

/// What must come of an operation.
pub struct Owed {
    /// The answer, without the digest of what was read.
    pub answer: Answer<Errnos>,
    /// What a command transferred, in bytes of IOVA.
    pub transferred: Range<u64>,
}

impl Contract {
    /// Of a container without mappings and devices, for which all devices have `limits`.
    pub fn new(dma_entry_limit: u32, limits: Limits) -> Self {
        Self { model: Model::new(PAGE, dma_entry_limit), limits, devices: BTreeMap::new() }
    }

    /// The device that is open in a slot.
    pub fn device(&self, slot: usize) -> Option<DeviceId> {
        self.devices.get(&slot).copied()
    }

    /// The range that has all mappings: IOVA and size.
    pub(crate) fn span(&self) -> Option<(u64, u64)> {
        let mut mappings = self.model.mappings();
        let first = mappings.next()?;
        let last = mappings.next_back().unwrap_or(first);
        Some((first.iova, (last.iova - first.iova).saturating_add(last.size)))
    }

    /// The ranges of the mappings.
    pub(crate) fn each(&self) -> Vec<(u64, u64)> {
        self.model.mappings().map(|mapping| (mapping.iova, mapping.size)).collect()
    }

    /// Ranges to read for all that is dirty: one if the mappings are near enough to one another, else
    /// each by itself.
    pub(crate) fn reads(&self) -> Vec<(u64, u64)> {
        match self.span() {
            Some(span) if span.1 <= SPAN_MAX => vec![span],
            _ => self.each(),
        }
    }

    /// Whether devices have raw pins.
    pub fn has_raw_pins(&self) -> bool {
        self.limits.raw_pages.is_some()
    }

    /// The raw pins of the device in a slot.
    pub fn raw_pins(&self, slot: usize) -> &[RawPin] {
        self.device(slot).map_or(&[], |id| self.model.raw_pins(id))
    }

    /// Whether any page of `size` bytes from `iova` on is pinned.
    pub fn has_pins_in(&self, iova: u64, size: u64) -> bool {
        let pages = self.devices.values().flat_map(|&id| self.model.all_pinned(id));
        pages.into_iter().any(|page| page.checked_sub(iova).is_some_and(|at| at < size))
    }

    /// Whether `op` is about a device that is in the state for it: open, or closed to be opened.
    pub fn allows(&self, op: &Op) -> bool {
        match *op {
            Op::Open { device } => self.device(device).is_none(),
            Op::Close { device } | Op::Reset { device } | Op::Command { device, .. } => {
                self.device(device).is_some()
            }
            _ => true,
        }
    }

    /// What must come of `op`. Panics if it isn't allowed.
    pub fn apply(&mut self, op: &Op) -> Owed {
        if let Op::Command { device, op, iova, length, seed } = *op {
            let kind = operation(op).map(|opcode| to_kind(opcode, seed));
            return self.command(device, Command { kind, iova, length });
        }
        Owed { answer: self.call(op), transferred: 0..0 }
    }

    fn call(&mut self, op: &Op) -> Answer<Errnos> {
        match *op {
            Op::Map { iova, size, backed, flags } => {
                Answer::of(self.map(iova, size, backed, flags))
            }
            Op::Unmap { iova, size, flags } => self.unmap(iova, size, flags),
            Op::UnmapBitmap { iova, size, buffer } => {
                let unmapped = self.model.unmap_dirty(iova, size, &buffer.to_model());
                with_bitmap(unmapped)
            }
            Op::Start => Answer::of(self.model.start()),
            Op::Stop => {
                self.model.stop();
                Answer::of(Ok(()))
            }
            Op::DirtyPages { .. } => Answer::of(Err(Errno::EINVAL.into())),
            Op::GetBitmap { iova, size, buffer } => {
                let bitmap = self.model.get_bitmap(iova, size, &buffer.to_model());
                with_bitmap(bitmap.map(|bitmap| (0, bitmap)))
            }
            Op::Open { device } => {
                self.devices.insert(device, self.model.open(self.limits));
                Answer::of(Ok(()))
            }
            Op::Close { device } => {
                if let Some(id) = self.devices.remove(&device) {
                    self.model.close(id);
                }
                Answer::of(Ok(()))
            }
            Op::Reset { device } => {
                self.model.reset(self.devices[&device]);
                Answer::of(Ok(()))
            }
            Op::Hide { iova, size } | Op::Show { iova, size } => {
                let hidden = matches!(op, Op::Hide { .. });
                self.model.set_hidden(iova..iova.saturating_add(size), hidden);
                Answer::of(Ok(()))
            }
            Op::UserWrite { .. } | Op::Check | Op::Command { .. } => Answer::of(Ok(())),
        }
    }

    fn map(&mut self, iova: u64, size: u64, backed: u64, flags: u32) -> Result<(), Errnos> {
        let protection = Protection {
            read: flags & VFIO_DMA_MAP_FLAG_READ != 0,
            write: flags & VFIO_DMA_MAP_FLAG_WRITE != 0,
        };
        // Where the memory is doesn't matter, as long as it is at a page.
        let mapping = Mapping { iova, vaddr: PAGE, size, protection };
        match flags & !(VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE) {
            0 => self.model.map_backed(&mapping, backed),
            VFIO_DMA_MAP_FLAG_VADDR => Err(self.model.update_vaddr(&mapping)),
            _ => Err(self.model.map_with_unknown_flag(&mapping)),
        }
    }

    fn unmap(&mut self, iova: u64, size: u64, flags: u32) -> Answer<Errnos> {
        let unmapped = match flags {
            0 => self.model.unmap(iova, size),
            VFIO_DMA_UNMAP_FLAG_ALL => self.model.unmap_all(iova, size),
            _ if flags & !(VFIO_DMA_UNMAP_FLAG_ALL | VFIO_DMA_UNMAP_FLAG_VADDR) == 0 => {
                let all = flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
                Err(self.model.invalidate_vaddr(iova, size, all))
            }
            _ => Err(self.model.unmap_with_unknown_flag(iova, size)),
        };
        match unmapped {
            Ok(count) => Answer { count, ..Answer::of(Ok(())) },
            Err(errnos) => Answer::of(Err(errnos)),
        }
    }

    fn command(&mut self, slot: usize, command: Command) -> Owed {
        let outcome = self.model.command(self.devices[&slot], &command);
        let answer = Answer { count: outcome.count, ..Answer::of(outcome.status) };
        let iova = command.iova;
        Owed { answer, transferred: iova..iova.saturating_add(outcome.transferred) }
    }
}

fn with_bitmap(result: Result<(u64, Bitmap), Errnos>) -> Answer<Errnos> {
    match result {
        Ok((count, bitmap)) => Answer { count, bitmap: Some(bitmap), ..Answer::of(Ok(())) },
        Err(errnos) => Answer::of(Err(errnos)),
    }
}

fn to_kind(opcode: Opcode, seed: u64) -> CommandKind {
    match opcode {
        Opcode::Pin => CommandKind::Pin,
        Opcode::Unpin => CommandKind::Unpin,
        Opcode::Write => CommandKind::Write,
        Opcode::Read => CommandKind::Read,
        Opcode::DmaWrite => CommandKind::DmaWrite,
        Opcode::DmaRead => CommandKind::DmaRead,
        Opcode::RawPin => CommandKind::RawPin(seed),
        Opcode::RawUnpin => CommandKind::RawUnpin(seed),
        Opcode::RawWrite => CommandKind::RawWrite,
        Opcode::RawRead => CommandKind::RawRead,
    }
}
