// SPDX-License-Identifier: GPL-2.0-only

use crate::{Answer, Buffer, BufferMemory, Op, PAGE, regions::BORDER};
use anyhow::{Result, bail};
use dirty_model::{Bitmap, Errno};
use harness::Failure;
use mdev_dma::{MdevDma, sysfs::Mdev, uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND};
use std::{sync::Arc, time::Duration};
use vfio_client::{
    Access, BitmapArgs, Container, DeviceNode, Error, Group, MapArgs, Memory, UnmapArgs,
};

/// A command that takes longer is stuck.
const LONG: Duration = Duration::from_secs(20);

/// The kernel's side: a container, and slots for devices that may be open in it.
pub struct LiveContainer {
    // Devices are closed before the container.
    slots: Vec<Slot>,
    pub container: Arc<Container>,
}

struct Slot {
    mdev: Mdev,
    /// Its group.
    group: u32,
    device: Option<MdevDma>,
}

impl Slot {
    fn new(mdev: Mdev, node: &DeviceNode) -> Self {
        Self { mdev, group: node.group(), device: None }
    }
}

impl LiveContainer {
    /// A container with the group of a device, which isn't open yet.
    pub fn new(mdev: Mdev) -> Result<Self> {
        let node = mdev.node()?;
        let container = Container::new(Group::open(&node)?)?;
        Ok(Self { slots: vec![Slot::new(mdev, &node)], container })
    }

    /// Puts the group of another device into the container. Returns its slot.
    pub fn attach(&mut self, mdev: Mdev) -> Result<usize> {
        let node = mdev.node()?;
        self.container.attach(Group::open(&node)?)?;
        self.slots.push(Slot::new(mdev, &node));
        Ok(self.slots.len() - 1)
    }

    /// The group of the device in a slot, if there is one.
    pub fn group(&self, slot: usize) -> Option<u32> {
        self.slots.get(slot).map(|slot| slot.group)
    }

    /// The device that is open in a slot.
    pub fn device(&self, slot: usize) -> &MdevDma {
        self.slots[slot].device.as_ref().expect("the device is open")
    }

    /// The slots with open devices.
    pub fn open_devices(&self) -> impl Iterator<Item = (usize, &MdevDma)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(i, slot)| Some((i, slot.device.as_ref()?)))
    }

    /// Does `op`. Fails only if there is no answer to speak of.
    pub fn apply(&mut self, op: &Op) -> Result<Answer> {
        match *op {
            Op::Map { .. } => bail!("needs memory: see LiveContainer::map"),
            Op::Unmap { iova, size, flags } => {
                self.unmap(&UnmapArgs { iova, size, flags, argsz: None })
            }
            Op::UnmapBitmap { iova, size, buffer } => self.unmap_bitmap(iova, size, &buffer),
            Op::Start => status(self.container.dirty_start()).map(Answer::of),
            Op::Stop => status(self.container.dirty_stop()).map(Answer::of),
            Op::DirtyPages { flags } => status(self.container.dirty(flags, None)).map(Answer::of),
            Op::GetBitmap { iova, size, buffer } => self.get_bitmap(iova, size, &buffer),
            // The process's own business.
            Op::Hide { .. } | Op::Show { .. } | Op::UserWrite { .. } | Op::Check => {
                Ok(Answer::of(Ok(())))
            }
            Op::Open { device } => {
                let slot = &mut self.slots[device];
                slot.device = Some(MdevDma::open(&self.container, &slot.mdev.node()?)?);
                Ok(Answer::of(Ok(())))
            }
            Op::Close { device } => {
                self.slots[device].device = None;
                Ok(Answer::of(Ok(())))
            }
            Op::Reset { device } => status(self.device(device).device().reset()).map(Answer::of),
            Op::Command { device, op, iova, length, seed } => {
                let mut outcome = self.device(device).run(op, iova, length, seed)?;
                if op & BACKGROUND != 0 {
                    outcome = self.device(device).wait(LONG)?;
                }
                let status = match outcome.status {
                    0 => Ok(()),
                    errno => Err(Errno(errno as i32)),
                };
                let mdev_dma::Outcome { count, digest, .. } = outcome;
                Ok(Answer { count, digest, ..Answer::of(status) })
            }
        }
    }

    /// Maps `memory` behind its border; it is at least as large.
    pub fn map(&self, memory: &Arc<Memory>, iova: u64, size: u64, flags: u32) -> Result<Answer> {
        let args = MapArgs { memory, offset: BORDER, iova, size, flags, argsz: None };
        status(self.container.map(&args)).map(Answer::of)
    }

    fn unmap(&self, args: &UnmapArgs) -> Result<Answer> {
        Ok(match status(self.container.unmap(args))? {
            Ok(count) => Answer { count, ..Answer::of(Ok(())) },
            Err(errno) => Answer::of(Err(errno)),
        })
    }

    fn unmap_bitmap(&self, iova: u64, size: u64, buffer: &Buffer) -> Result<Answer> {
        let unmap = UnmapArgs { iova, size, ..Default::default() };
        let args = &buffer.args();
        let unmapped = match buffer.memory(size)? {
            None => self.container.unmap_dirty(&unmap, args),
            Some((memory, at)) => self
                .container
                .unmap_dirty_into(&unmap, args, &memory, at)
                .map(|bytes| (bytes, words(&memory, at, size))),
        };
        with_bitmap(status(unmapped)?, size)
    }

    fn get_bitmap(&self, iova: u64, size: u64, buffer: &Buffer) -> Result<Answer> {
        let args = &buffer.args();
        let read = match buffer.memory(size)? {
            None => self.container.dirty_bitmap(iova, size, args),
            Some((memory, at)) => self
                .container
                .dirty_bitmap_into(iova, size, args, &memory, at)
                .map(|()| words(&memory, at, size)),
        };
        with_bitmap(status(read)?.map(|words| (0, words)), size)
    }
}

impl Buffer {
    fn args(&self) -> BitmapArgs {
        BitmapArgs { pgsize: self.pgsize, size: self.size }
    }

    /// Memory for the bitmap of `size` bytes of IOVA, and where in it the bitmap begins, if this isn't
    /// a buffer like any other.
    fn memory(&self, size: u64) -> Result<Option<(Memory, usize)>> {
        let pages = |bytes: u64| bytes.next_multiple_of(PAGE) as usize;
        let bytes = pages(Container::bitmap_bytes(size, &self.args()).max(1));
        Ok(match self.memory {
            BufferMemory::Whole => None,
            BufferMemory::ReadOnly => {
                let memory = Memory::new(bytes)?;
                memory.set_access(0..bytes, Access::Read)?;
                Some((memory, 0))
            }
            BufferMemory::Ends(writable) => {
                let len = pages(writable.max(1));
                Some((Memory::with_guard(len, bytes)?, len - writable as usize))
            }
        })
    }
}

/// The words of the bitmap of `size` bytes of IOVA that `memory` has; those it hasn't are 0.
fn words(memory: &Memory, at: usize, size: u64) -> Vec<u64> {
    let mut words = vec![0; (size / PAGE).div_ceil(64) as usize];
    for (at, word) in (at..memory.len()).step_by(8).zip(&mut words) {
        let mut bytes = [0; 8];
        memory.read(at, &mut bytes);
        *word = u64::from_ne_bytes(bytes);
    }
    words
}

/// Words behind a bitmap that are looked at, whether they were left alone: a buffer may be large.
const BEHIND: usize = 512;

/// An answer with the bitmap of `size` bytes of IOVA.
fn with_bitmap(result: Result<(u64, Vec<u64>), Errno>, size: u64) -> Result<Answer> {
    let (count, mut words) = match result {
        Ok(done) => done,
        Err(errno) => return Ok(Answer::of(Err(errno))),
    };
    let pages = size / PAGE;
    let len = pages.div_ceil(64) as usize;
    if words[len..].iter().take(BEHIND).any(|&word| word != 0) {
        return Err(
            Failure::new(format!("a bitmap of {pages} pages goes on behind its end")).into()
        );
    }
    words.truncate(len);
    let bitmap = Some(Bitmap::from_words(words, pages));
    Ok(Answer { count, bitmap, ..Answer::of(Ok(())) })
}

/// Tells the errno that a call answered from an error of the tool.
pub fn status<T>(result: Result<T, Error>) -> Result<Result<T, Errno>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error) if error.errno() != 0 => Ok(Err(Errno(error.errno()))),
        Err(error) => Err(error.into()),
    }
}
