// SPDX-License-Identifier: GPL-2.0-only

//! Which operations run into a known defect of type1, so that sequences can be made that don't.
//!
//! What makes a defect show is told from the model's state before the operation, as exactly as its
//! cause is known (see `Documentation/findings/`): what is steered around is not tested.

use dirty_model::{BitmapBuffer, Command, CommandKind, Errno, MappingView, RawPin};
use mdev_dma::Opcode;
use std::{borrow::Cow, ops::Range};
use testbed::{
    Contract, Op, PAGE, RAW_PAGES, operation,
    slots::{self, SLOTS, SlotKind},
};

/// Pages that one word of a bitmap has.
const WORD_PAGES: u64 = 64;

/// A defect, and whether an operation shows it.
pub struct Trigger {
    pub defect: &'static str,
    shows: fn(&Next<'_>) -> bool,
}

/// Whether `op`, done next, shows one of these defects, or the contract leaves open what comes of it.
pub fn triggers_any(triggers: &[&Trigger], contract: &Contract, op: &Op) -> bool {
    let next = Next { contract, op, read: Read::of(contract, op) };
    is_left_open(&next) || triggers.iter().any(|trigger| (trigger.shows)(&next))
}

/// An operation, and what is owed before it.
struct Next<'a> {
    contract: &'a Contract,
    op: &'a Op,
    read: Option<Read<'a>>,
}

/// The defects that sequences of operations can reach.
pub const TRIGGERS: &[Trigger] = &[
    Trigger { defect: "D1", shows: page_size_0 },
    Trigger { defect: "D4", shows: no_flag },
    Trigger { defect: "D5", shows: pin_unwind },
    Trigger { defect: "D6", shows: shift },
    Trigger { defect: "D7", shows: read_consumes },
    Trigger { defect: "D8", shows: unmap_partial },
    Trigger { defect: "D9", shows: dma_rw_partial },
    Trigger { defect: "D11", shows: pin_lookup },
    Trigger { defect: "D12", shows: pin_offset },
    Trigger { defect: "D20", shows: beyond_aperture },
    Trigger { defect: "D21", shows: long_unwind },
    Trigger { defect: "D23", shows: no_vaddr },
];

fn page_size_0(next: &Next<'_>) -> bool {
    matches!(next.op, Op::GetBitmap { buffer, .. } | Op::UnmapBitmap { buffer, .. } if buffer.pgsize == 0)
}

fn no_flag(next: &Next<'_>) -> bool {
    matches!(next.op, Op::DirtyPages { flags: 0 })
}

/// A batch fails after pages of it were pinned that are not dirty otherwise.
fn pin_unwind(next: &Next<'_>) -> bool {
    let contract = next.contract;
    let &Op::Command { device, op, iova, length, .. } = next.op else { return false };
    if let (Some(pin), Some(id), true) =
        (raw_pin(next.op), contract.device(device), contract.model.tracking())
    {
        let before = contract.model.raw_pinned_before_failure(id, &pin);
        return !before.into_iter().all(|page| all_dirty(contract, page..page + PAGE));
    }
    let Some(id) = contract.device(device).filter(|_| operation(op) == Some(Opcode::Pin)) else {
        return false;
    };
    if !contract.model.tracking() || (iova | length) % PAGE != 0 {
        return false;
    }
    let Some(end) = iova.checked_add(length) else { return false };
    let batch_size = u64::from(mdev_dma::uapi::RUST_MDEV_DMA_PIN_BATCH) * PAGE;
    // Another one that a batch has been pinned in, if there is another batch.
    let mut model = Cow::Borrowed(&contract.model);
    let mut next = iova;
    while next < end {
        let batch = next..end.min((next - next % batch_size).saturating_add(batch_size));
        next = batch.end;
        if let Some(failure) = model.pin_failure(id, batch.clone()) {
            return !all_dirty(contract, batch.start..failure.page);
        }
        if next == end {
            break;
        }
        // What a batch locks counts for the next.
        let (kind, length) = (Some(CommandKind::Pin), batch.end - batch.start);
        model.to_mut().command(id, &Command { kind, iova: batch.start, length });
    }
    false
}

/// A mapping that doesn't begin at a word of the bitmap is shifted to where it belongs, in place, and
/// gets the bits of others that share the word. Some of both stay: its own that were shifted beyond its
/// end, and those of others that are beyond it anyway; or all, if the bitmap can't be written.
fn shift(next: &Next<'_>) -> bool {
    let Some(read) = next.read.as_ref().filter(|read| !read.unmaps_all()) else { return false };
    read.mappings.iter().enumerate().any(|(i, mapping)| {
        let (page, pages) = ((mapping.iova - read.iova) / PAGE, mapping.size / PAGE);
        let shift = page % WORD_PAGES;
        let (own, others) = match mapping.fits {
            true => (pages.saturating_sub(shift), pages.min(shift)),
            false => (0, 0),
        };
        let at = |page: u64| read.iova.saturating_add(page * PAGE);
        let others = at(page - shift + others)..at(page);
        shift != 0
            && (mapping.is_dirty_in(at(page + own)..at(page + pages))
                || read.mappings[..i].iter().any(|other| other.is_dirty_in(others.clone())))
    })
}

/// A read fails while everything counts as dirty. The contract leaves open whether it stays so in the
/// mappings that it came to, should the group be promoted that makes it so: reported once more is not
/// lost.
fn is_left_open(next: &Next<'_>) -> bool {
    next.contract.model.all_dirty() && next.read.as_ref().is_some_and(Read::fails)
}

/// A read fails in a mapping behind one with dirty pages, of which not all are pinned.
fn read_consumes(next: &Next<'_>) -> bool {
    let Some(read) = next.read.as_ref().filter(|read| !read.unmaps && read.fails()) else {
        return false;
    };
    let written = |mapping: &Part<'_>| {
        let mut pages = mapping.dirty_runs().flat_map(|run| run.step_by(PAGE as usize));
        pages.any(|page| !next.contract.model.is_pinned(page))
    };
    read.mappings.iter().any(|mapping| mapping.fits && written(mapping))
}

/// An unmap of several mappings fails because a bitmap can't be written, after it has unmapped others or
/// before it has unpinned all.
fn unmap_partial(next: &Next<'_>) -> bool {
    let Some(read) = next.read.as_ref().filter(|read| read.unmaps && read.fails()) else {
        return false;
    };
    read.mappings.len() > 1 || read.pinned_behind
}

/// A write faults after it wrote to pages that are not dirty otherwise.
fn dma_rw_partial(next: &Next<'_>) -> bool {
    let Next { contract, op, .. } = next;
    let &&Op::Command { op: number, iova, .. } = op else { return false };
    if operation(number) != Some(Opcode::DmaWrite) || !contract.model.tracking() {
        return false;
    }
    let owed = (*contract).clone().apply(op);
    let end = owed.transferred.end;
    if owed.answer.status != Err(Errno::EFAULT.into()) || end == iova {
        return false;
    }
    // It wrote to the last mapping from where that begins on, or where its call did.
    let mapping = mapping_of(contract, end - 1).map_or(0, |mapping| mapping.iova);
    !all_dirty(contract, mapping.max(iova + owed.answer.count)..end)
}

/// The first group with an IOMMU joins, which can't map all that is mapped.
fn beyond_aperture(next: &Next<'_>) -> bool {
    let &Op::Join { device } = next.op else { return false };
    let aperture = next.contract.aperture_end();
    let mut mappings = next.contract.model.mappings();
    slots::kind(device) != Some(SlotKind::Emulated)
        && mappings.any(|mapping| mapping.iova + (mapping.size - 1) > aperture)
}

/// A group with an IOMMU can't join while something large is mapped.
fn long_unwind(next: &Next<'_>) -> bool {
    const LARGE: u64 = 1 << 30;
    let large = || next.contract.model.mappings().any(|mapping| mapping.size >= LARGE);
    matches!(next.op, Op::Join { .. })
        && large()
        && next.contract.clone().apply(next.op).answer.status.is_err()
}

/// A device uses memory while a mapping has no address. Only one with an IOMMU can be there.
fn no_vaddr(next: &Next<'_>) -> bool {
    matches!(next.op, Op::Command { .. }) && next.contract.model.lacks_vaddr()
}

/// What a RAW_PIN asks for, if it is one that gets as far as to look up a page.
fn raw_pin(op: &Op) -> Option<RawPin> {
    let &Op::Command { op, iova, length, seed: protection, .. } = op else { return None };
    let pages = length / PAGE;
    let asks = operation(op) == Some(Opcode::RawPin) && length % PAGE == 0;
    (asks && (1..=RAW_PAGES).contains(&pages)).then_some(RawPin { iova, length, protection })
}

/// A page's worth of IOVA from an offset in a page on goes on into another mapping: when it is pinned, or
/// because that mapping is made between the pin and its unpin.
fn pin_lookup(next: &Next<'_>) -> bool {
    let contract = next.contract;
    if let Op::Map { iova, .. } = *next.op {
        let mut pins = (0..SLOTS).flat_map(|slot| contract.raw_pins(slot));
        return pins.any(|pin| {
            let end = (pin.iova - pin.iova % PAGE).checked_add(pin.length);
            pin.iova % PAGE != 0 && end == Some(iova)
        });
    }
    let Some(pin) = raw_pin(next.op) else { return false };
    for i in 0..pin.length / PAGE {
        let Some(at) = pin.iova.checked_add(i * PAGE) else { return false };
        let begin = |iova| mapping_of(contract, iova).map(|mapping| mapping.iova);
        let (here, there) = (begin(at), begin(at.saturating_add(PAGE - 1)));
        if there.is_some() && there != here {
            return true;
        }
        if here.is_none() {
            return false;
        }
    }
    false
}

/// A page is pinned that is pinned at another offset; or the last page of the address space, at one.
fn pin_offset(next: &Next<'_>) -> bool {
    let contract = next.contract;
    let &Op::Command { op, iova, length, .. } = next.op else { return false };
    let pin = match operation(op) {
        Some(Opcode::Pin) => RawPin { iova, length, protection: 0 },
        _ => match raw_pin(next.op) {
            Some(pin) => pin,
            None => return false,
        },
    };
    let (offset, first) = (pin.iova % PAGE, pin.iova - pin.iova % PAGE);
    let Some(more) = pin.length.checked_sub(1) else { return false };
    let Some(last) = first.checked_add(more) else { return false };
    if pin.iova.checked_add(more).is_none() {
        return true;
    }
    let other = |pin: &RawPin| {
        let start = pin.iova - pin.iova % PAGE;
        pin.iova % PAGE != offset && start <= last && first - start.min(first) < pin.length
    };
    let raw = (0..SLOTS).any(|slot| contract.raw_pins(slot).iter().any(other));
    let slots = (0..SLOTS).filter_map(|slot| contract.device(slot));
    let mut aligned = slots.flat_map(|id| contract.model.pinned(id));
    raw || (offset != 0 && aligned.any(|page| (first..=last).contains(&page)))
}

/// A range whose bitmap is read, with what type1 gets to see of it.
struct Read<'a> {
    iova: u64,
    unmaps: bool,
    /// Its mappings, up to the first whose bitmap can't be written.
    mappings: Vec<Part<'a>>,
    /// Whether pages are pinned in those behind.
    pinned_behind: bool,
}

struct Part<'a> {
    iova: u64,
    size: u64,
    dirty: Option<&'a dirty_model::Bitmap>,
    /// Whether it counts as dirty as a whole.
    all: bool,
    /// Whether its bitmap can be written.
    fits: bool,
}

impl Part<'_> {
    /// Its dirty pages, in bytes of IOVA.
    fn dirty_runs(&self) -> impl Iterator<Item = Range<u64>> {
        let runs = match self.all {
            true => vec![0..self.size / PAGE],
            false => self.dirty.map(|dirty| dirty.runs()).unwrap_or_default(),
        };
        let at = |page: u64| self.iova.saturating_add(page * PAGE);
        runs.into_iter().map(move |run| at(run.start)..at(run.end))
    }

    fn is_dirty_in(&self, range: Range<u64>) -> bool {
        self.dirty_runs().any(|run| run.start < range.end && range.start < run.end)
    }
}

impl<'a> Read<'a> {
    /// If `op` is a read that gets as far as to write bitmaps.
    fn of(contract: &'a Contract, op: &Op) -> Option<Self> {
        let (iova, size, buffer, unmaps) = match *op {
            Op::GetBitmap { iova, size, buffer } => (iova, size, buffer, false),
            Op::UnmapBitmap { iova, size, buffer } => (iova, size, buffer, true),
            _ => return None,
        };
        let buffer: BitmapBuffer = buffer.to_model();
        contract.model.check_read(iova, size, &buffer).ok()?;
        let parts = contract.model.mappings_in(iova, size, &buffer);
        let all = contract.model.all_dirty();
        let parts = parts.map(|(MappingView { iova, size, dirty }, fits)| Part {
            iova,
            size,
            dirty,
            all,
            fits,
        });
        let mut mappings: Vec<_> = parts.collect();
        let count = mappings.iter().position(|mapping| !mapping.fits).map(|first| first + 1);
        let behind = mappings.split_off(count.unwrap_or(mappings.len()));
        let pinned_behind = behind.iter().any(|part| contract.has_pins_in(part.iova, part.size));
        Some(Self { iova, unmaps, mappings, pinned_behind })
    }

    fn fails(&self) -> bool {
        self.mappings.iter().any(|mapping| !mapping.fits)
    }

    /// Whether all its mappings are gone afterwards, and their bitmaps with them.
    fn unmaps_all(&self) -> bool {
        self.unmaps && !self.fails()
    }
}

/// Whether the model has all pages of a range dirty.
fn all_dirty(contract: &Contract, range: Range<u64>) -> bool {
    let first = range.start - range.start % PAGE;
    (first..range.end).step_by(PAGE as usize).all(|page| {
        mapping_of(contract, page).is_some_and(|mapping| {
            mapping.dirty.is_some_and(|dirty| dirty.get((page - mapping.iova) / PAGE))
        })
    })
}

fn mapping_of(contract: &Contract, iova: u64) -> Option<MappingView<'_>> {
    let mut mappings = contract.model.mappings();
    mappings.find(|mapping| iova.checked_sub(mapping.iova).is_some_and(|at| at < mapping.size))
}
