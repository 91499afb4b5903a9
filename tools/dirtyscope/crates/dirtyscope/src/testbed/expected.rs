// SPDX-License-Identifier: GPL-2.0-only

use super::{Answer, Op, PAGE, regions::Regions};
use dirty_model::{
    Bitmap, BitmapBuffer, Command, Container as Model, DeviceId, Errno, Limits, Mapping, Protection,
};
use mdev_dma::{Op as Device, pattern, uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND};
use std::collections::BTreeMap;

/// What is expected of the kernel: the model, and what must be in memory.
pub struct Expected {
    pub model: Model,
    pub regions: Regions,
    devices: BTreeMap<usize, DeviceId>,
    falsified: Option<u64>,
}

impl Expected {
    /// Of a container without devices and mappings.
    pub fn new(dma_entry_limit: u32) -> Self {
        Self {
            model: Model::new(PAGE, dma_entry_limit),
            regions: Regions::default(),
            devices: BTreeMap::new(),
            falsified: None,
        }
    }

    /// See [`super::Testbed::falsify`].
    pub fn falsify(&mut self, iova: u64) {
        self.falsified = Some(iova);
    }

    /// The pins of the device that is open in a slot.
    pub fn pins(&self, slot: usize) -> u64 {
        self.model.pins(self.devices[&slot])
    }

    /// A device was opened.
    pub fn open(&mut self, slot: usize, limits: Limits) {
        self.devices.insert(slot, self.model.open(limits));
    }

    /// What `op` must answer. Opening isn't told of here, and mapping not to `regions`.
    pub fn apply(&mut self, op: &Op) -> Answer {
        match *op {
            Op::Map { iova, size, protection } => {
                // Where the memory is doesn't matter, as long as it is at a page.
                let mapping = Mapping { iova, vaddr: PAGE, size, protection };
                Answer::of(self.model.map(&mapping))
            }
            Op::MapPart { iova, size, backed } => {
                let protection = Protection::READ_WRITE;
                let mapping = Mapping { iova, vaddr: PAGE, size, protection };
                Answer::of(self.model.map_backed(&mapping, backed))
            }
            Op::Unmap { iova, size } => {
                let unmapped = self.model.unmap(iova, size);
                self.unmapped(iova, size, unmapped.map(|count| (count, None)))
            }
            Op::UnmapAll => {
                let count = self.model.unmap_all();
                self.unmapped(0, u64::MAX, Ok((count, None)))
            }
            Op::UnmapDirty { iova, size } => {
                let buffer = BitmapBuffer::covering(size, PAGE);
                let unmapped = self.model.unmap_dirty(iova, size, &buffer);
                self.unmapped(iova, size, unmapped.map(|(count, bitmap)| (count, Some(bitmap))))
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
            Op::Open { .. } => Answer::of(Ok(())),
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
            Op::Command { device, op, iova, length, seed } => {
                let op = Device::from_number(op & !BACKGROUND);
                self.command(self.devices[&device], op, iova, length, seed)
            }
        }
    }

    fn unmapped(
        &mut self,
        iova: u64,
        size: u64,
        unmapped: Result<(u64, Option<Bitmap>), Errno>,
    ) -> Answer {
        match unmapped {
            Ok((count, bitmap)) => {
                self.regions.unmap(iova, size);
                let bitmap = bitmap.map(|bitmap| self.falsified(bitmap, iova));
                Answer { count, bitmap, ..Answer::of(Ok(())) }
            }
            Err(errno) => Answer::of(Err(errno)),
        }
    }

    fn command(
        &mut self,
        id: DeviceId,
        op: Option<Device>,
        iova: u64,
        length: u64,
        seed: u64,
    ) -> Answer {
        let command = Command { op: op.map(to_model), iova, length };
        let outcome = self.model.command(id, &command);
        let transferred = iova..iova.saturating_add(outcome.transferred);
        let mut digest = 0;
        match op {
            Some(Device::Write | Device::DmaWrite) => self.regions.write(transferred, seed),
            Some(Device::Read | Device::DmaRead) if outcome.status.is_ok() => {
                digest = pattern::digest(&self.regions.read(transferred), iova);
            }
            _ => {}
        }
        Answer { count: outcome.count, digest, ..Answer::of(outcome.status) }
    }

    fn falsified(&self, mut bitmap: Bitmap, iova: u64) -> Bitmap {
        let page = self.falsified.and_then(|at| at.checked_sub(iova)).map(|at| at / PAGE);
        if let Some(page) = page.filter(|&page| page < bitmap.pages()) {
            bitmap.flip(page);
        }
        bitmap
    }
}

fn to_model(op: Device) -> dirty_model::Op {
    match op {
        Device::Pin => dirty_model::Op::Pin,
        Device::Unpin => dirty_model::Op::Unpin,
        Device::Write => dirty_model::Op::Write,
        Device::Read => dirty_model::Op::Read,
        Device::DmaWrite => dirty_model::Op::DmaWrite,
        Device::DmaRead => dirty_model::Op::DmaRead,
    }
}
