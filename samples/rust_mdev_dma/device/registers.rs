// SPDX-License-Identifier: GPL-2.0

//! The registers of BAR 0: see the uapi header.

use super::engine::{Command, Engine, Limits, Outcome};
use crate::bindings::{
    RUST_MDEV_DMA_BAR_SIZE, RUST_MDEV_DMA_MAGIC, RUST_MDEV_DMA_REG_COMMAND as COMMAND,
    RUST_MDEV_DMA_REG_COUNT as COUNT, RUST_MDEV_DMA_REG_DIGEST as DIGEST,
    RUST_MDEV_DMA_REG_IOVA as IOVA, RUST_MDEV_DMA_REG_LENGTH as LENGTH,
    RUST_MDEV_DMA_REG_MAGIC as MAGIC, RUST_MDEV_DMA_REG_MAX_LENGTH as MAX_LENGTH,
    RUST_MDEV_DMA_REG_MAX_PINS as MAX_PINS, RUST_MDEV_DMA_REG_OPS as OPS,
    RUST_MDEV_DMA_REG_PAGE_SIZE as REG_PAGE_SIZE, RUST_MDEV_DMA_REG_PINS as PINS,
    RUST_MDEV_DMA_REG_SEED as SEED, RUST_MDEV_DMA_REG_STATUS as STATUS,
    RUST_MDEV_DMA_REG_VERSION as VERSION, RUST_MDEV_DMA_VERSION,
};
use core::ops::Range;
use kernel::{page::PAGE_SIZE, prelude::*};

/// Bytes of the BAR.
pub(super) const BAR_SIZE: usize = RUST_MDEV_DMA_BAR_SIZE as usize;

/// Bytes up to the end of the last register; the rest of the BAR reads as 0.
const FILE_SIZE: usize = DIGEST as usize + size_of::<u64>();

/// The bytes that can be written: IOVA, LENGTH, SEED, COMMAND.
const WRITABLE: Range<usize> = IOVA as usize..STATUS as usize;

/// The registers' contents, as the bus sees them.
pub(super) struct Registers {
    file: [u8; FILE_SIZE],
}

impl Registers {
    pub(super) fn new(limits: Limits) -> Self {
        let mut this = Self {
            file: [0; FILE_SIZE],
        };
        this.set(MAGIC, RUST_MDEV_DMA_MAGIC.to_le_bytes());
        this.set(VERSION, RUST_MDEV_DMA_VERSION.to_le_bytes());
        this.set(OPS, Engine::OPS.to_le_bytes());
        this.set(REG_PAGE_SIZE, (PAGE_SIZE as u32).to_le_bytes());
        this.set(MAX_PINS, limits.pins.to_le_bytes());
        this.set(MAX_LENGTH, limits.length.to_le_bytes());
        this
    }

    fn set<const N: usize>(&mut self, register: u32, value: [u8; N]) {
        self.file[register as usize..][..N].copy_from_slice(&value);
    }

    fn get<const N: usize>(&self, register: u32) -> [u8; N] {
        let mut value = [0; N];
        value.copy_from_slice(&self.file[register as usize..][..N]);
        value
    }

    /// Whether an access touches the register with the number of pins.
    pub(super) fn shows_pins(offset: usize, len: usize) -> bool {
        let pins = PINS as usize..PINS as usize + size_of::<u64>();
        offset < pins.end && pins.start < offset + len
    }

    /// Puts the number of pins into its register.
    pub(super) fn set_pins(&mut self, pins: u64) {
        self.set(PINS, pins.to_le_bytes());
    }

    /// Reads the bytes at `offset` of the BAR.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = self.file.get(offset + i).copied().unwrap_or(0);
        }
    }

    /// Writes the bytes at `offset` of the BAR, as far as they are writable. Returns the command if
    /// this runs one.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) -> Option<Command> {
        for (at, &byte) in (offset..).zip(bytes) {
            if WRITABLE.contains(&at) {
                self.file[at] = byte;
            }
        }

        let touched = offset..offset + bytes.len();
        touched.contains(&(COMMAND as usize)).then(|| Command {
            op: u32::from_le_bytes(self.get(COMMAND)),
            iova: u64::from_le_bytes(self.get(IOVA)),
            length: u64::from_le_bytes(self.get(LENGTH)),
            seed: u64::from_le_bytes(self.get(SEED)),
        })
    }

    /// Shows how a command ended.
    pub(super) fn complete(&mut self, outcome: &Outcome) {
        self.set(STATUS, outcome.status.to_le_bytes());
        self.set(COUNT, outcome.count.to_le_bytes());
        self.set(DIGEST, outcome.digest.to_le_bytes());
    }
}
