// SPDX-License-Identifier: GPL-2.0-only

//! Random sequences of operations, valid and invalid ones.
//!
//! What comes next is chosen by what the model has by then, so that most operations meet something:
//! mappings, pins, dirty pages. Addresses are few, so that they collide.

use crate::triggers::{Trigger, triggers_any};
use dirty_model::BITMAP_PAGES_MAX;
use mdev_dma::{Opcode, uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND};
use proptest::{
    prelude::*,
    sample::select,
    strategy::{NewTree, ValueTree},
    test_runner::TestRunner,
};
use proptest_state_machine::Sequential;
use std::{
    fmt,
    ops::Range,
    sync::{Arc, atomic::AtomicUsize},
};
use testbed::{
    Buffer, BufferMemory, Contract, Op, PAGE, RAW_PAGES,
    slots::{self, EMULATED, SlotKind},
};
use vfio_client::{
    Leave,
    uapi::{
        VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE,
        VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_VADDR,
    },
};

/// Those that run commands, by slot.
const DEVICES: usize = EMULATED.len();

/// Where most mappings are, in bytes.
const BASE: u64 = 0x4000_0000;

/// Pages from `BASE` on in which mappings begin.
const PAGES: u64 = 200;

/// Where mappings are that are too large to be tracked, or nearly so.
const HUGE: u64 = 1 << 45;

/// Strategies for sequences of operations that begin with a container without mappings, of which
/// `contract` is what is owed, and show none of the defects `avoided`.
///
/// The groups of the devices in `slots` join and leave.
pub fn sequences(
    contract: Contract,
    length: Range<usize>,
    avoided: Vec<&'static Trigger>,
    slots: Vec<usize>,
) -> impl Strategy<Value = (Arc<Contract>, Vec<Op>, Option<Arc<AtomicUsize>>)> {
    let contract = Arc::new(contract);
    let possible = move |contract: &Arc<Contract>, op: &Op| {
        contract.allows(op) && !triggers_any(&avoided, contract, op)
    };
    let next = |mut contract: Arc<Contract>, op: &Op| {
        Arc::make_mut(&mut contract).apply(op);
        contract
    };
    let slots: Arc<[usize]> = slots.into();
    let operation = move |contract: &Arc<Contract>| {
        let (contract, slots) = (contract.clone(), slots.clone());
        Later(move |runner: &mut TestRunner| operation(&contract, &slots, runner))
    };
    Sequential::new(length.into(), move || Just(contract.clone()), possible, operation, next)
}

/// A strategy that isn't made before a value of it is: most of the time that sequences took to
/// generate went into strategies that weren't chosen.
struct Later<F>(F);

impl<F> fmt::Debug for Later<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Later")
    }
}

impl<F: Fn(&mut TestRunner) -> BoxedStrategy<Op>> Strategy for Later<F> {
    type Tree = Box<dyn ValueTree<Value = Op>>;
    type Value = Op;

    fn new_tree(&self, runner: &mut TestRunner) -> NewTree<Self> {
        (self.0)(runner).new_tree(runner)
    }
}

/// The next operation. Which kind it is of is chosen for good: it shrinks to simpler ones of its kind.
fn operation(contract: &Contract, slots: &[usize], runner: &mut TestRunner) -> BoxedStrategy<Op> {
    let mappings = &Mappings::of(contract);
    if contract.model.groups().len() == 0 {
        return group_op(contract, slots, mappings);
    }
    let map = if mappings.0.len() < 6 { 16 } else { 3 };
    let start = start_weight(contract, mappings);
    let raw = |weight| if contract.has_raw_pins() { weight } else { 0 };
    // Addresses may change then, and a third of what is done is about them.
    let vaddr = if contract.joined().any(|slot| EMULATED.contains(&slot)) { 0 } else { 50 };
    let unmap_bitmap = |iova, size, buffer| Op::UnmapBitmap { iova, size, buffer };
    let get_bitmap = |iova, size, buffer| Op::GetBitmap { iova, size, buffer };
    let kinds: [(u32, &dyn Fn() -> BoxedStrategy<Op>); 17] = [
        (map, &|| map_op().boxed()),
        (4, &|| unmap_op(mappings)),
        (4, &|| bitmap_op(mappings, unmap_bitmap)),
        (12, &|| bitmap_op(mappings, get_bitmap)),
        (start, &|| Just(Op::Start).boxed()),
        (1, &|| prop_oneof![4 => Just(Op::Stop), 1 => dirty_pages_op()].boxed()),
        (2, &|| device_op(contract)),
        (3, &|| group_op(contract, slots, mappings)),
        (14, &|| pages_op(mappings, Opcode::Pin)),
        (10, &|| pinned_op(contract, mappings)),
        (16, &|| bytes_op(mappings)),
        (2, &|| invalid_command(mappings)),
        (3, &|| process_op(mappings)),
        (1, &|| Just(Op::Check).boxed()),
        (raw(14), &|| raw_pin_op(mappings)),
        (raw(12), &|| raw_pinned_op(contract, mappings)),
        (vaddr, &|| vaddr_op(contract, mappings)),
    ];
    let any = choose(&kinds, runner)();
    // Some commands are run by a kernel thread.
    (any, 0..8u32)
        .prop_map(|(mut next, eighth)| {
            if let Op::Command { op, device, .. } = &mut next {
                let can = EMULATED.contains(device);
                *op |= if can && eighth == 7 { BACKGROUND } else { 0 };
            }
            next
        })
        .boxed()
}

/// One of these, by their weights, which aren't all 0.
fn choose<'a, T>(all: &'a [(u32, T)], runner: &mut TestRunner) -> &'a T {
    let total: u32 = all.iter().map(|(weight, _)| weight).sum();
    let mut left = runner.rng().random_range(0..total);
    for (weight, one) in all {
        match left.checked_sub(*weight) {
            Some(rest) => left = rest,
            None => return one,
        }
    }
    unreachable!("less than all weights together")
}

/// How likely START is. Without pins it comes soon, for other operations need it; with pins in several
/// mappings it is worth most, for it has to report all of them.
fn start_weight(contract: &Contract, mappings: &Mappings) -> u32 {
    if contract.model.tracking() {
        return 1;
    }
    match mappings.0.iter().filter(|(iova, size)| contract.has_pins_in(*iova, *size)).count() {
        0 => 5,
        1 => 2,
        _ => 20,
    }
}

/// IOVA and size of what is mapped.
#[derive(Clone)]
struct Mappings(Vec<(u64, u64)>);

impl Mappings {
    fn of(contract: &Contract) -> Self {
        Self(contract.model.mappings().map(|mapping| (mapping.iova, mapping.size)).collect())
    }

    /// A mapping, or where one could be.
    fn one(&self) -> BoxedStrategy<(u64, u64)> {
        match self.0.is_empty() {
            true => Just((BASE, 16 * PAGE)).boxed(),
            false => select(self.0.clone()).boxed(),
        }
    }

    /// Ranges of whole pages: a mapping, all from one mapping to another, more, or other.
    fn ranges(&self) -> BoxedStrategy<(u64, u64)> {
        let hull = (self.one(), self.one()).prop_map(|((a, a_size), (b, b_size))| {
            let start = a.min(b);
            (start, (a - start).saturating_add(a_size).max((b - start).saturating_add(b_size)))
        });
        let around =
            (hull.clone(), 0..70u64, 0..70u64).prop_map(|((iova, size), before, after)| {
                let start = iova.saturating_sub(before * PAGE);
                (start, size.saturating_add(iova - start).saturating_add(after * PAGE))
            });
        let other = (0..PAGES + 70, 0..140u64).prop_map(|(p, n)| (BASE + p * PAGE, n * PAGE));
        let invalid = (self.one(), select(vec![1, PAGE - 1, 1 << 63, u64::MAX - PAGE + 1]));
        let invalid = invalid.prop_map(|((iova, size), off)| match off {
            PAGE.. => (iova, off),
            off => (iova + off, size),
        });
        prop_oneof![8 => self.one(), 8 => hull, 4 => around, 2 => other, 1 => invalid].boxed()
    }

    /// Some pages of a mapping, sometimes beyond its end.
    fn pages(&self) -> BoxedStrategy<(u64, u64)> {
        let count = prop_oneof![8 => 1..6u64, 2 => 1..80u64];
        let pages = (self.one(), 0..160u64, count).prop_map(|((iova, size), first, count)| {
            let first = first % (size / PAGE).max(1);
            (iova + first * PAGE, count * PAGE)
        });
        let from_the_end = (self.one(), 0..4u64, 0..4u64).prop_map(|((iova, size), back, more)| {
            let back = (back + 1).min(size / PAGE) * PAGE;
            ((iova + (size - back)), back.saturating_add(more * PAGE))
        });
        prop_oneof![6 => pages, 2 => from_the_end].boxed()
    }
}

fn map_op() -> impl Strategy<Value = Op> {
    let pages = prop_oneof![10 => 1..20u64, 4 => 55..75u64, 2 => 120..140u64];
    let usual = (0..PAGES, pages).prop_map(|(first, n)| (BASE + first * PAGE, n * PAGE));
    let edges = (1..10u64).prop_map(|n| ((n * PAGE).wrapping_neg(), n * PAGE));
    let zero = (1..70u64).prop_map(|n| (0, n * PAGE));
    let huge = select(vec![1 << 18, BITMAP_PAGES_MAX + 1]).prop_map(|n| (HUGE, n * PAGE));
    let invalid = (0..PAGES, 0..4u32).prop_map(|(first, kind)| match kind {
        0 => (BASE + first * PAGE, 0),
        1 => (BASE + first * PAGE, PAGE + 8),
        2 => (BASE + first * PAGE + 1, PAGE),
        // Beyond the end of the address space.
        _ => ((PAGE * (first + 1)).wrapping_neg(), PAGE * (first + 2)),
    });
    let range = prop_oneof![30 => usual, 1 => edges, 1 => zero, 1 => huge, 1 => invalid];
    let rw = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    let flags = prop_oneof![
        30 => Just(rw),
        2 => Just(VFIO_DMA_MAP_FLAG_READ),
        1 => select(vec![VFIO_DMA_MAP_FLAG_WRITE, 0, VFIO_DMA_MAP_FLAG_VADDR, rw | (1 << 31)]),
    ];
    let missing = prop_oneof![10 => Just(0), 2 => 0..70u64];
    (range, flags, missing).prop_map(|((iova, size), flags, missing)| {
        // Not so much memory behind what is huge.
        let backed = size.saturating_sub(missing * PAGE).min(140 * PAGE);
        Op::Map { iova, size, backed, flags }
    })
}

/// A mapping loses its address, or gets one again.
fn vaddr_op(contract: &Contract, mappings: &Mappings) -> BoxedStrategy<Op> {
    let flags = VFIO_DMA_MAP_FLAG_VADDR;
    let update = move |(iova, size)| Op::Map { iova, size, backed: size, flags };
    let flags = VFIO_DMA_UNMAP_FLAG_VADDR;
    let invalidate = move |(iova, size)| Op::Unmap { iova, size, flags };
    match contract.model.lacks_vaddr() {
        true => mappings.one().prop_map(update).boxed(),
        false => mappings.one().prop_map(invalidate).boxed(),
    }
}

fn unmap_op(mappings: &Mappings) -> BoxedStrategy<Op> {
    let flags = select(vec![
        VFIO_DMA_UNMAP_FLAG_ALL,
        VFIO_DMA_UNMAP_FLAG_VADDR,
        VFIO_DMA_UNMAP_FLAG_ALL | VFIO_DMA_UNMAP_FLAG_VADDR,
        1 << 31,
    ]);
    let range = || mappings.ranges();
    prop_oneof![
        12 => range().prop_map(|(iova, size)| Op::unmap(iova, size)),
        1 => Just(Op::unmap_all()),
        1 => (range(), flags).prop_map(|((iova, size), flags)| Op::Unmap { iova, size, flags }),
    ]
    .boxed()
}

/// A read of a bitmap, most often into a buffer that is right for it.
fn bitmap_op(mappings: &Mappings, op: fn(u64, u64, Buffer) -> Op) -> BoxedStrategy<Op> {
    let wrong = (0..7u32, 0..6u64);
    let buffer = prop_oneof![10 => Just(None), 5 => wrong.prop_map(Some)];
    (mappings.ranges(), buffer)
        .prop_map(move |((iova, size), wrong)| {
            let good = Buffer::covering(size);
            let buffer = match wrong {
                None => good,
                Some((0, _)) => good.with_memory(BufferMemory::ReadOnly),
                Some((1, n)) => {
                    let pgsize = [0, 1, PAGE / 2, 2 * PAGE, 3 * PAGE, 1 << 63][n as usize];
                    Buffer { pgsize, ..good }
                }
                Some((2, n)) => {
                    let sizes = [0, good.size.saturating_sub(1), good.size + 1, good.size + 8];
                    let max = BITMAP_PAGES_MAX.div_ceil(64) * 8;
                    let size = sizes.into_iter().chain([max, max + 1]).nth(n as usize);
                    Buffer { size: size.unwrap_or(0), ..good }
                }
                Some((_, words)) => good.with_memory(BufferMemory::Ends(8 * words)),
            };
            op(iova, size, buffer)
        })
        .boxed()
}

/// Flags that are none of START, STOP and GET_BITMAP alone.
fn dirty_pages_op() -> impl Strategy<Value = Op> {
    select(vec![0, 3, 5, 6, 7, 8, 1 | (1 << 31)]).prop_map(|flags| Op::DirtyPages { flags })
}

/// Opens a device that is closed; closes or resets one that is open.
fn device_op(contract: &Contract) -> BoxedStrategy<Op> {
    let ops = (0..DEVICES).flat_map(|device| match contract.device(device) {
        None => vec![Op::Open { device }; 3],
        Some(_) => vec![Op::Reset { device }, Op::Close { device }],
    });
    select(ops.collect::<Vec<_>>()).boxed()
}

/// A group joins or leaves; or a device with an IOMMU is opened or closed. One by which its group is
/// promoted pins or unpins; any other does DMA, rarely, as it takes 200 ms.
fn group_op(contract: &Contract, slots: &[usize], mappings: &Mappings) -> BoxedStrategy<Op> {
    let of_kind = |kind| {
        let slots = slots.iter().copied();
        slots.filter(move |&slot| slots::kind(slot) == Some(kind))
    };
    let open_of = |kind| -> Vec<_> {
        of_kind(kind).filter(|&slot| contract.device(slot).is_some()).collect()
    };
    let of_groups = slots.iter().flat_map(|&device| {
        let leave = |by| Op::Leave { device, by };
        [Op::Join { device }, leave(Leave::Unset), leave(Leave::Close)]
    });
    // Without a mediated device open, their groups can leave.
    let close = EMULATED.into_iter().map(|device| Op::Close { device });
    let with_iommu = of_kind(SlotKind::Pinning).chain(of_kind(SlotKind::Edu));
    let of_devices = with_iommu.flat_map(|device| [Op::Open { device }, Op::Close { device }]);
    let of_devices = of_devices.chain(close);
    let ops: Vec<_> = of_groups.chain(of_devices).filter(|op| contract.allows(op)).collect();
    let mut op = if ops.is_empty() { Just(Op::Check).boxed() } else { select(ops).boxed() };
    let edus = open_of(SlotKind::Edu);
    if !edus.is_empty() {
        let copy = (select(edus), mappings.pages(), mappings.pages(), 1..PAGE);
        let copy = copy.prop_map(|(device, (from, _), (to, _), length)| Op::Copy {
            device,
            from,
            to: to + (PAGE - length),
            length,
        });
        op = prop_oneof![3 => op, 1 => copy].boxed();
    }
    let open = open_of(SlotKind::Pinning);
    if open.is_empty() {
        return op;
    }
    let opcode = prop_oneof![3 => Just(Opcode::Pin), 1 => Just(Opcode::Unpin)];
    let command = (select(open), opcode, mappings.pages());
    let command = command.prop_map(|(device, op, (iova, length))| Op::Command {
        device,
        op: op as u32,
        iova,
        length,
        seed: 0,
    });
    prop_oneof![op, command].boxed()
}

/// A command for whole pages of mappings.
fn pages_op(mappings: &Mappings, op: Opcode) -> BoxedStrategy<Op> {
    (0..DEVICES, mappings.pages())
        .prop_map(move |(device, (iova, length))| Op::Command {
            device,
            op: op as u32,
            iova,
            length,
            seed: 0,
        })
        .boxed()
}

/// An operation on pinned pages.
fn pinned_op(contract: &Contract, mappings: &Mappings) -> BoxedStrategy<Op> {
    let pinned = (0..DEVICES).flat_map(|slot| {
        let pages = contract.device(slot).map(|id| contract.model.pinned(id));
        pages.into_iter().flatten().map(move |page| (slot, page))
    });
    let pinned: Vec<_> = pinned.collect();
    if pinned.is_empty() {
        let op =
            prop_oneof![4 => Just(Opcode::Pin), 1 => Just(Opcode::Unpin), 1 => Just(Opcode::Read)];
        let mappings = mappings.clone();
        return op.prop_flat_map(move |op| pages_op(&mappings, op)).boxed();
    }
    let count = prop_oneof![3 => Just(1), 1 => 1..4u64];
    let unpin = (select(pinned.clone()), count).prop_map(|((device, iova), n)| Op::Command {
        device,
        op: Opcode::Unpin as u32,
        iova,
        length: n * PAGE,
        seed: 0,
    });
    let transfer = (select(pinned), 0..PAGE, 1..2 * PAGE, any::<u16>(), any::<bool>());
    let transfer = transfer.prop_map(|((device, page), offset, length, seed, write)| {
        let op = if write { Opcode::Write } else { Opcode::Read };
        let seed = if write { seed.into() } else { 0 };
        Op::Command { device, op: op as u32, iova: page + offset, length, seed }
    });
    prop_oneof![unpin, transfer].boxed()
}

/// A raw pin at any offset of pages of mappings, or just outside of them.
fn raw_pin_op(mappings: &Mappings) -> BoxedStrategy<Op> {
    let offset =
        prop_oneof![4 => Just(0), 2 => Just(0x800), 1 => select(vec![1, 0xfff]), 2 => 0..PAGE];
    let count = prop_oneof![4 => Just(None), 1 => select(vec![0, 2, 3, 65, RAW_PAGES, RAW_PAGES + 1]).prop_map(Some)];
    let protection =
        prop_oneof![6 => Just(3), 2 => Just(1), 2 => select(vec![0, 2, 4, 8, 1 << 31, 1 << 32])];
    let place = prop_oneof![8 => Just(0), 1 => Just(PAGE.wrapping_neg())];
    (0..DEVICES, mappings.pages(), place, offset, count, protection)
        .prop_map(|(device, (iova, length), before, offset, count, seed)| {
            let length = count.map_or(length, |count| count * PAGE);
            let iova = iova.wrapping_add(before) | offset;
            Op::Command { device, op: Opcode::RawPin as u32, iova, length, seed }
        })
        .boxed()
}

/// An operation on a raw pin, seldom on one that there isn't.
fn raw_pinned_op(contract: &Contract, mappings: &Mappings) -> BoxedStrategy<Op> {
    let pins = (0..DEVICES).flat_map(|slot| {
        contract
            .raw_pins(slot)
            .iter()
            .map(move |pin| (slot, (pin.iova, pin.length, pin.protection)))
    });
    let pins: Vec<_> = pins.collect();
    if pins.is_empty() {
        return raw_pin_op(mappings);
    }
    let op = select(vec![Opcode::RawUnpin, Opcode::RawWrite, Opcode::RawRead]);
    let other = prop_oneof![12 => Just(0), 1 => Just(1), 1 => Just(PAGE)];
    (select(pins), op, other, any::<u16>())
        .prop_map(|((device, (iova, length, protection)), op, other, seed)| {
            let seed = match op {
                Opcode::RawUnpin => protection,
                Opcode::RawWrite => seed.into(),
                _ => 0,
            };
            let iova = iova.wrapping_add(other);
            Op::Command { device, op: op as u32, iova, length, seed }
        })
        .boxed()
}

/// `vfio_dma_rw()` of bytes at any alignment.
fn bytes_op(mappings: &Mappings) -> BoxedStrategy<Op> {
    let end = prop_oneof![4 => Just(0), 2 => 0..PAGE];
    let begin = prop_oneof![4 => Just(0), 2 => 0..PAGE];
    let op = prop_oneof![3 => Just(Opcode::DmaWrite), 1 => Just(Opcode::DmaRead)];
    (0..DEVICES, op, mappings.pages(), begin, end, any::<u16>())
        .prop_map(|(device, op, (iova, length), begin, end, seed)| {
            let length = length.saturating_sub(begin + end).max(1);
            let seed = if op == Opcode::DmaWrite { seed.into() } else { 0 };
            Op::Command { device, op: op as u32, iova: iova + begin, length, seed }
        })
        .boxed()
}

/// Commands that are none, or whose range is none.
fn invalid_command(mappings: &Mappings) -> BoxedStrategy<Op> {
    let length = select(vec![0, 1, PAGE, 1 << 40, u64::MAX]);
    (0..DEVICES, select(vec![1, 2, 3, 4, 5, 6, 0, 7, 31, u32::MAX]), mappings.one(), length)
        .prop_map(|(device, op, (iova, size), length)| {
            let iova = iova + (size - 1);
            Op::Command { device, op, iova, length, seed: 0 }
        })
        .boxed()
}

/// What the process does to its memory.
fn process_op(mappings: &Mappings) -> BoxedStrategy<Op> {
    let memory = (0..3, mappings.pages(), any::<u16>());
    let memory = memory.prop_map(|(kind, (iova, size), seed)| match kind {
        0 => Op::Hide { iova, size },
        1 => Op::Show { iova, size },
        _ => Op::UserWrite { iova, length: size - 1, seed: seed.into() },
    });
    let limit = prop_oneof![2 => (0..120u64).prop_map(Some), 3 => Just(None)];
    let limit = limit.prop_map(|pages| Op::Limit { pages });
    prop_oneof![8 => memory, 1 => limit].boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{search::runner, triggers::TRIGGERS};
    use dirty_model::{Errno, Errnos, Limits};
    use std::collections::BTreeMap;
    use testbed::{limits_of, program};

    const SLOTS: [usize; 5] = [0, 1, 6, 7, 4];

    fn contract() -> Contract {
        let limits = Limits { raw_pages: Some(RAW_PAGES), ..limits_of(65536, 1 << 28) };
        program::contract(65535, limits)
    }

    /// How often operations came of which kind, and how they end.
    fn outcomes(avoided: Vec<&'static Trigger>) -> BTreeMap<(String, Option<Errnos>), u32> {
        let strategy = sequences(contract(), 1..121, avoided, SLOTS.to_vec());
        let mut runner = runner(1);
        let mut outcomes = BTreeMap::new();
        for _ in 0..2500 {
            let (contract, program, _) = strategy.new_tree(&mut runner).unwrap().current();
            let mut contract = (*contract).clone();
            for op in program {
                let text = op.to_string();
                let mut words = text.split(' ');
                let mut kind = words.next().unwrap_or_default().to_owned();
                if ["device", "process"].contains(&kind.as_str()) {
                    let place = |word: &&str| *word == "background" || word.parse::<u32>().is_ok();
                    kind = words.find(|word| !place(word)).unwrap_or("?").into();
                }
                let status = contract.apply(&op).answer.status;
                *outcomes.entry((kind, status.err())).or_insert(0) += 1;
            }
        }
        outcomes
    }

    #[test]
    fn everything_is_tried_and_ends_in_every_way() {
        let outcomes = outcomes(Vec::new());
        let ok = None;
        let one = |errno: Errno| Some(Errnos::from(errno));
        let (efault, einval, eperm) = (one(Errno::EFAULT), one(Errno::EINVAL), one(Errno::EPERM));
        let (overflow, e2big, enxio) =
            (one(Errno::EOVERFLOW), one(Errno::E2BIG), one(Errno::ENXIO));
        let either = Some(Errno::EINVAL | Errno::EOVERFLOW);
        let read = vec![ok, einval, overflow, either, efault];
        let dma = vec![ok, einval, overflow, e2big, eperm, efault];
        let pinned = vec![ok, einval, overflow, e2big, enxio];
        for (kind, ends) in [
            ("MAP", vec![ok, einval, overflow, one(Errno::EEXIST), one(Errno::ENOENT)]),
            ("UNMAP", vec![ok, einval, overflow, one(Errno::EBUSY)]),
            ("UNMAP_BITMAP", read.clone()),
            ("GET_BITMAP", read),
            ("START", vec![ok, einval]),
            ("STOP", vec![ok]),
            ("DIRTY_PAGES", vec![einval]),
            ("PIN", dma.clone()),
            ("UNPIN", pinned.clone()),
            ("READ", pinned.clone()),
            ("WRITE", pinned),
            ("DMA_WRITE", dma.clone()),
            ("DMA_READ", dma),
            ("JOIN", vec![ok, efault, einval, one(Errno::ENOMEM)]),
            ("LEAVE", vec![ok]),
            ("COPY", vec![ok]),
            ("RAW_PIN", vec![ok, einval, one(Errno::EPERM), efault, e2big, overflow]),
            ("RAW_UNPIN", vec![ok, enxio]),
            ("RAW_WRITE", vec![ok, enxio, one(Errno::EACCES)]),
            ("RAW_READ", vec![ok, enxio, one(Errno::EACCES)]),
            ("OPEN", vec![ok]),
            ("CLOSE", vec![ok]),
            ("RESET", vec![ok]),
            ("HIDE", vec![ok]),
            ("SHOW", vec![ok]),
            ("LIMIT", vec![ok]),
            ("CHECK", vec![ok]),
        ] {
            for end in ends {
                let count = outcomes.get(&(kind.to_owned(), end)).copied().unwrap_or(0);
                assert!(count >= 2, "{kind} -> {end:?}: {count} times");
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_sequences() {
        assert_eq!(outcomes(TRIGGERS.iter().collect()), outcomes(TRIGGERS.iter().collect()));
    }

    #[test]
    fn every_known_defect_can_be_reached_and_avoided() {
        // Where mediated devices come late.
        let mut alone = contract();
        let [emulated, other] = EMULATED;
        let leave = |device| Op::Leave { device, by: Leave::Unset };
        let close = Op::Close { device: emulated };
        for op in [close, leave(emulated), Op::Join { device: SLOTS[2] }, leave(other)] {
            alone.apply(&op);
        }
        let programs = |contract: &Contract, avoided: Vec<&'static Trigger>, count| {
            let strategy = sequences(contract.clone(), 1..121, avoided, SLOTS.to_vec());
            let mut runner = runner(1);
            let trees = (0..count).map(|_| strategy.new_tree(&mut runner).unwrap());
            let programs = trees.map(|tree| (contract.clone(), tree.current().1));
            programs.collect::<Vec<_>>()
        };
        let shows = |trigger, (contract, program): &(Contract, Vec<Op>)| {
            let mut contract = contract.clone();
            program.iter().any(|op| {
                let shows = triggers_any(&[trigger], &contract, op);
                contract.apply(op);
                shows
            })
        };
        let all = [programs(&contract(), Vec::new(), 1500), programs(&alone, Vec::new(), 200)];
        let all = all.concat();
        for trigger in TRIGGERS {
            let shown = all.iter().filter(|program| shows(trigger, program)).count();
            assert!(shown >= 3, "{} isn't reached: {shown}", trigger.defect);
            let avoided = programs(&alone, vec![trigger], 100);
            let shown = avoided.iter().any(|program| shows(trigger, program));
            assert!(!shown, "{} isn't avoided", trigger.defect);
        }
    }
}
