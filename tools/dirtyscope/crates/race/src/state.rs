// SPDX-License-Identifier: GPL-2.0-only

//! What the kernel owes, as the model has it.

use crate::live::Counters;
use dirty_model::{
    Command, CommandKind, Container as Model, DeviceId, Errno, Errnos, GroupKind, Limits, Mapping,
    Protection,
};
use mdev_dma::{Opcode, PAGE};
use std::ops::Range;
use testbed::{Answer, Op, operation};

/// The model, and the devices of the threads.
#[derive(Clone, Debug, Hash)]
pub struct State {
    pub model: Model,
    limits: Limits,
    devices: Vec<Option<DeviceId>>,
}

impl State {
    /// With so many devices, all open, and a group that stays.
    pub fn new(devices: usize, dma_avail: u32, limits: Limits) -> Self {
        let mut model = Model::new(PAGE, dma_avail);
        let mut join = |group| model.join(group, GroupKind::Emulated);
        let joined = (0..=devices as u32).all(|group| join(group).is_ok());
        assert!(joined, "groups can join a container without mappings");
        let devices = (0..devices).map(|lane| Some(model.open(lane as u32, limits))).collect();
        Self { model, limits, devices }
    }

    /// What must come of an operation, whose device is open if it needs one.
    pub fn apply(&mut self, op: &Op) -> Answer<Errnos> {
        let done = |result: Result<(), Errnos>| Answer::of(result);
        match *op {
            Op::Map { iova, size, .. } => {
                let mapping =
                    Mapping { iova, vaddr: PAGE, size, protection: Protection::READ_WRITE };
                done(self.model.map(&mapping))
            }
            Op::Unmap { iova, size, .. } => match self.model.unmap(iova, size) {
                Ok(count) => Answer { count, ..Answer::of(Ok(())) },
                Err(errnos) => Answer::of(Err(errnos)),
            },
            Op::UnmapBitmap { iova, size, buffer } => {
                Answer::with_bitmap(self.model.unmap_dirty(iova, size, &buffer.to_model()))
            }
            Op::GetBitmap { iova, size, buffer } => {
                let bitmap = self.model.get_bitmap(iova, size, &buffer.to_model());
                Answer::with_bitmap(bitmap.map(|bitmap| (0, bitmap)))
            }
            Op::Start => done(self.model.start()),
            Op::Stop => {
                self.model.stop();
                done(Ok(()))
            }
            Op::Join { device } => done(self.model.join(device as u32, GroupKind::Emulated)),
            Op::Leave { device, .. } => {
                self.model.leave(device as u32);
                done(Ok(()))
            }
            Op::Open { device } => {
                self.devices[device] = Some(self.model.open(device as u32, self.limits));
                done(Ok(()))
            }
            Op::Close { device } => {
                if let Some(id) = self.devices[device].take() {
                    self.model.close(id);
                }
                done(Ok(()))
            }
            Op::Command { device, op, iova, length, .. } => {
                let Some(id) = self.devices[device] else { return done(Err(Errno::EINVAL.into())) };
                let kind = operation(op).and_then(to_kind);
                let outcome = self.model.command(id, &Command { kind, iova, length });
                Answer { count: outcome.count, ..Answer::of(outcome.status) }
            }
            _ => done(Ok(())),
        }
    }

    /// The open devices.
    pub fn devices(&self) -> impl Iterator<Item = (usize, DeviceId)> {
        self.devices.iter().enumerate().filter_map(|(lane, id)| Some((lane, (*id)?)))
    }

    /// The pages of a range that devices have pinned, each with the device.
    pub fn pins_in(&self, range: &Range<u64>) -> Vec<(DeviceId, u64)> {
        let of = |(_, id)| self.model.pinned(id).map(move |page| (id, page));
        self.devices().flat_map(of).filter(|(_, page)| range.contains(page)).collect()
    }

    /// Why these aren't the counters, if they aren't. `besides` is what the process has locked for itself.
    pub fn differs(&self, counters: &Counters, besides: u64) -> Option<String> {
        let pins = (0..self.devices.len()).map(|lane| Some(self.model.pins(self.devices[lane]?)));
        let locked = besides + self.model.locked_pages() * PAGE;
        let owed =
            Counters { pins: pins.collect(), dma_avail: self.model.dma_avail().into(), locked };
        let same = owed.pins == counters.pins
            && owed.dma_avail == counters.dma_avail
            && owed.locked == counters.locked;
        (!same).then(|| format!("{counters:x?} would be {owed:x?}"))
    }
}

fn to_kind(opcode: Opcode) -> Option<CommandKind> {
    Some(match opcode {
        Opcode::Pin => CommandKind::Pin,
        Opcode::Unpin => CommandKind::Unpin,
        Opcode::Write => CommandKind::Write,
        Opcode::Read => CommandKind::Read,
        Opcode::DmaWrite => CommandKind::DmaWrite,
        Opcode::DmaRead => CommandKind::DmaRead,
        _ => return None,
    })
}
