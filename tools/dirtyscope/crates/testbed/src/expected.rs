// SPDX-License-Identifier: GPL-2.0-only

use crate::{
    Answer, Op, PAGE,
    contract::{Contract, Owed},
    operation,
    regions::Regions,
};
use anyhow::Result;
use dirty_model::Errnos;
use mdev_dma::{Opcode, pattern};
use vfio_client::uapi::VFIO_DMA_UNMAP_FLAG_VADDR;

/// What is expected of the kernel: what it owes, and what must be in memory.
pub struct Expected {
    pub contract: Contract,
    pub regions: Regions,
    falsified: Option<u64>,
}

impl Expected {
    /// Of a container without devices and mappings.
    pub fn new(contract: Contract) -> Self {
        Self { contract, regions: Regions::default(), falsified: None }
    }

    /// See [`super::Testbed::falsify`].
    pub fn falsify(&mut self, iova: u64) {
        self.falsified = Some(iova);
    }

    /// The pins of the device that is open in a slot.
    pub fn pins(&self, slot: usize) -> u64 {
        self.contract.device(slot).map_or(0, |device| self.contract.model.pins(device))
    }

    /// What `op` must answer. What it does to memory is done, but that new memory is mapped.
    pub fn apply(&mut self, op: &Op) -> Result<Answer<Errnos>> {
        let Owed { mut answer, transferred } = self.contract.apply(op);
        match *op {
            Op::Unmap { flags, .. } if flags & VFIO_DMA_UNMAP_FLAG_VADDR != 0 => {}
            Op::Unmap { iova, size, .. } | Op::UnmapBitmap { iova, size, .. }
                if answer.status.is_ok() =>
            {
                let all = iova == 0 && size == 0;
                self.regions.unmap(iova, if all { u64::MAX } else { size })?;
            }
            Op::Hide { iova, size } => self.regions.set_hidden(iova, size, true)?,
            Op::Show { iova, size } => self.regions.set_hidden(iova, size, false)?,
            Op::Copy { from, to, length, .. } => self.regions.copy(from, to, length),
            Op::Leave { .. } if self.contract.model.groups().len() == 0 => {
                self.regions.unmap(0, u64::MAX)?
            }
            Op::UserWrite { iova, length, seed } => self.regions.user_write(iova, length, seed),
            Op::Command { op, iova, seed, .. } => match operation(op) {
                Some(Opcode::Write | Opcode::DmaWrite | Opcode::RawWrite) => {
                    self.regions.write(transferred, seed);
                }
                Some(Opcode::Read | Opcode::DmaRead | Opcode::RawRead) if answer.status.is_ok() => {
                    answer.digest = pattern::digest(&self.regions.read(transferred), iova);
                }
                _ => {}
            },
            _ => {}
        }
        if let Op::GetBitmap { iova, .. } | Op::UnmapBitmap { iova, .. } = *op {
            self.falsify_answer(&mut answer, iova);
        }
        Ok(answer)
    }

    fn falsify_answer(&self, answer: &mut Answer<Errnos>, iova: u64) {
        let page = self.falsified.and_then(|at| at.checked_sub(iova)).map(|at| at / PAGE);
        if let (Some(page), Some(bitmap)) = (page, &mut answer.bitmap) {
            if page < bitmap.pages() {
                bitmap.flip(page);
            }
        }
    }
}
