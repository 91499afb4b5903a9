// SPDX-License-Identifier: GPL-2.0-only

use crate::{
    Answer, Contract, Op, PAGE,
    contract::{RAW_PAGES, SPAN_MAX, limits_of},
    expected::Expected,
    live::LiveContainer,
    regions::new_memory,
    rights::Rights,
    slots::{self, SlotKind},
};
use anyhow::{Context as _, Result, ensure};
use dirty_model::{Errnos, Limits};
use edu_client::Edu;
use events::{Difference, Runs};
use harness::{Context, Failure, Skip, locked_memory, pages_pinned};
use mdev_dma::MdevDma;
use std::{fs, ops::Range, sync::Arc};
use vfio_client::{Container, DeviceNode, Leave, fail_nth::counted, uapi::VFIO_DMA_MAP_FLAG_VADDR};

/// Where the kernel has the limit on mappings of a container.
const DMA_ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// Borders of so many regions are compared after every command, those of the newest; of all of them
/// when memory is.
const BORDERS: usize = 64;

/// A container with devices and memory in the kernel, and what is expected of it.
pub struct Testbed<'a> {
    pub(crate) context: &'a Context<'a>,
    pub(crate) kernel: LiveContainer,
    expected: Expected,
    /// What there is besides of what is locked and pinned, if that is to be compared.
    besides: Option<Besides>,
    /// What it could lock before it was limited.
    rights: Option<Rights>,
}

/// What is locked and pinned for others than a container.
#[derive(Clone, Copy)]
pub struct Besides {
    /// Bytes that this process has locked.
    locked: u64,
    /// Pages that are pinned, by whomever.
    pinned: u64,
}

impl<'a> Testbed<'a> {
    /// A container with the first of the context's devices, which is open. Nothing is mapped.
    pub fn new(context: &'a Context<'a>) -> Result<Self> {
        Self::on(context, 0)
    }

    /// As [`Self::new`], with another of the context's mediated devices in slot 0.
    pub fn on(context: &'a Context<'a>, device: usize) -> Result<Self> {
        let mut this = Self::with(context, 0, vec![(0, context.device(device)?.node()?)])?;
        this.must(Op::Open { device: 0 })?;
        let limits = limits(this.device(0))?;
        this.expected.contract.set_limits(0, limits);
        Ok(this)
    }

    /// A container with the group of the device in a slot, which isn't open.
    pub fn joined(context: &'a Context<'a>, slot: usize) -> Result<Self> {
        Self::with(context, slot, slots::bind(context, slot)?)
    }

    fn with(
        context: &'a Context<'a>,
        slot: usize,
        devices: Vec<(usize, DeviceNode)>,
    ) -> Result<Self> {
        let join = Op::Join { device: slot };
        let n = context.call(join.to_call(devices.first().map(|(_, node)| node.group())));
        let kernel = LiveContainer::new(devices)?;
        let mut contract = Contract::new(dma_entry_limit()?, limits_of(u64::MAX, u64::MAX));
        if slots::kind(slot) != Some(SlotKind::Emulated) {
            contract.iova_ranges = slots::function(context, slot)?.iova_ranges()?;
        }
        let owed = contract.apply(&join).answer;
        let reply = owed.to_reply(&join);
        context.answer(|| events::Answer { n, model: reply.clone(), kernel: reply });
        Ok(Self { context, kernel, expected: Expected::new(contract), besides: None, rights: None })
    }

    /// Puts the context's second device into the container, and opens it as device 1.
    pub fn add_device(&mut self) -> Result<()> {
        self.must(Op::Join { device: 1 })?;
        self.must(Op::Open { device: 1 })
    }

    /// Skips the scenario unless devices have raw pins.
    pub fn needs_raw_pins(&self) -> Result<()> {
        ensure!(self.contract().has_raw_pins(), Skip("load rust_mdev_dma with raw_pins=1".into()));
        Ok(())
    }

    /// What the kernel owes at the moment.
    pub fn contract(&self) -> &Contract {
        &self.expected.contract
    }

    /// From now on, locked memory of this process is compared too, and how many pages are pinned: nobody
    /// else must lock or pin any.
    pub fn count_locked_memory(&mut self) -> Result<()> {
        let model = &self.contract().model;
        self.besides = Some(Besides {
            locked: locked_memory()? - model.locked_pages() * PAGE,
            pinned: pages_pinned()? - model.pages_held(),
        });
        Ok(())
    }

    /// As [`Self::count_locked_memory`], with what there was besides of another container before, if that is known:
    /// it must have left nothing.
    pub(crate) fn count_from(&mut self, before: Option<Besides>) -> Result<()> {
        self.besides = before;
        if before.is_none() { self.count_locked_memory() } else { Ok(()) }
    }

    /// Closes it, which takes time that the kernel takes.
    pub(crate) fn close(self) {
        counted(|| drop(self.kernel));
    }

    /// What there is besides, if that is compared.
    pub(crate) fn besides(&self) -> Option<Besides> {
        self.besides
    }

    /// Lets this process lock so many pages, beside what it has locked for itself, or all it wants.
    fn limit_locked_pages(&mut self, pages: Option<u64>) -> Result<()> {
        let ours = || -> Result<u64> {
            Ok(locked_memory()? - self.contract().model.locked_pages() * PAGE)
        };
        let besides = match self.besides {
            Some(besides) => besides.locked,
            None => ours()?,
        };
        let rights = match self.rights.take() {
            Some(rights) => rights,
            None => Rights::now()?,
        };
        let limited = rights.limit(pages.map(|pages| besides + pages * PAGE));
        self.rights = Some(rights);
        limited
    }

    /// The container, for calls that are no [`Op`].
    pub fn container(&self) -> &Arc<Container> {
        &self.kernel.container
    }

    /// The number of the group of a device in the container.
    pub fn group(&self, slot: usize) -> u32 {
        self.kernel.group(slot).expect("the group is in the container")
    }

    /// The group of a device has left the container by other means than an [`Op`].
    pub fn has_left(&mut self, device: usize) {
        self.context.note(format_args!("the group of device {device} has left"));
        self.kernel.has_left(device);
        self.expected.contract.apply(&Op::Leave { device, by: Leave::Close });
    }

    /// An open edu, for accesses that are no [`Op`].
    pub fn edu(&self, slot: usize) -> &Edu {
        self.kernel.edu(slot)
    }

    /// An open device that runs commands, for accesses that are no [`Op`].
    pub fn device(&self, device: usize) -> &MdevDma {
        self.kernel.device(device)
    }

    /// From now on, the page at `iova` is expected dirty where it is clean, and clean where it is
    /// dirty: to see whether that is noticed.
    pub fn falsify(&mut self, iova: u64) {
        self.expected.falsify(iova);
    }

    /// As [`Self::falsify`], for the byte at `iova`, which is mapped.
    pub fn falsify_memory(&mut self, iova: u64) {
        self.expected.regions.falsify(iova);
    }

    /// Does `op` in the kernel and in the model. Fails if the answers differ.
    pub fn apply(&mut self, op: Op) -> Result<Answer> {
        Ok(self.apply_both(op)?.1)
    }

    /// As [`Self::apply`]. Returns the answers of both.
    pub(crate) fn apply_both(&mut self, op: Op) -> Result<(Answer<Errnos>, Answer)> {
        let n = self.begin(&op);
        let answer = self.in_kernel(&op)?;
        let expected = self.conclude(n, &op, &answer)?;
        Ok((expected, answer))
    }

    /// Logs that `op` begins. Returns its number.
    pub(crate) fn begin(&self, op: &Op) -> u64 {
        let group = op.device().and_then(|slot| self.kernel.group(slot));
        self.context.call(op.to_call(group))
    }

    /// Does `op` in the kernel.
    pub(crate) fn in_kernel(&mut self, op: &Op) -> Result<Answer> {
        Ok(match *op {
            Op::Map { iova, size, backed, flags } => {
                // What gets another address must be the same memory.
                let updates = flags == VFIO_DMA_MAP_FLAG_VADDR;
                let same = updates.then(|| self.expected.regions.memory_at(iova, size)).flatten();
                let memory = same.map_or_else(|| new_memory(size, backed), Ok)?;
                let answer = self.kernel.map(&memory, iova, size, flags)?;
                if answer.status.is_ok() && !updates {
                    self.expected.regions.map(iova, memory);
                }
                answer
            }
            Op::Limit { pages } => {
                self.limit_locked_pages(pages)?;
                self.kernel.apply(op)?
            }
            Op::Join { device } => {
                let devices = slots::bind(self.context, device)?;
                self.kernel.join(devices)?
            }
            _ => self.kernel.apply(op)?,
        })
    }

    /// Does `op`, which began as number `n`, in the model. Fails unless the kernel's answer is the same.
    pub(crate) fn conclude(&mut self, n: u64, op: &Op, answer: &Answer) -> Result<Answer<Errnos>> {
        let expected = self.expected.apply(op)?;
        self.context.answer(|| events::Answer {
            n,
            model: expected.to_reply(op),
            kernel: answer.to_reply(op),
        });
        compare(op, &expected, answer)?;
        // What is written to a border stays there: of what is repeated if it fails, they are compared when
        // memory is, for that is most of the time that it would take.
        if matches!(op, Op::Command { .. }) && !self.context.is_quiet() {
            self.expected.regions.check_borders(BORDERS)?;
        }
        if *op == Op::Check {
            self.check_memory()?;
            self.check_counters()?;
        }
        Ok(expected)
    }

    /// Compares everything that can be asked for: dirty pages if they are being tracked (which
    /// forgets them), memory, counters.
    pub fn check(&mut self) -> Result<()> {
        if self.contract().model.tracking() {
            self.read_whole()?;
            self.read_each()?;
        }
        self.check_memory()?;
        self.check_counters()
    }

    /// Reads the bitmap of all mappings as one range, holes and all. Returns what is dirty, in bytes
    /// of IOVA.
    pub fn read_whole(&mut self) -> Result<Vec<Range<u64>>> {
        let Some((iova, size)) = self.contract().span() else { return Ok(Vec::new()) };
        ensure!(size <= SPAN_MAX, "mappings too far apart to read them as one range");
        self.read(iova, size)
    }

    /// Reads all that is dirty: as one range if the mappings are near enough to one another, else each
    /// by itself.
    pub fn read_all(&mut self) -> Result<Vec<Range<u64>>> {
        let mut dirty = Vec::new();
        for (iova, size) in self.contract().reads() {
            dirty.extend(self.read(iova, size)?);
        }
        Ok(dirty)
    }

    /// Reads the bitmap of each mapping by itself. Returns as [`Self::read_whole`] does.
    pub fn read_each(&mut self) -> Result<Vec<Range<u64>>> {
        let mut dirty = Vec::new();
        for (iova, size) in self.contract().each() {
            dirty.extend(self.read(iova, size)?);
        }
        Ok(dirty)
    }

    /// Reads the bitmap of a range, which must succeed.
    fn read(&mut self, iova: u64, size: u64) -> Result<Vec<Range<u64>>> {
        let op = Op::get_bitmap(iova, size);
        let answer = self.apply(op.clone())?;
        let bitmap = must(&op, &answer)?.bitmap.as_ref().context("no bitmap")?;
        Ok(to_iova(bitmap.runs(), iova))
    }

    /// Compares the contents of all memory that is or was mapped.
    pub fn check_memory(&self) -> Result<()> {
        self.expected.regions.check()
    }

    /// Compares how many pins each device has, how many more mappings there may be and, if asked to,
    /// how much memory is locked, and how many pages are pinned.
    pub fn check_counters(&self) -> Result<()> {
        for (i, device) in self.kernel.open_devices() {
            same(&format!("PINS of device {i}"), self.expected.pins(i), device.pins()?)?;
        }
        if self.contract().model.groups().len() == 0 {
            return Ok(());
        }
        let avail = self.container().info()?.dma_avail;
        let avail = avail.context("no VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL")?;
        let model = &self.contract().model;
        same("dma_avail", model.dma_avail().into(), avail.into())?;
        if let Some(Besides { locked, pinned }) = self.besides {
            same("VmLck", locked + model.locked_pages() * PAGE, locked_memory()?)?;
            same("the number of pages pinned", pinned + model.pages_held(), pages_pinned()?)?;
        }
        Ok(())
    }
}

/// The kernel's limit on mappings of a container.
fn dma_entry_limit() -> Result<u32> {
    let limit = fs::read_to_string(DMA_ENTRY_LIMIT).context(DMA_ENTRY_LIMIT)?;
    limit.trim().parse().context(DMA_ENTRY_LIMIT)
}

/// Those that a device has.
fn limits(device: &MdevDma) -> Result<Limits> {
    let mdev_dma::DeviceLimits { max_pins, max_length, raw_pins } = device.limits()?;
    let raw_pages = raw_pins.then_some(RAW_PAGES);
    Ok(Limits { raw_pages, ..limits_of(max_pins, max_length) })
}

/// Fails unless `op` succeeded.
pub fn must<'a>(op: &Op, answer: &'a Answer) -> Result<&'a Answer> {
    match answer.status {
        Ok(()) => Ok(answer),
        Err(errno) => Err(Failure::new(format!("{op}: {errno}, but it must succeed")).into()),
    }
}

/// Fails unless a number is what it must be.
pub fn same(what: &str, expected: u64, found: u64) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Failure::new(format!("{what} is {found:#x}, not {expected:#x}")).into())
}

fn compare(op: &Op, expected: &Answer<Errnos>, answer: &Answer) -> Result<()> {
    if let (Some(expected), Some(reported)) = (&expected.bitmap, &answer.bitmap) {
        let iova = op.range().map_or(0, |(iova, _)| iova);
        let runs = |runs| as_runs(to_iova(runs, iova));
        let difference = expected.diff(reported);
        if !difference.is_empty() {
            return Err(Failure(Difference {
                what: format!("{op}: the bitmap is wrong"),
                lost: runs(difference.lost),
                spurious: runs(difference.spurious),
                at: None,
            })
            .into());
        }
    }
    if !expected.allows(answer) {
        return Err(Failure::new(format!("{op}: {answer}, but must be: {expected}")).into());
    }
    Ok(())
}

/// Runs of pages of a bitmap whose first page is at `iova`, in bytes.
pub fn to_iova(runs: Vec<Range<u64>>, iova: u64) -> Vec<Range<u64>> {
    let at = |page: u64| iova.saturating_add(page * PAGE);
    runs.into_iter().map(|run| at(run.start)..at(run.end)).collect()
}

/// The same as an event has it.
pub(crate) fn as_runs(runs: Vec<Range<u64>>) -> Runs {
    runs.into_iter().map(|run| (run.start, run.end)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dirty_model::{Bitmap, Errno};

    fn bitmap(pages: u64, set: &[Range<u64>]) -> Option<Bitmap> {
        let mut bitmap = Bitmap::new(pages);
        set.iter().for_each(|run| bitmap.set(run.clone()));
        Some(bitmap)
    }

    #[test]
    fn any_difference_is_one() {
        let op = Op::get_bitmap(0x4000, 4 * PAGE);
        let owed =
            Answer { count: 1, digest: 2, bitmap: bitmap(4, &[0..1, 2..3]), ..Answer::of(Ok(())) };
        let found = Answer { status: Ok(()), bitmap: owed.bitmap.clone(), count: 1, digest: 2 };
        compare(&op, &owed, &found).unwrap();
        let wrong = |found: &Answer| compare(&op, &owed, found).unwrap_err();
        for found in [
            Answer { count: 0, ..found.clone() },
            Answer { digest: 0, ..found.clone() },
            Answer { bitmap: None, ..found.clone() },
            Answer { status: Err(Errno::EINVAL), ..found.clone() },
        ] {
            assert!(wrong(&found).to_string().contains("but must be: ok"), "{found}");
        }
        let error = wrong(&Answer { bitmap: bitmap(4, &[0..1, 3..4]), ..found });
        let Failure(difference) = error.downcast().unwrap();
        assert!(difference.what.contains("the bitmap is wrong"));
        assert_eq!(
            (difference.lost, difference.spurious),
            (vec![(0x6000, 0x7000)], vec![(0x7000, 0x8000)])
        );
    }

    #[test]
    fn what_must_be_is_told_from_what_is() {
        same("it", 7, 7).unwrap();
        assert_eq!(same("it", 7, 16).unwrap_err().to_string(), "it is 0x10, not 0x7");
        let op = Op::Start;
        must(&op, &Answer::of(Ok(()))).unwrap();
        let error = must(&op, &Answer::of(Err(Errno::EBUSY))).unwrap_err().to_string();
        assert!(error.contains("START: EBUSY"), "{error}");
    }

    #[test]
    fn runs_up_to_the_end_of_the_address_space() {
        assert_eq!(to_iova(vec![0..1, 3..5], 0x1000), [0x1000..0x2000, 0x4000..0x6000]);
        assert_eq!(to_iova(vec![0..1], PAGE.wrapping_neg()), [PAGE.wrapping_neg()..u64::MAX]);
        assert_eq!(as_runs(vec![1..2]), [(1, 2)]);
    }
}
