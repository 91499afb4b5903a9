// SPDX-License-Identifier: GPL-2.0-only

use super::{Answer, Failure, Op};
use crate::scenarios::Context;
use anyhow::{Context as _, Result, ensure};
use dirty_model::{
    Bitmap, BitmapBuffer, Command, Container as Model, DeviceId, Errno, Limits, Mapping, Protection,
};
use mdev_dma::{MdevDma, pattern, sysfs::Mdev, uapi};
use std::{fs, ops::Range, sync::Arc};
use vfio_client::{
    BitmapArgs, Container, Error, Group, MapArgs, Memory, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL},
};

/// Bytes of a page: what devices and type1 count in.
pub const PAGE: u64 = uapi::RUST_MDEV_DMA_PATTERN_BLOCK as u64;

/// The largest span of IOVA that is read as one range, in bytes.
const SPAN_MAX: u64 = 1 << 32;

/// The seed of what memory is filled with before devices see it.
const BACKGROUND: u64 = u64::MAX;

/// Where the kernel has the limit on mappings of a container.
const DMA_ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// A container with devices and memory in the kernel, and the model of it.
pub struct Testbed<'a> {
    context: &'a Context<'a>,
    // Devices are closed before the container.
    slots: Vec<Slot>,
    container: Arc<Container>,
    model: Model,
    regions: Vec<Region>,
    falsified: Option<u64>,
}

/// A device that may be open.
struct Slot {
    mdev: Mdev,
    open: Option<(MdevDma, DeviceId)>,
}

/// Memory that is mapped, or was: devices must not change it then.
struct Region {
    iova: u64,
    mapped: bool,
    memory: Arc<Memory>,
    /// What must be in it.
    shadow: Vec<u8>,
}

impl<'a> Testbed<'a> {
    /// A container with the first of the context's devices, which is open. Nothing is mapped.
    pub fn new(context: &'a Context<'a>) -> Result<Self> {
        Self::on(context, 0)
    }

    /// As [`Self::new`], with another of the context's devices.
    pub fn on(context: &'a Context<'a>, device: usize) -> Result<Self> {
        let mdev = context.device(device)?;
        let container = Container::new(Group::open(&mdev.node()?)?)?;
        let limit = fs::read_to_string(DMA_ENTRY_LIMIT).context(DMA_ENTRY_LIMIT)?;
        let mut this = Self {
            context,
            slots: vec![Slot { mdev, open: None }],
            container,
            model: Model::new(PAGE, limit.trim().parse()?),
            regions: Vec::new(),
            falsified: None,
        };
        this.apply(Op::Open { device: 0 })?;
        Ok(this)
    }

    /// Puts the next of the context's devices into the container, and opens it.
    pub fn add_device(&mut self) -> Result<()> {
        let device = self.slots.len();
        let mdev = self.context.device(device)?;
        self.container.attach(Group::open(&mdev.node()?)?)?;
        self.slots.push(Slot { mdev, open: None });
        self.apply(Op::Open { device }).map(drop)
    }

    /// The container, for calls that are no [`Op`].
    pub fn container(&self) -> &Arc<Container> {
        &self.container
    }

    /// An open device, for accesses that are no [`Op`].
    pub fn device(&self, device: usize) -> &MdevDma {
        &self.opened(device).0
    }

    fn opened(&self, device: usize) -> &(MdevDma, DeviceId) {
        self.slots[device].open.as_ref().expect("the device is open")
    }

    /// From now on, the page at `iova` is expected dirty where it is clean, and clean where it is
    /// dirty: to see whether that is noticed.
    pub fn falsify(&mut self, iova: u64) {
        self.falsified = Some(iova);
    }

    /// As [`Self::falsify`], for the byte at `iova`.
    pub fn falsify_memory(&mut self, iova: u64) {
        let (region, at, _) = find(&mut self.regions, iova, 1).expect("a mapped byte");
        region.shadow[at] ^= 1;
    }

    /// Writes to mapped memory as the process itself does.
    pub fn user_write(&mut self, iova: u64, bytes: &[u8]) {
        self.context.note(format!("the user writes {iova:#x}+{:#x}", bytes.len()));
        let (region, at, len) =
            find(&mut self.regions, iova, bytes.len() as u64).expect("mapped bytes");
        region.memory.write(at, &bytes[..len]);
        region.shadow[at..at + len].copy_from_slice(&bytes[..len]);
    }

    /// Does `op` in the kernel and in the model. Fails if the answers differ.
    pub fn apply(&mut self, op: Op) -> Result<Answer> {
        self.context.note(op.to_string());
        let answer = self.kernel(&op)?;
        self.context.add_note(format!(" -> {answer}"));
        let expected = self.expect(&op);
        compare(&op, &expected, &answer)?;
        Ok(answer)
    }

    /// Compares everything that can be asked for: dirty pages if they are being tracked (which
    /// forgets them), memory, counters.
    pub fn check(&mut self) -> Result<()> {
        if self.model.tracking() {
            self.read_whole()?;
            self.read_each()?;
        }
        self.check_memory()?;
        self.check_counters()
    }

    /// Reads the bitmap of all mappings as one range, holes and all. Returns what is dirty, in bytes
    /// of IOVA.
    pub fn read_whole(&mut self) -> Result<Vec<Range<u64>>> {
        let mut mappings = self.model.mappings();
        let Some((iova, size)) = mappings.next() else { return Ok(Vec::new()) };
        let (last, last_size) = mappings.last().unwrap_or((iova, size));
        let span = last - iova + last_size;
        ensure!(span <= SPAN_MAX, "mappings too far apart to read them as one range");
        self.read(iova, span)
    }

    /// Reads the bitmap of each mapping by itself. Returns as [`Self::read_whole`] does.
    pub fn read_each(&mut self) -> Result<Vec<Range<u64>>> {
        let mappings: Vec<_> = self.model.mappings().collect();
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
        let mut buffer = vec![0; 1 << 16];
        for region in &self.regions {
            for (i, expected) in region.shadow.chunks(buffer.len()).enumerate() {
                let offset = i * buffer.len();
                let found = &mut buffer[..expected.len()];
                region.memory.read(offset, found);
                if found == expected {
                    continue;
                }
                if let Some(at) = expected.iter().zip(&*found).position(|(e, f)| e != f) {
                    let iova = region.iova + (offset + at) as u64;
                    let what = format!(
                        "memory: byte at {iova:#x} is {:#04x}, not {:#04x}",
                        found[at], expected[at]
                    );
                    return Err(Failure { what, ..Default::default() }.into());
                }
            }
        }
        Ok(())
    }

    /// Compares how many pins each device has, and how many more mappings there may be.
    pub fn check_counters(&self) -> Result<()> {
        for (i, slot) in self.slots.iter().enumerate() {
            if let Some((device, id)) = &slot.open {
                same(&format!("PINS of device {i}"), self.model.pins(*id), device.pins()?)?;
            }
        }
        let avail =
            self.container.info()?.dma_avail.context("no VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL")?;
        same("dma_avail", self.model.dma_avail().into(), avail.into())
    }

    /// Does `op` in the kernel.
    fn kernel(&mut self, op: &Op) -> Result<Answer> {
        match *op {
            Op::Map { iova, size, protection } => self.map_new(iova, size, protection),
            Op::Unmap { iova, size } => {
                let args = UnmapArgs { iova, size, ..Default::default() };
                self.unmapped(iova, size, |container| container.unmap(&args).map(|n| (n, None)))
            }
            Op::UnmapAll => {
                let args = UnmapArgs { flags: VFIO_DMA_UNMAP_FLAG_ALL, ..Default::default() };
                self.unmapped(0, u64::MAX, |container| container.unmap(&args).map(|n| (n, None)))
            }
            Op::UnmapDirty { iova, size } => {
                let args = UnmapArgs { iova, size, ..Default::default() };
                let buffer = BitmapBuffer::covering(size, PAGE);
                let buffer = BitmapArgs { pgsize: buffer.pgsize, size: buffer.size };
                self.unmapped(iova, size, |container| {
                    let (n, words) = container.unmap_dirty(&args, &buffer)?;
                    Ok((n, Some(Bitmap::from_words(words, size / PAGE))))
                })
            }
            Op::Start => status(self.container.dirty_start()).map(Answer::of),
            Op::Stop => status(self.container.dirty_stop()).map(Answer::of),
            Op::GetBitmap { iova, size } => {
                let buffer = BitmapBuffer::covering(size, PAGE);
                let buffer = BitmapArgs { pgsize: buffer.pgsize, size: buffer.size };
                let words = status(self.container.dirty_bitmap(iova, size, &buffer))?;
                let bitmap = words.map(|words| Bitmap::from_words(words, size / PAGE));
                let (status, bitmap) = (bitmap.as_ref().map(drop).map_err(|&e| e), bitmap.ok());
                Ok(Answer { bitmap, ..Answer::of(status) })
            }
            Op::Open { device } => {
                let slot = &mut self.slots[device];
                let opened = MdevDma::open(&self.container, &slot.mdev.node()?)?;
                let id = self.model.open(limits(&opened));
                slot.open = Some((opened, id));
                Ok(Answer::of(Ok(())))
            }
            Op::Close { device } => {
                if let Some((_closed, id)) = self.slots[device].open.take() {
                    self.model.close(id);
                }
                Ok(Answer::of(Ok(())))
            }
            Op::Reset { device } => status(self.device(device).device().reset()).map(Answer::of),
            Op::Command { device, op, iova, length, seed } => {
                let outcome = self.device(device).run(op, iova, length, seed)?;
                let status = match outcome.status {
                    0 => Ok(()),
                    errno => Err(Errno(errno as i32)),
                };
                let mdev_dma::Outcome { count, digest, .. } = outcome;
                Ok(Answer { status, count, digest, bitmap: None })
            }
        }
    }

    fn map_new(&mut self, iova: u64, size: u64, protection: Protection) -> Result<Answer> {
        let memory = Arc::new(Memory::new(size.max(1).next_multiple_of(PAGE) as usize)?);
        let mut shadow = vec![0; memory.len()];
        pattern::fill(&mut shadow, BACKGROUND, iova);
        memory.write(0, &shadow);

        let mut flags = 0;
        for (set, flag) in
            [(protection.read, VFIO_DMA_MAP_FLAG_READ), (protection.write, VFIO_DMA_MAP_FLAG_WRITE)]
        {
            flags |= if set { flag } else { 0 };
        }
        let args = MapArgs { memory: &memory, offset: 0, iova, size, flags, argsz: None };
        let status = status(self.container.map(&args))?;
        if status.is_ok() {
            self.regions.push(Region { iova, mapped: true, memory, shadow });
        }
        Ok(Answer::of(status))
    }

    /// Unmaps by `f`, which returns how many bytes were unmapped, and a bitmap.
    fn unmapped(
        &mut self,
        iova: u64,
        size: u64,
        f: impl FnOnce(&Container) -> Result<(u64, Option<Bitmap>), Error>,
    ) -> Result<Answer> {
        Ok(match status(f(&self.container))? {
            Ok((count, bitmap)) => {
                for region in &mut self.regions {
                    region.mapped &= region.iova < iova || region.iova - iova >= size;
                }
                Answer { count, bitmap, ..Answer::of(Ok(())) }
            }
            Err(errno) => Answer::of(Err(errno)),
        })
    }

    /// Does `op` in the model and in the shadow of memory. Opening and closing was done.
    fn expect(&mut self, op: &Op) -> Answer {
        match *op {
            Op::Map { iova, size, protection } => {
                // Memory is at whole pages of the process.
                let mapping = Mapping { iova, vaddr: PAGE, size, protection };
                Answer::of(self.model.map(&mapping))
            }
            Op::Unmap { iova, size } => match self.model.unmap(iova, size) {
                Ok(count) => Answer { count, ..Answer::of(Ok(())) },
                Err(errno) => Answer::of(Err(errno)),
            },
            Op::UnmapAll => Answer { count: self.model.unmap_all(), ..Answer::of(Ok(())) },
            Op::UnmapDirty { iova, size } => {
                let buffer = BitmapBuffer::covering(size, PAGE);
                match self.model.unmap_dirty(iova, size, &buffer) {
                    Ok((count, bitmap)) => {
                        let bitmap = Some(self.falsified(bitmap, iova));
                        Answer { count, bitmap, ..Answer::of(Ok(())) }
                    }
                    Err(errno) => Answer::of(Err(errno)),
                }
            }
            Op::Start => Answer::of(self.model.start()),
            Op::Stop => {
                self.model.stop();
                Answer::of(Ok(()))
            }
            Op::GetBitmap { iova, size } => {
                let buffer = BitmapBuffer::covering(size, PAGE);
                match self.model.get_bitmap(iova, size, &buffer) {
                    Ok(bitmap) => {
                        let bitmap = Some(self.falsified(bitmap, iova));
                        Answer { bitmap, ..Answer::of(Ok(())) }
                    }
                    Err(errno) => Answer::of(Err(errno)),
                }
            }
            Op::Open { .. } | Op::Close { .. } => Answer::of(Ok(())),
            Op::Reset { device } => {
                let id = self.opened(device).1;
                self.model.reset(id);
                Answer::of(Ok(()))
            }
            Op::Command { device, op, iova, length, seed } => {
                self.expect_command(device, op, iova, length, seed)
            }
        }
    }

    fn expect_command(
        &mut self,
        slot: usize,
        op: u32,
        iova: u64,
        length: u64,
        seed: u64,
    ) -> Answer {
        use mdev_dma::Op as Device;

        let number = op;
        let op = Device::from_number(number).map(|op| match op {
            Device::Pin => dirty_model::Op::Pin,
            Device::Unpin => dirty_model::Op::Unpin,
            Device::Write => dirty_model::Op::Write,
            Device::Read => dirty_model::Op::Read,
            Device::DmaWrite => dirty_model::Op::DmaWrite,
            Device::DmaRead => dirty_model::Op::DmaRead,
        });
        let id = self.opened(slot).1;
        let outcome = self.model.command(id, &Command { op, iova, length });

        let touched = iova..iova.saturating_add(outcome.transferred);
        let mut digest = 0;
        match Device::from_number(number) {
            Some(Device::Write | Device::DmaWrite) => self.write_shadow(touched, seed),
            Some(Device::Read | Device::DmaRead) if outcome.status.is_ok() => {
                digest = pattern::digest(&self.read_shadow(touched), iova);
            }
            _ => {}
        }
        Answer { status: outcome.status, count: outcome.count, digest, bitmap: None }
    }

    fn write_shadow(&mut self, range: Range<u64>, seed: u64) {
        let mut iova = range.start;
        while let Some((region, at, len)) = find(&mut self.regions, iova, range.end - iova) {
            pattern::fill(&mut region.shadow[at..at + len], seed, iova);
            iova += len as u64;
        }
    }

    fn read_shadow(&mut self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut iova = range.start;
        while let Some((region, at, len)) = find(&mut self.regions, iova, range.end - iova) {
            bytes.extend_from_slice(&region.shadow[at..at + len]);
            iova += len as u64;
        }
        bytes
    }

    fn falsified(&self, mut bitmap: Bitmap, iova: u64) -> Bitmap {
        if let Some(page) = self.falsified.and_then(|at| at.checked_sub(iova)) {
            if page / PAGE < bitmap.pages() {
                bitmap.flip(page / PAGE);
            }
        }
        bitmap
    }
}

/// The mapped memory that `iova` lies in, where, and how many of `len` bytes are in it; if any.
fn find(regions: &mut [Region], iova: u64, len: u64) -> Option<(&mut Region, usize, usize)> {
    let inside = |region: &Region| {
        let at = iova.checked_sub(region.iova)?;
        (region.mapped && at < region.shadow.len() as u64).then_some(at as usize)
    };
    regions.iter_mut().filter(|_| len > 0).find_map(|region| {
        let at = inside(region)?;
        let len = len.min((region.shadow.len() - at) as u64) as usize;
        Some((region, at, len))
    })
}

fn limits(device: &MdevDma) -> Limits {
    let mdev_dma::Limits { max_pins, max_length } = device.limits();
    Limits {
        max_pins,
        max_length,
        pin_batch: u64::from(uapi::RUST_MDEV_DMA_PIN_BATCH) * PAGE,
        dma_chunk: u64::from(uapi::RUST_MDEV_DMA_DMA_CHUNK),
    }
}

/// Tells the errno that a call answered from an error of the tool.
pub fn status<T>(result: Result<T, Error>) -> Result<Result<T, Errno>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error) if error.errno() != 0 => Ok(Err(Errno(error.errno()))),
        Err(error) => Err(error.into()),
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
