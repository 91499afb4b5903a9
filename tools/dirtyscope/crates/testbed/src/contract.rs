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
        self.model.has_pins_in(iova..iova.saturating_add(size))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program;

    fn contract(raw_pages: Option<u64>) -> Contract {
        program::contract(10, Limits { raw_pages, ..limits_of(64, 1 << 20) })
    }

    /// Does operations, a line each, and compares what is owed with what stands behind an arrow.
    fn owes(contract: &mut Contract, story: &str) {
        for line in story.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (op, owed) = line.split_once(" -> ").unwrap();
            let op = op.parse().unwrap();
            assert!(contract.allows(&op), "{line}");
            assert_eq!(contract.apply(&op).answer.to_string(), owed, "{line}");
        }
    }

    #[test]
    fn every_operation_does_what_it_says() {
        owes(
            &mut contract(None),
            "
            MAP 0x1000+0x4000 rw -> ok
            MAP 0x8000+0x2000 r- -> ok
            MAP 0xa000+0x2000 -w memory 0x1000 -> ok
            MAP 0x1000+0x1000 rw -> EEXIST
            MAP 0x20000+0x1000 -- -> EINVAL
            MAP 0x20000+0x1000 rw flags 0x80000000 -> EINVAL
            MAP 0x1000+0x4000 -- flags 0x4 -> EINVAL
            GET_BITMAP 0x1000+0x4000 -> EINVAL
            DIRTY_PAGES flags 0x3 -> EINVAL
            START -> ok
            device 0 PIN 0x1000+0x1000 -> ok 0x1000 bytes
            device 0 READ 0x1800+0x800 -> ok 0x800 bytes
            device 0 WRITE 0x2000+0x1 -> ENXIO
            device 0 background DMA_WRITE 0x4fff+0x2 -> EINVAL
            device 0 DMA_WRITE 0x3fff+0x2 seed 0x1 -> ok 0x2 bytes
            device 0 DMA_WRITE 0x8000+0x1 -> EPERM
            device 0 DMA_READ 0x8000+0x1 -> ok 0x1 bytes
            device 0 DMA_READ 0xa000+0x1 -> EPERM
            device 0 77 0x1000+0x1000 -> EOPNOTSUPP
            device 0 RAW_PIN 0x1000+0x1000 prot 0x3 -> EOPNOTSUPP
            GET_BITMAP 0x1000+0x4000 -> ok 3 dirty
            GET_BITMAP 0x1000+0x4000 ends 0x0 -> EFAULT
            GET_BITMAP 0x1000+0x4000 read-only -> EFAULT
            GET_BITMAP 0x1000+0x4000 -> ok 1 dirty
            process HIDE 0x2000+0x1000 -> ok
            device 0 DMA_READ 0x2000+0x1 -> EFAULT
            process SHOW 0x2000+0x1000 -> ok
            device 0 DMA_READ 0x2000+0x1 -> ok 0x1 bytes
            process WRITE 0x2000+0x8 seed 0x1 -> ok
            process LIMIT 1 -> ok
            MAP 0x30000+0x1000 rw -> ok
            device 0 PIN 0x30000+0x1000 -> ENOMEM
            process LIMIT none -> ok
            device 0 PIN 0x30000+0x1000 -> ok 0x1000 bytes
            device 0 RESET -> ok
            device 0 UNPIN 0x30000+0x1000 -> ENXIO
            UNMAP 0x30000+0x1000 flags 0x80000000 -> EINVAL
            UNMAP 0x0+0x0 flags 0x4 -> EBUSY or EINVAL
            UNMAP 0x1000+0x4000 flags 0x4 -> EBUSY
            UNMAP 0x0+0x0 flags 0x6 -> EBUSY
            UNMAP_BITMAP 0x30000+0x1000 -> ok 0x1000 bytes 1 dirty
            UNMAP 0x8000+0x4000 -> ok 0x4000 bytes
            STOP -> ok
            GET_BITMAP 0x1000+0x4000 -> EINVAL
            UNMAP 0x1000+0x1000 flags 0x2 -> EINVAL
            UNMAP 0x0+0x0 flags 0x2 -> ok 0x4000 bytes
            CHECK -> ok
            ",
        );
    }

    #[test]
    fn raw_pins_have_a_protection_where_others_have_a_seed() {
        let mut contract = contract(Some(8));
        assert!(contract.has_raw_pins() && contract.raw_pins(0).is_empty());
        owes(
            &mut contract,
            "
            MAP 0x1000+0x4000 rw -> ok
            device 0 RAW_PIN 0x1800+0x2000 prot 0x1 -> ok 0x2000 bytes
            device 0 RAW_READ 0x1800+0x2000 -> ok 0x1800 bytes
            device 0 RAW_WRITE 0x1800+0x2000 seed 0x1 -> EACCES
            device 0 RAW_PIN 0x3000+0x1000 prot 0x2 -> ok 0x1000 bytes
            device 0 RAW_WRITE 0x3000+0x1000 seed 0x1 -> ok 0x1000 bytes
            device 0 RAW_READ 0x3000+0x1000 -> EACCES
            device 0 RAW_UNPIN 0x1800+0x2000 prot 0x3 -> ENXIO
            ",
        );
        let pin = RawPin { iova: 0x1800, length: 0x2000, protection: 1 };
        assert_eq!(contract.raw_pins(0)[0], pin);
        assert!(contract.raw_pins(1).is_empty());
        let pins = |contract: &Contract, iova| contract.has_pins_in(iova, PAGE);
        assert_eq!(
            [0, 1, 2, 3, 4].map(|page| pins(&contract, page * PAGE)),
            [false, true, true, true, false]
        );
        owes(&mut contract, "device 0 RAW_UNPIN 0x1800+0x2000 prot 0x1 -> ok 0x2000 bytes");
        assert_eq!(contract.raw_pins(0).len(), 1);
    }

    #[test]
    fn what_is_transferred_begins_at_the_iova() {
        let mut contract = contract(None);
        owes(&mut contract, "MAP 0x1000+0x4000 rw -> ok");
        let mut transferred = |op: &str| contract.apply(&op.parse().unwrap()).transferred;
        assert_eq!(transferred("device 0 DMA_WRITE 0x1800+0x800"), 0x1800..0x2000);
        assert!(transferred("device 0 DMA_WRITE 0x9000+0x800").is_empty());
        assert!(transferred("CHECK").is_empty());
    }

    #[test]
    fn devices_are_used_in_order() {
        let mut contract = contract(None);
        let allows = |contract: &Contract, yes: &[&str], no: &[&str]| {
            for (ops, allowed) in [(yes, true), (no, false)] {
                for op in ops {
                    assert_eq!(contract.allows(&op.parse().unwrap()), allowed, "{op}");
                }
            }
        };
        assert_eq!(contract.joined().collect::<Vec<_>>(), [0, 1]);
        allows(
            &contract,
            &[
                "device 0 CLOSE",
                "device 0 RESET",
                "device 0 PIN 0x0+0x1000",
                "device 1 OPEN",
                "device 1 LEAVE",
                "device 2 JOIN",
                "START",
            ],
            &[
                "device 0 JOIN",
                "device 0 OPEN",
                "device 0 LEAVE",
                "device 1 CLOSE",
                "device 1 RESET",
                "device 1 PIN 0x0+0x1000",
                "device 2 OPEN",
                "device 2 LEAVE",
                "device 9 JOIN",
            ],
        );
        owes(
            &mut contract,
            "
            MAP 0x0+0x2000 rw -> ok
            MAP 0x4000+0x2000 r- -> ok
            device 2 JOIN -> ok
            device 2 OPEN -> ok
            device 7 JOIN -> ok
            device 7 OPEN -> ok
            ",
        );
        assert!(contract.model.has_iommu() && contract.model.all_dirty());
        allows(
            &contract,
            &[
                "device 2 COPY 0x0+0x1000 to 0x1000",
                "device 2 COPY 0x4000+0x8 to 0x1ff8",
                "device 7 PIN 0x0+0x1000",
                "device 7 UNPIN 0x0+0x1000",
                "device 7 RESET",
            ],
            &[
                "device 2 COPY 0x0+0x1001 to 0x0",
                "device 2 COPY 0x0+0x8 to 0x1ffc",
                "device 2 COPY 0x1ffc+0x8 to 0x0",
                "device 2 COPY 0x0+0x8 to 0x4000",
                "device 2 COPY 0xffffffffffffffff+0x8 to 0x0",
                "device 2 COPY 0x0+0x8 to 0xffffffffffffffff",
                "device 7 COPY 0x0+0x8 to 0x1000",
                "device 2 PIN 0x0+0x1000",
                "device 2 RESET",
                "device 7 DMA_READ 0x0+0x1000",
                "device 7 background PIN 0x0+0x1000",
                "device 3 JOIN",
                "device 2 LEAVE",
            ],
        );
        owes(
            &mut contract,
            "
            device 7 PIN 0x0+0x1000 -> ok 0x1000 bytes
            START -> ok
            device 2 CLOSE -> ok
            device 2 LEAVE -> ok
            GET_BITMAP 0x0+0x6000 -> ok 4 dirty
            GET_BITMAP 0x0+0x6000 -> ok 1 dirty
            device 4 JOIN -> ok
            device 5 OPEN -> ok
            device 5 COPY 0x0+0x8 to 0x1000 -> ok
            ",
        );
        allows(
            &contract,
            &["device 4 OPEN"],
            &["device 4 LEAVE", "device 5 JOIN", "device 8 JOIN"],
        );
        owes(
            &mut contract,
            "
            device 5 CLOSE -> ok
            device 4 LEAVE -> ok
            ",
        );
        allows(&contract, &["device 8 JOIN"], &["device 5 OPEN"]);
        owes(
            &mut contract,
            "
            device 0 CLOSE -> ok
            device 0 LEAVE -> ok
            device 1 LEAVE -> ok
            device 7 CLOSE -> ok
            device 7 LEAVE -> ok
            ",
        );
        allows(
            &contract,
            &["device 0 JOIN", "device 3 JOIN"],
            &["START", "MAP 0x0+0x1000 rw", "CHECK"],
        );
        assert_eq!(contract.joined().count(), 0);
    }

    #[test]
    fn ranges_to_read() {
        let mut contract = contract(None);
        assert_eq!((contract.span(), contract.reads()), (None, vec![]));
        owes(&mut contract, "MAP 0x3000+0x1000 rw -> ok");
        assert_eq!(contract.span(), Some((0x3000, 0x1000)));
        owes(&mut contract, "MAP 0x8000+0x2000 rw -> ok");
        let each = [(0x3000, 0x1000), (0x8000, 0x2000)];
        assert_eq!((contract.span(), contract.each()), (Some((0x3000, 0x7000)), each.to_vec()));
        assert_eq!(contract.reads(), [(0x3000, 0x7000)]);
        owes(&mut contract, "MAP 0x100002000+0x1000 rw -> ok");
        assert_eq!(contract.reads(), [(0x3000, SPAN_MAX)]);
        owes(&mut contract, "MAP 0x100003000+0x1000 rw -> ok");
        assert_eq!(contract.reads().len(), 4);
        assert_eq!(contract.aperture_end(), (1 << 48) - 1);
    }

    #[test]
    fn limits_are_those_of_the_device() {
        let mut contract = contract(None);
        owes(
            &mut contract,
            "
            MAP 0x0+0x4000 rw -> ok
            device 0 PIN 0x0+0x3000 -> ok 0x3000 bytes
            ",
        );
        contract.set_limits(0, limits_of(1, 0x2000));
        assert!(!contract.has_pins_in(0, 0x4000));
        owes(
            &mut contract,
            "
            device 0 PIN 0x0+0x2000 -> ENOSPC
            device 0 DMA_READ 0x0+0x3000 -> E2BIG
            device 1 OPEN -> ok
            device 1 PIN 0x0+0x2000 -> ENOSPC
            ",
        );
    }
}
