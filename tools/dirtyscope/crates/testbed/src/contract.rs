// SPDX-License-Identifier: GPL-2.0-only

use crate::{
    Answer, Op, PAGE, operation,
    slots::{self, SlotKind, kind},
};
use dirty_model::{
    Command, CommandKind, Container as Model, DeviceId, Errno, Errnos, GroupKind, Limits, Mapping,
    Protection, RawPin,
};
use mdev_dma::{Opcode, uapi};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{Range, RangeInclusive},
};
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

/// What the IOMMU can map of the machine that tools/vm boots: 48 bits, less the range of MSIs.
pub(crate) fn iova_ranges() -> Vec<RangeInclusive<u64>> {
    vec![0..=0xfedf_ffff, 0xfef0_0000..=(1 << 48) - 1]
}

/// `VFIO_PIN_PAGES_MAX_ENTRIES`: pages of one raw pin.
pub const RAW_PAGES: u64 = PAGE / size_of::<u64>() as u64;

/// What the kernel owes: the model, and which of its devices is in which slot. It knows nothing of
/// what is in memory.
#[derive(Clone, Debug)]
pub struct Contract {
    pub model: Model,
    limits: Limits,
    /// What IOMMUs can map.
    pub(crate) iova_ranges: Vec<RangeInclusive<u64>>,
    devices: BTreeMap<usize, DeviceId>,
    /// The slots whose groups have joined, and those whose devices came with them.
    joined: BTreeSet<usize>,
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
        Self {
            model: Model::new(PAGE, dma_entry_limit),
            limits,
            iova_ranges: iova_ranges(),
            devices: BTreeMap::new(),
            joined: BTreeSet::new(),
        }
    }

    /// The device that has just been opened in a slot, and all that follow, have these limits.
    pub(crate) fn set_limits(&mut self, slot: usize, limits: Limits) {
        self.limits = limits;
        self.model.close(self.devices[&slot]);
        self.devices.insert(slot, self.model.open(slots::group(slot), limits));
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

    /// Whether `op` is about a device that is in the state for it: of a group that has joined or not,
    /// open or not; and DMA is of memory that is mapped. Without a group, only one may join.
    pub fn allows(&self, op: &Op) -> bool {
        let open_as = |device, kinds: &[SlotKind]| {
            self.device(device).is_some() && kind(device).is_some_and(|kind| kinds.contains(&kind))
        };
        match *op {
            Op::Join { device } => {
                kind(device).is_some() && !self.model.has_group(slots::group(device))
            }
            Op::Leave { device, .. } => {
                let group = slots::group(device);
                self.joined.contains(&device)
                    && !self.devices.keys().any(|&open| slots::group(open) == group)
            }
            Op::Open { device } => self.joined.contains(&device) && self.device(device).is_none(),
            Op::Close { device } => self.device(device).is_some(),
            // One with an IOMMU has neither these nor the background.
            Op::Command { device, op, .. } if kind(device) == Some(SlotKind::Pinning) => {
                let ours = [Opcode::Pin, Opcode::Unpin, Opcode::Write, Opcode::Read];
                open_as(device, &[SlotKind::Pinning]) && ours.iter().any(|&own| own as u32 == op)
            }
            Op::Reset { device } | Op::Command { device, .. } => {
                open_as(device, &[SlotKind::Emulated, SlotKind::Pinning])
            }
            Op::Copy { device, from, to, length } => {
                let (Some(source), Some(target)) =
                    (from.checked_add(length), to.checked_add(length))
                else {
                    return false;
                };
                open_as(device, &[SlotKind::Edu])
                    && length <= edu_client::LENGTH_MAX
                    && self.model.allows_dma(from..source, Protection::READ)
                    && self.model.allows_dma(to..target, Protection::WRITE)
            }
            _ => self.model.groups().len() > 0,
        }
    }

    /// The last byte that an IOMMU can map.
    pub fn aperture_end(&self) -> u64 {
        self.iova_ranges.last().map_or(0, |range| *range.end())
    }

    /// The slots whose groups are in the container.
    pub fn joined(&self) -> impl Iterator<Item = usize> {
        self.joined.iter().copied()
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
                Answer::with_bitmap(unmapped)
            }
            Op::Start => Answer::of(self.model.start()),
            Op::Stop => {
                self.model.stop();
                Answer::of(Ok(()))
            }
            Op::DirtyPages { .. } => Answer::of(Err(Errno::EINVAL.into())),
            Op::GetBitmap { iova, size, buffer } => {
                let bitmap = self.model.get_bitmap(iova, size, &buffer.to_model());
                Answer::with_bitmap(bitmap.map(|bitmap| (0, bitmap)))
            }
            Op::Join { device } => Answer::of(self.join(device)),
            Op::Leave { device, .. } => {
                let group = slots::group(device);
                self.model.leave(group);
                self.joined.retain(|&slot| slots::group(slot) != group);
                Answer::of(Ok(()))
            }
            Op::Open { device } => {
                self.devices.insert(device, self.model.open(slots::group(device), self.limits));
                Answer::of(Ok(()))
            }
            Op::Copy { to, length, .. } => {
                self.model.dma_written(to..to + length);
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
            Op::Limit { pages } => {
                self.model.limit_locked_pages(pages);
                Answer::of(Ok(()))
            }
            Op::UserWrite { .. } | Op::Check | Op::Command { .. } => Answer::of(Ok(())),
        }
    }

    fn join(&mut self, slot: usize) -> Result<(), Errnos> {
        let group = match kind(slot) {
            Some(SlotKind::Emulated) => GroupKind::Emulated,
            _ => {
                let shared = slots::members(slot).len() > 1;
                GroupKind::Iommu { ranges: self.iova_ranges.clone(), shared }
            }
        };
        self.model.join(slots::group(slot), group)?;
        self.joined.extend(slots::members(slot));
        Ok(())
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
            VFIO_DMA_MAP_FLAG_VADDR => self.model.update_vaddr(&mapping),
            _ => Err(self.model.map_with_unknown_flag(&mapping)),
        }
    }

    fn unmap(&mut self, iova: u64, size: u64, flags: u32) -> Answer<Errnos> {
        let unmapped = match flags {
            0 => self.model.unmap(iova, size),
            VFIO_DMA_UNMAP_FLAG_ALL => self.model.unmap_all(iova, size),
            _ if flags & !(VFIO_DMA_UNMAP_FLAG_ALL | VFIO_DMA_UNMAP_FLAG_VADDR) == 0 => {
                let all = flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
                self.model.invalidate_vaddr(iova, size, all)
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
