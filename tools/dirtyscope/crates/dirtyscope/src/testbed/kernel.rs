// SPDX-License-Identifier: GPL-2.0-only

use super::{Answer, Op, PAGE};
use anyhow::{Result, bail};
use dirty_model::{Bitmap, BitmapBuffer, Errno, Protection};
use mdev_dma::{MdevDma, sysfs::Mdev, uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND};
use std::{sync::Arc, time::Duration};
use vfio_client::{
    BitmapArgs, Container, Error, Group, MapArgs, Memory, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL},
};

/// A command that takes longer is stuck.
const LONG: Duration = Duration::from_secs(20);

/// The kernel's side: a container, and slots for devices that may be open in it.
pub struct Kernel {
    // Devices are closed before the container.
    slots: Vec<Slot>,
    pub container: Arc<Container>,
}

struct Slot {
    mdev: Mdev,
    device: Option<MdevDma>,
}

impl Kernel {
    /// A container with the group of a device, which isn't open yet.
    pub fn new(mdev: Mdev) -> Result<Self> {
        let container = Container::new(Group::open(&mdev.node()?)?)?;
        Ok(Self { slots: vec![Slot { mdev, device: None }], container })
    }

    /// Puts the group of another device into the container. Returns its slot.
    pub fn attach(&mut self, mdev: Mdev) -> Result<usize> {
        self.container.attach(Group::open(&mdev.node()?)?)?;
        self.slots.push(Slot { mdev, device: None });
        Ok(self.slots.len() - 1)
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
            Op::Map { .. } | Op::MapPart { .. } => bail!("needs memory: see Kernel::map"),
            Op::Unmap { iova, size } => self.unmap(&UnmapArgs { iova, size, ..Default::default() }),
            Op::UnmapAll => {
                self.unmap(&UnmapArgs { flags: VFIO_DMA_UNMAP_FLAG_ALL, ..Default::default() })
            }
            Op::UnmapDirty { iova, size } => self.unmap_dirty(iova, size),
            Op::Start => status(self.container.dirty_start()).map(Answer::of),
            Op::Stop => status(self.container.dirty_stop()).map(Answer::of),
            Op::GetBitmap { iova, size } => self.get_bitmap(iova, size),
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

    /// Maps `memory`, which is at least as large.
    pub fn map(
        &self,
        memory: &Arc<Memory>,
        iova: u64,
        size: u64,
        protection: Protection,
    ) -> Result<Answer> {
        let mut flags = 0;
        if protection.read {
            flags |= VFIO_DMA_MAP_FLAG_READ;
        }
        if protection.write {
            flags |= VFIO_DMA_MAP_FLAG_WRITE;
        }
        let args = MapArgs { memory, offset: 0, iova, size, flags, argsz: None };
        status(self.container.map(&args)).map(Answer::of)
    }

    fn unmap(&self, args: &UnmapArgs) -> Result<Answer> {
        Ok(match status(self.container.unmap(args))? {
            Ok(count) => Answer { count, ..Answer::of(Ok(())) },
            Err(errno) => Answer::of(Err(errno)),
        })
    }

    fn unmap_dirty(&self, iova: u64, size: u64) -> Result<Answer> {
        let args = UnmapArgs { iova, size, ..Default::default() };
        Ok(match status(self.container.unmap_dirty(&args, &buffer_for(size)))? {
            Ok((count, words)) => {
                let bitmap = Some(Bitmap::from_words(words, size / PAGE));
                Answer { count, bitmap, ..Answer::of(Ok(())) }
            }
            Err(errno) => Answer::of(Err(errno)),
        })
    }

    fn get_bitmap(&self, iova: u64, size: u64) -> Result<Answer> {
        Ok(match status(self.container.dirty_bitmap(iova, size, &buffer_for(size)))? {
            Ok(words) => {
                let bitmap = Some(Bitmap::from_words(words, size / PAGE));
                Answer { bitmap, ..Answer::of(Ok(())) }
            }
            Err(errno) => Answer::of(Err(errno)),
        })
    }
}

/// The smallest buffer for the bitmap of so many bytes of IOVA.
fn buffer_for(size: u64) -> BitmapArgs {
    let BitmapBuffer { pgsize, size } = BitmapBuffer::covering(size, PAGE);
    BitmapArgs { pgsize, size }
}

/// Tells the errno that a call answered from an error of the tool.
pub fn status<T>(result: Result<T, Error>) -> Result<Result<T, Errno>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error) if error.errno() != 0 => Ok(Err(Errno(error.errno()))),
        Err(error) => Err(error.into()),
    }
}
