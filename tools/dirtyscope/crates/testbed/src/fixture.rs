// SPDX-License-Identifier: GPL-2.0-only

//! A device and memory without the model: for what changes memory while nobody asks for it.

use crate::{
    PAGE, at, same, status,
    testbed::{as_runs, to_iova},
};
use anyhow::{Context as _, Result, bail, ensure};
use dirty_model::{Bitmap, BitmapBuffer, Errno};
use events::Difference;
use harness::{Context, Failure, Skip};
use mdev_dma::{Contents, GeneratorConfig, GeneratorStatus, MdevDma, Outcome, sysfs::Mdev};
use std::{
    fs::File,
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use vfio_client::{
    BitmapArgs, Container, DeviceNode, Group, Leave, MapArgs, Memory, UnmapArgs, Unserved,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

/// What takes longer is broken.
pub const LONG: Duration = Duration::from_secs(20);

/// A container with a device and, from page 0 on, zeroed memory.
pub struct Fixture {
    // Closed in this order.
    device: Option<MdevDma>,
    node: DeviceNode,
    pub container: Arc<Container>,
    pub memory: Arc<Memory>,
}

impl Fixture {
    /// With so many pages, which are mapped.
    pub fn new(context: &Context<'_>, pages: u64) -> Result<Self> {
        let this = Self::without_mapping(context, 0, pages)?;
        this.map(0..pages)?;
        Ok(this)
    }

    /// With the context's `device`th device, and so many pages.
    pub fn without_mapping(context: &Context<'_>, device: usize, pages: u64) -> Result<Self> {
        Self::on(context.device(device)?, pages)
    }

    /// With a device, and so many pages.
    pub fn on(mdev: Mdev, pages: u64) -> Result<Self> {
        Self::with_memory(mdev, Memory::new((pages * PAGE) as usize)?)
    }

    /// With the first device, and so many pages that the process has accessed, none of which is part of a huge page.
    pub fn with_small_pages(context: &Context<'_>, pages: u64) -> Result<Self> {
        let size = (pages * PAGE) as usize;
        let memory = Memory::with_guard(size, size)?;
        memory.write(0, &vec![1; size]);
        Self::with_memory(context.device(0)?, memory)
    }

    /// With a device, and this memory.
    pub fn with_memory(mdev: Mdev, memory: Memory) -> Result<Self> {
        let node = mdev.node()?;
        let container = Container::new(Group::open(&node)?)?;
        Self::in_container(container, node, memory)
    }

    /// As [`Self::new`], by the group as well, but in an address space of iommufd. Skips the scenario if the
    /// kernel has none.
    pub fn by_iommufd(context: &Context<'_>, pages: u64) -> Result<Self> {
        let node = context.device(0)?.node()?;
        let container = has_iommufd(status(Container::by_iommufd(Group::open(&node)?))?)?;
        let this = Self::in_container(container, node, Memory::new((pages * PAGE) as usize)?)?;
        this.map(0..pages)?;
        Ok(this)
    }

    fn in_container(container: Arc<Container>, node: DeviceNode, memory: Memory) -> Result<Self> {
        let device = Some(MdevDma::open(&container, &node)?);
        Ok(Self { device, node, container, memory: Arc::new(memory) })
    }

    /// The device, which is open.
    pub fn device(&self) -> &MdevDma {
        self.device.as_ref().expect("the device is open")
    }

    /// Closes the device.
    pub fn close(&mut self) {
        self.device = None;
    }

    /// Opens it again.
    pub fn open(&mut self) -> Result<()> {
        self.device = Some(MdevDma::open(&self.container, &self.node)?);
        Ok(())
    }

    /// Takes the group, whose device is open, out of its container, closes its file, and opens it again.
    /// Returns `None` if either is refused.
    pub fn reopen_group(&self, by: Leave) -> Result<Option<Group>> {
        let left = status(self.container.detach(self.node.group(), by))?;
        let reopened = match left {
            Ok(()) => status(Group::open(&self.node))?,
            Err(errno) => Err(errno),
        };
        match reopened {
            Ok(group) => Ok(Some(group)),
            Err(Errno::EBUSY) => Ok(None),
            Err(errno) => bail!("the group, opened again: {errno}"),
        }
    }

    /// Has who accesses the last page, to which nobody has come yet, wait: see [`Memory::unserved`].
    pub fn unserved_last_page(&self) -> Result<Unserved> {
        let end = self.memory.len();
        Ok(self.memory.unserved_in(end - PAGE as usize..end)?)
    }

    /// Maps `pages` of the memory.
    pub fn map(&self, pages: Range<u64>) -> Result<()> {
        let first = pages.start;
        self.map_at(pages, first)
    }

    /// Maps `pages` of the memory from another page on.
    pub fn map_at(&self, pages: Range<u64>, page: u64) -> Result<()> {
        Ok(self.container.map(&self.mapping(pages, page))?)
    }

    /// How `pages` of the memory are mapped from a page on.
    pub fn mapping(&self, pages: Range<u64>, page: u64) -> MapArgs<'_> {
        MapArgs {
            memory: &self.memory,
            offset: (pages.start * PAGE) as usize,
            iova: at(page, 0),
            size: (pages.end - pages.start) * PAGE,
            flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            argsz: None,
        }
    }

    /// Unmaps `pages`.
    pub fn unmap(&self, pages: Range<u64>) -> Result<()> {
        let size = (pages.end - pages.start) * PAGE;
        let args = UnmapArgs { iova: at(pages.start, 0), size, ..Default::default() };
        same("bytes unmapped", size, self.container.unmap(&args)?)
    }

    /// How many pages of the memory are dirty for the kernel, which would write them to their file or to swap. Those of
    /// a file are from the first access on.
    pub fn dirty_for_the_kernel(&self) -> Result<u64> {
        // See include/uapi/linux/kernel-page-flags.h.
        const KPF_DIRTY: u64 = 1 << 4;
        const WHAT: &str = "/proc/kpageflags";
        let frames = self.memory.frames(0..self.memory.len());
        let flags = File::open(WHAT).context(WHAT)?;
        let mut dirty = 0;
        for frame in frames.context("/proc/self/pagemap says nothing")? {
            let mut entry = [0; 8];
            flags.read_exact_at(&mut entry, frame * 8).context(WHAT)?;
            dirty += u64::from(u64::from_ne_bytes(entry) & KPF_DIRTY != 0);
        }
        Ok(dirty)
    }

    /// Pins `pages`.
    pub fn pin(&self, pages: Range<u64>) -> Result<()> {
        let length = (pages.end - pages.start) * PAGE;
        succeeded("PIN", self.device().pin(at(pages.start, 0), length)?)
    }

    /// What is dirty of the first so many pages, which are a mapping.
    pub fn dirty(&self, pages: u64) -> Result<Bitmap> {
        self.dirty_of(&[0..pages], pages)
    }

    /// What is dirty of the first so many pages, of which these are mappings.
    pub fn dirty_of(&self, mappings: &[Range<u64>], pages: u64) -> Result<Bitmap> {
        let mut all = Bitmap::new(pages);
        for mapping in mappings {
            let count = mapping.end - mapping.start;
            let BitmapBuffer { pgsize, size, .. } = BitmapBuffer::covering(count * PAGE, PAGE);
            let args = BitmapArgs { pgsize, size };
            let iova = at(mapping.start, 0);
            let words = self.container.dirty_bitmap(iova, count * PAGE, &args)?;
            all.merge(&Bitmap::from_words(words, count), mapping.start);
        }
        Ok(all)
    }

    /// What is dirty of `pages`, which must be as `expected`: runs of pages.
    pub fn reports(&self, pages: Range<u64>, expected: &[Range<u64>]) -> Result<()> {
        let count = pages.end - pages.start;
        let BitmapBuffer { pgsize, size, .. } = BitmapBuffer::covering(count * PAGE, PAGE);
        let (iova, args) = (at(pages.start, 0), BitmapArgs { pgsize, size });
        let words = self.container.dirty_bitmap(iova, count * PAGE, &args)?;
        is_dirty(&pages, &Bitmap::from_words(words, count), expected)
    }

    /// Copies a page.
    pub fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE as usize];
        self.memory.read((page * PAGE) as usize, &mut bytes);
        bytes
    }

    /// Copies all pages.
    pub fn copy(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.len()];
        self.memory.read(0, &mut bytes);
        bytes
    }

    /// Waits for the generator to stop by itself.
    pub fn wait_for_generator(&self) -> Result<GeneratorStatus> {
        let begin = Instant::now();
        loop {
            let now = self.device().generator()?;
            if !now.is_running() {
                return Ok(now);
            }
            ensure!(begin.elapsed() < LONG, "the generator still runs: {now:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the generator has made so many writes more, and fails if it has stopped.
    pub fn wait_for_writes(&self, more: u64) -> Result<()> {
        let first = self.device().generator()?;
        let begin = Instant::now();
        loop {
            let now = self.device().generator()?;
            ensure!(now.is_running(), "the generator has stopped: {now:?}");
            if now.counter >= first.counter + more {
                return Ok(());
            }
            ensure!(begin.elapsed() < LONG, "the generator is at {now:?}, it was at {first:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Compares all memory with what it contains after `counter` writes of the generator; it
    /// was zero before.
    pub fn has_generated(&self, config: &GeneratorConfig, counter: u64) -> Result<()> {
        check_generated(&self.copy(), config, counter)
    }

    /// Fails if the device writes pages now.
    pub fn is_quiesced(&self) -> Result<()> {
        let before = self.first_words();
        thread::sleep(Duration::from_millis(30));
        ensure!(self.first_words() == before, "memory has changed, although nothing runs");
        Ok(())
    }

    /// The first word of each page, which no two writes of a page have in common.
    fn first_words(&self) -> Vec<[u8; 8]> {
        let mut words = vec![[0; 8]; self.memory.len() / PAGE as usize];
        for (page, word) in words.iter_mut().enumerate() {
            self.memory.read(page * PAGE as usize, word);
        }
        words
    }
}

/// What comes of opening `/dev/iommu`. Skips the scenario if the kernel doesn't have it.
pub(crate) fn has_iommufd<T>(opened: Result<T, Errno>) -> Result<T> {
    match opened {
        Err(Errno::ENOENT) => Err(Skip("this kernel has no /dev/iommu".into()).into()),
        opened => opened.map_err(|errno| anyhow::anyhow!("/dev/iommu: {errno}")),
    }
}

/// Fails unless somebody comes to wait for memory.
pub fn is_awaited(waits: &Unserved) -> Result<()> {
    ensure!(waits.is_awaited(LONG)?, "nothing waits for memory");
    Ok(())
}

/// Compares memory, which begins at page 0 and was zero, with what it contains after `counter` writes
/// of the generator.
pub fn check_generated(memory: &[u8], config: &GeneratorConfig, counter: u64) -> Result<()> {
    let mut contents = Contents::zeroed(at(0, 0), memory.len() as u64);
    contents.generated(0, config, 0..counter);
    let wrong = contents.wrong_pages(at(0, 0), memory);
    ensure!(wrong.is_empty(), "after {counter} writes, {wrong}");
    Ok(())
}

/// Fails unless of `pages` the bitmap says that these are dirty: runs of pages.
pub fn is_dirty(pages: &Range<u64>, found: &Bitmap, expected: &[Range<u64>]) -> Result<()> {
    let count = pages.end - pages.start;
    let mut bitmap = Bitmap::new(count);
    for run in expected {
        bitmap.set(run.start - pages.start..run.end - pages.start);
    }
    let difference = bitmap.diff(found);
    if difference.is_empty() {
        return Ok(());
    }
    let runs = |runs| as_runs(to_iova(runs, at(pages.start, 0)));
    Err(Failure(Difference {
        what: format!("pages {pages:?}: the bitmap is wrong"),
        lost: runs(difference.lost),
        spurious: runs(difference.spurious),
        at: None,
    })
    .into())
}

/// Fails unless a command failed so.
pub fn refused(what: &str, errno: Errno, outcome: Outcome) -> Result<()> {
    if outcome.status == errno.0 as u32 {
        return Ok(());
    }
    Err(Failure::new(format!("{what}: {outcome:?}, but must be {errno}")).into())
}

/// Fails unless a command succeeded.
pub fn succeeded(what: &str, outcome: Outcome) -> Result<()> {
    ensure!(outcome.status == 0, "{what}: {outcome:?}");
    Ok(())
}

/// Fails unless the generator has stopped so.
pub fn stopped_with(found: GeneratorStatus, status: i32, counter: u64) -> Result<()> {
    let expected = GeneratorStatus { status: status as u32, counter };
    (found == expected).then_some(()).with_context(|| format!("{found:?}, not {expected:?}"))
}
