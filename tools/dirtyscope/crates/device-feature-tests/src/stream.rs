// SPDX-License-Identifier: GPL-2.0-only

//! Migration data, changed so that its checksums are right.

use mdev_dma::{pattern, uapi};

/// Where the DEVICE section has its field number `n` behind the registers: see the header.
pub(crate) fn field(n: usize) -> usize {
    48 + 32 + 256 + uapi::RUST_MDEV_DMA_REG_GEN_COUNTER as usize + 8 + 8 * n
}

/// The bytes of a number of 64 bits.
pub(crate) fn quad(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

pub(crate) fn long(value: u32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

/// A stream of IDENTITY and DEVICE with other bytes `at` an offset, and checksums that are right.
pub(crate) fn changed(stream: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut changed = stream.to_vec();
    changed[at..at + bytes.len()].copy_from_slice(bytes);
    for section in [0..48, 48..stream.len()] {
        let section = &mut changed[section];
        let summed = [&section[..24], &section[32..]].concat();
        let checksum = pattern::digest(&summed, 0);
        section[24..32].copy_from_slice(&checksum.to_le_bytes());
    }
    changed
}

/// A stream of IDENTITY and DEVICE of a device without pins, with so many pins: one page each, `step` bytes
/// from each other.
pub(crate) fn with_pins(stream: &[u8], first: u64, step: u64, pins: u64) -> Vec<u8> {
    const LENGTH: usize = 48 + 16;
    let mut all = stream.to_vec();
    for iova in (0..pins).map(|n| first + n * step) {
        all.extend([quad(iova), long(1), long(1)].concat());
    }
    let length = (all.len() - 48 - 32) as u64;
    all[LENGTH..LENGTH + 8].copy_from_slice(&quad(length));
    changed(&all, field(13), &quad(pins))
}
