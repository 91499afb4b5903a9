// SPDX-License-Identifier: GPL-2.0-only

//! The devices that a container may have: each slot stands for one.
//!
//! ```text
//! slot  device                                 driver          group
//! 0, 1  mediated devices                       rust_mdev_dma   one each, emulated
//! 2, 3  edu                                    vfio-pci        one each
//! 4, 5  two edu behind a bridge                vfio-pci        one for both
//! 6, 7  those of 2 and 3                       rust_vfio_edu   as 2 and 3
//! 8     that of 4, while 5 stays what it is    rust_vfio_edu   as 4
//! ```

use anyhow::{Result, bail};
use edu_client::Function;
use harness::Context;
use vfio_client::DeviceNode;

/// Mediated devices.
pub const EMULATED: [usize; 2] = [0, 1];
/// PCI functions of a group each, whose DMA nobody accounts for.
pub const EDU: [usize; 2] = [2, 3];
/// Two of them that share a group.
pub const PAIR: [usize; 2] = [4, 5];
/// The PCI functions of [`EDU`] with a driver that pins what they write.
pub const PINNING: [usize; 2] = [6, 7];
/// The first PCI function of [`PAIR`] with such a driver.
pub const PINNING_PAIR: usize = 8;
/// How many there are.
pub const SLOTS: usize = 9;

/// Whose DMA nobody accounts for.
const VFIO_PCI: &str = "vfio-pci";
/// Whose is accounted for by pins.
const RUST_VFIO_EDU: &str = "rust_vfio_edu";

/// What a slot's device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// Commands, by the CPU.
    Emulated,
    /// DMA as userspace likes.
    Edu,
    /// Commands, by DMA of pages that its driver pins.
    Pinning,
}

/// What the device in a slot does, if there is such a slot.
pub fn kind(slot: usize) -> Option<SlotKind> {
    match slot {
        0 | 1 => Some(SlotKind::Emulated),
        2..=5 => Some(SlotKind::Edu),
        6..=8 => Some(SlotKind::Pinning),
        _ => None,
    }
}

/// The group of the device in a slot, by a number of ours.
pub fn group(slot: usize) -> u32 {
    match slot {
        5 | 8 => 4,
        6 | 7 => slot as u32 - 4,
        _ => slot as u32,
    }
}

/// The slots whose devices are there after the group of `slot` has joined as this slot has it.
pub fn members(slot: usize) -> Vec<usize> {
    match slot {
        4 | 5 => PAIR.to_vec(),
        8 => vec![8, 5],
        _ => vec![slot],
    }
}

/// Whether there is the driver that slots 6 to 8 need.
pub fn can_promote() -> bool {
    std::path::Path::new("/sys/bus/pci/drivers").join(RUST_VFIO_EDU).exists()
}

/// What VFIO calls the devices of [`members`], which are bound to their drivers.
pub(crate) fn bind(context: &Context<'_>, slot: usize) -> Result<Vec<(usize, DeviceNode)>> {
    if kind(slot) == Some(SlotKind::Emulated) {
        return Ok(vec![(slot, context.device(slot)?.node()?)]);
    }
    let bound = members(slot).into_iter().map(|member| {
        let function = function(context, member)?;
        let driver = if kind(member) == Some(SlotKind::Pinning) { RUST_VFIO_EDU } else { VFIO_PCI };
        function.bind(driver)?;
        Ok((member, function.node()?))
    });
    bound.collect()
}

/// The PCI function in a slot.
pub(crate) fn function(context: &Context<'_>, slot: usize) -> Result<Function> {
    let edus = context.edus()?;
    Ok(match slot {
        2 | 6 => edus.singles[0].clone(),
        3 | 7 => edus.singles[1].clone(),
        4 | 8 => edus.pair[0].clone(),
        5 => edus.pair[1].clone(),
        _ => bail!("slot {slot} has no PCI function"),
    })
}
