// SPDX-License-Identifier: GPL-2.0-only

use super::{Answer, Failure, Op, expected::Expected, kernel::Kernel, regions::new_memory};
use crate::scenarios::Context;
use anyhow::{Context as _, Result, ensure};
use dirty_model::{Limits, Protection};
use mdev_dma::{MdevDma, uapi};
use std::{fs, ops::Range, sync::Arc};
use vfio_client::Container;

/// Bytes of a page: what devices and type1 count in.
pub const PAGE: u64 = uapi::RUST_MDEV_DMA_PATTERN_BLOCK as u64;

/// The largest span of IOVA that is read as one range, in bytes.
const SPAN_MAX: u64 = 1 << 32;

/// Where the kernel has the limit on mappings of a container.
const DMA_ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// A container with devices and memory in the kernel, and what is expected of it.
pub struct Testbed<'a> {
    context: &'a Context<'a>,
    kernel: Kernel,
    expected: Expected,
}

impl<'a> Testbed<'a> {
    /// A container with the first of the context's devices, which is open. Nothing is mapped.
    pub fn new(context: &'a Context<'a>) -> Result<Self> {
        Self::on(context, 0)
    }

    /// As [`Self::new`], with another of the context's devices.
    pub fn on(context: &'a Context<'a>, device: usize) -> Result<Self> {
        let kernel = Kernel::new(context.device(device)?)?;
        let limit = fs::read_to_string(DMA_ENTRY_LIMIT).context(DMA_ENTRY_LIMIT)?;
        let expected = Expected::new(limit.trim().parse().context(DMA_ENTRY_LIMIT)?);
        let mut this = Self { context, kernel, expected };
        this.apply(Op::Open { device: 0 })?;
        Ok(this)
    }

    /// Puts the context's second device into the container, and opens it as device 1.
    pub fn add_device(&mut self) -> Result<()> {
        let device = self.kernel.attach(self.context.device(1)?)?;
        self.apply(Op::Open { device }).map(drop)
    }

    /// The container, for calls that are no [`Op`].
    pub fn container(&self) -> &Arc<Container> {
        &self.kernel.container
    }

    /// An open device, for accesses that are no [`Op`].
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

    /// Writes to mapped memory as the process itself does.
    pub fn user_write(&mut self, iova: u64, bytes: &[u8]) {
        self.context.note(format!("the user writes {iova:#x}+{:#x}", bytes.len()));
        self.expected.regions.user_write(iova, bytes);
    }

    /// Does `op` in the kernel and in the model. Fails if the answers differ.
    pub fn apply(&mut self, op: Op) -> Result<Answer> {
        self.context.note(op.to_string());
        let answer = match op {
            Op::Map { iova, size, protection } => self.map_new(iova, size, size, protection)?,
            Op::MapPart { iova, size, backed } => {
                self.map_new(iova, size, backed, Protection::READ_WRITE)?
            }
            _ => self.kernel.apply(&op)?,
        };
        if let Op::Open { device } = op {
            self.expected.open(device, limits(self.kernel.device(device)));
        }
        self.context.add_note(format!(" -> {answer}"));
        compare(&op, &self.expected.apply(&op), &answer)?;
        Ok(answer)
    }

    /// Maps new memory of `backed` bytes and, up to `size`, nothing.
    fn map_new(
        &mut self,
        iova: u64,
        size: u64,
        backed: u64,
        protection: Protection,
    ) -> Result<Answer> {
        let memory = new_memory(iova, size, backed)?;
        let answer = self.kernel.map(&memory, iova, size, protection)?;
        if answer.status.is_ok() {
            self.expected.regions.map(iova, memory);
        }
        Ok(answer)
    }

    /// Compares everything that can be asked for: dirty pages if they are being tracked (which
    /// forgets them), memory, counters.
    pub fn check(&mut self) -> Result<()> {
        if self.expected.model.tracking() {
            self.read_whole()?;
            self.read_each()?;
        }
        self.check_memory()?;
        self.check_counters()
    }

    /// Reads the bitmap of all mappings as one range, holes and all. Returns what is dirty, in bytes
    /// of IOVA.
    pub fn read_whole(&mut self) -> Result<Vec<Range<u64>>> {
        let mut mappings = self.expected.model.mappings();
        let Some((iova, size)) = mappings.next() else { return Ok(Vec::new()) };
        let (last, last_size) = mappings.last().unwrap_or((iova, size));
        let span = last - iova + last_size;
        ensure!(span <= SPAN_MAX, "mappings too far apart to read them as one range");
        self.read(iova, span)
    }

    /// Reads the bitmap of each mapping by itself. Returns as [`Self::read_whole`] does.
    pub fn read_each(&mut self) -> Result<Vec<Range<u64>>> {
        let mappings: Vec<_> = self.expected.model.mappings().collect();
        let mut dirty = Vec::new();
        for (iova, size) in mappings {
            dirty.extend(self.read(iova, size)?);
        }
        Ok(dirty)
    }

    /// Reads the bitmap of a range, which must succeed.
    fn read(&mut self, iova: u64, size: u64) -> Result<Vec<Range<u64>>> {
        let op = Op::GetBitmap { iova, size };
        let answer = self.apply(op.clone())?;
        let bitmap = must(&op, &answer)?.bitmap.as_ref().context("no bitmap")?;
        Ok(to_iova(bitmap.runs(), iova))
    }

    /// Compares the contents of all memory that is or was mapped.
    pub fn check_memory(&self) -> Result<()> {
        self.expected.regions.check()
    }

    /// Compares how many pins each device has, and how many more mappings there may be.
    pub fn check_counters(&self) -> Result<()> {
        for (i, device) in self.kernel.open_devices() {
            same(&format!("PINS of device {i}"), self.expected.pins(i), device.pins()?)?;
        }
        let avail = self.container().info()?.dma_avail;
        let avail = avail.context("no VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL")?;
        same("dma_avail", self.expected.model.dma_avail().into(), avail.into())
    }
}

fn limits(device: &MdevDma) -> Limits {
    let mdev_dma::Limits { max_pins, max_length } = device.limits();
    Limits {
        max_pins,
        page_pins: uapi::RUST_MDEV_DMA_PAGE_PINS,
        max_length,
        pin_batch: u64::from(uapi::RUST_MDEV_DMA_PIN_BATCH) * PAGE,
        dma_chunk: u64::from(uapi::RUST_MDEV_DMA_DMA_CHUNK),
    }
}

/// Fails unless `op` succeeded.
pub fn must<'a>(op: &Op, answer: &'a Answer) -> Result<&'a Answer> {
    match answer.status {
        Ok(()) => Ok(answer),
        Err(errno) => {
            let what = format!("{op}: {errno}, but the scenario says it succeeds");
            Err(Failure { what, ..Default::default() }.into())
        }
    }
}

/// Fails unless a number is what it must be.
pub fn same(what: &str, expected: u64, found: u64) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let what = format!("{what} is {found:#x}, not {expected:#x}");
    Err(Failure { what, ..Default::default() }.into())
}

fn compare(op: &Op, expected: &Answer, answer: &Answer) -> Result<()> {
    if let (Some(expected), Some(reported)) = (&expected.bitmap, &answer.bitmap) {
        let iova = match op {
            Op::GetBitmap { iova, .. } | Op::UnmapDirty { iova, .. } => *iova,
            _ => 0,
        };
        let difference = expected.diff(reported);
        if !difference.is_empty() {
            return Err(Failure {
                what: format!("{op}: the bitmap is wrong"),
                lost: to_iova(difference.lost, iova),
                spurious: to_iova(difference.spurious, iova),
            }
            .into());
        }
    }
    if expected != answer {
        let what = format!("{op}: {answer}, but must be: {expected}");
        return Err(Failure { what, ..Default::default() }.into());
    }
    Ok(())
}

/// Runs of pages of a bitmap whose first page is at `iova`, in bytes.
pub fn to_iova(runs: Vec<Range<u64>>, iova: u64) -> Vec<Range<u64>> {
    runs.into_iter().map(|run| iova + run.start * PAGE..iova + run.end * PAGE).collect()
}
