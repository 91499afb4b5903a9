// SPDX-License-Identifier: GPL-2.0

//! The registers of BAR 0: see the uapi header.

#![expect(
    clippy::indexing_slicing,
    reason = "`check_bar_access()` is what lets an access here, others are of constants"
)]

use super::command::{Command, Limits, Outcome};
use crate::bindings::{
    RUST_MDEV_DMA_BAR_SIZE, RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND, RUST_MDEV_DMA_MAGIC,
    RUST_MDEV_DMA_REG_COMMAND as COMMAND, RUST_MDEV_DMA_REG_COUNT as COUNT,
    RUST_MDEV_DMA_REG_DIGEST as DIGEST, RUST_MDEV_DMA_REG_GEN_CONTROL as GEN_CONTROL,
    RUST_MDEV_DMA_REG_GEN_COUNTER as GEN_COUNTER, RUST_MDEV_DMA_REG_GEN_IOVA as GEN_IOVA,
    RUST_MDEV_DMA_REG_GEN_LENGTH as GEN_LENGTH, RUST_MDEV_DMA_REG_GEN_LIMIT as GEN_LIMIT,
    RUST_MDEV_DMA_REG_GEN_MODE as GEN_MODE, RUST_MDEV_DMA_REG_GEN_RATE as GEN_RATE,
    RUST_MDEV_DMA_REG_GEN_SEED as GEN_SEED, RUST_MDEV_DMA_REG_GEN_STATUS as GEN_STATUS,
    RUST_MDEV_DMA_REG_IOVA as IOVA, RUST_MDEV_DMA_REG_IRQ_ENABLE as IRQ_ENABLE,
    RUST_MDEV_DMA_REG_IRQ_STATUS as IRQ_STATUS, RUST_MDEV_DMA_REG_LENGTH as LENGTH,
    RUST_MDEV_DMA_REG_MAGIC as MAGIC, RUST_MDEV_DMA_REG_MAX_LENGTH as MAX_LENGTH,
    RUST_MDEV_DMA_REG_MAX_PINS as MAX_PINS, RUST_MDEV_DMA_REG_OPS as OPS,
    RUST_MDEV_DMA_REG_PAGE_SIZE as REG_PAGE_SIZE, RUST_MDEV_DMA_REG_PINS as PINS,
    RUST_MDEV_DMA_REG_REFUSED as REFUSED, RUST_MDEV_DMA_REG_SEED as SEED,
    RUST_MDEV_DMA_REG_STATUS as STATUS, RUST_MDEV_DMA_REG_VERSION as VERSION,
    RUST_MDEV_DMA_VERSION,
};
use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    uaccess::{UserSliceReader, UserSliceWriter},
};

/// Size of the BAR.
pub(super) const BAR_SIZE: usize = RUST_MDEV_DMA_BAR_SIZE as usize;

/// Size of the longest access.
pub(super) const ACCESS: usize = size_of::<u64>();

/// Size of the BAR up to the end of the last register; the rest reads as 0.
pub(super) const FILE_SIZE: usize = GEN_COUNTER as usize + size_of::<u64>();

/// Registers that hold what is written to them: IOVA to COMMAND, IRQ_ENABLE, GEN_IOVA to
/// GEN_CONTROL.
const WRITABLE: [Range<usize>; 3] = [
    IOVA as usize..STATUS as usize,
    bytes_of(IRQ_ENABLE, size_of::<u32>()),
    GEN_IOVA as usize..GEN_STATUS as usize,
];

/// The end of IRQ_STATUS and IRQ_ENABLE.
const IRQ_END: usize = IRQ_ENABLE as usize + size_of::<u32>();

/// STATUS and GEN_STATUS while a command, or the generator, is in progress.
const IN_PROGRESS: u32 = kernel::bindings::EINPROGRESS;

const fn bytes_of(register: u32, size: usize) -> Range<usize> {
    let start = register as usize;
    start..start.saturating_add(size)
}

/// Parameters of the generator: the registers from GEN_IOVA to GEN_MODE.
#[derive(Clone, Copy, Default)]
pub(super) struct GeneratorParams {
    pub(super) iova: u64,
    pub(super) length: u64,
    pub(super) seed: u64,
    pub(super) limit: u64,
    pub(super) rate: u32,
    pub(super) mode: u32,
}

/// What the device must do after a write to its registers.
#[derive(Default)]
pub(super) struct Effects {
    /// Whether interrupts may have to be raised or lowered.
    pub(super) interrupts: bool,
    /// The command to run, and whether in the background.
    pub(super) command: Option<(Command, bool)>,
    /// The value of GEN_CONTROL, and the generator's parameters.
    pub(super) generator: Option<(u32, GeneratorParams)>,
}

/// Fails with `EINVAL` if an access to the BAR isn't valid.
pub(super) fn check_bar_access(offset: usize, len: usize) -> Result {
    let legal =
        matches!(len, 1 | 2 | 4 | 8) && offset & len.wrapping_sub(1) == 0 && offset < BAR_SIZE;
    legal.then_some(()).ok_or(EINVAL)
}

/// Copies a value of `buf.len()` bytes from the user: 1, 2, 4 or 8, else `EINVAL`. With a size that
/// the compiler knows, this takes fewer instructions than `read_slice()`.
pub(super) fn read_value(buf: &mut UserSliceReader) -> Result<u64> {
    Ok(match buf.len() {
        1 => buf.read::<u8>()?.into(),
        2 => u16::from_le(buf.read()?).into(),
        4 => u32::from_le(buf.read()?).into(),
        8 => u64::from_le(buf.read()?),
        _ => return Err(EINVAL),
    })
}

/// Copies the lowest `buf.len()` bytes of a value to the user: 1, 2, 4 or 8, else `EINVAL`.
pub(super) fn write_value(buf: &mut UserSliceWriter, value: u64) -> Result {
    match buf.len() {
        1 => buf.write(&(value as u8)),
        2 => buf.write(&(value as u16).to_le()),
        4 => buf.write(&(value as u32).to_le()),
        8 => buf.write(&value.to_le()),
        _ => Err(EINVAL),
    }
}

/// The contents of the registers, as on the bus: little endian.
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
        this.set(OPS, limits.ops.to_le_bytes());
        this.set(REG_PAGE_SIZE, (PAGE_SIZE as u32).to_le_bytes());
        this.set(MAX_PINS, limits.pins.to_le_bytes());
        this.set(MAX_LENGTH, limits.length.to_le_bytes());
        this
    }

    /// Registers restored from migration data. Identity and limits remain those of this device.
    ///
    /// Fails with `EINVAL` unless STATUS is `EINPROGRESS` if and only if a command is `queued`.
    pub(super) fn from_bytes(
        bytes: &[u8; FILE_SIZE],
        limits: Limits,
        queued: bool,
    ) -> Result<Self> {
        const REST: usize = IOVA as usize;

        let mut this = Self::new(limits);
        this.file[REST..].copy_from_slice(&bytes[REST..]);
        if (this.get_u32(STATUS) == IN_PROGRESS) != queued {
            return Err(EINVAL);
        }
        Ok(this)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.file
    }

    fn set<const N: usize>(&mut self, register: u32, value: [u8; N]) {
        self.file[bytes_of(register, N)].copy_from_slice(&value);
    }

    fn get<const N: usize>(&self, register: u32) -> [u8; N] {
        let mut value = [0; N];
        value.copy_from_slice(&self.file[bytes_of(register, N)]);
        value
    }

    fn get_u32(&self, register: u32) -> u32 {
        u32::from_le_bytes(self.get(register))
    }

    fn get_u64(&self, register: u32) -> u64 {
        u64::from_le_bytes(self.get(register))
    }

    /// Whether an access touches PINS.
    pub(super) fn touches_pins(offset: usize, len: usize) -> bool {
        let pins = bytes_of(PINS, size_of::<u64>());
        offset < pins.end && pins.start < offset.saturating_add(len)
    }

    /// Sets PINS.
    pub(super) fn set_pins(&mut self, pins: u64) {
        self.set(PINS, pins.to_le_bytes());
    }

    /// Reads the bytes at `offset` of the BAR, which a legal access has.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        const { assert!(FILE_SIZE % ACCESS == 0) };
        match self.file.get(offset..offset.saturating_add(bytes.len())) {
            Some(file) => bytes.copy_from_slice(file),
            // No aligned access has bytes on both sides of the end.
            None => bytes.fill(0),
        }
    }

    /// Writes the bytes at `offset` of the BAR that are writable. Returns what the device must do
    /// then.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) -> Effects {
        let touched = offset..offset.saturating_add(bytes.len());
        let writable = |at: &Range<usize>| {
            WRITABLE
                .iter()
                .any(|range| range.start <= at.start && at.end <= range.end)
        };
        let irq_status = bytes_of(IRQ_STATUS, size_of::<u32>());
        if writable(&touched) {
            self.file[touched.clone()].copy_from_slice(bytes);
        } else {
            for (at, &byte) in touched.clone().zip(bytes) {
                if writable(&(at..at.saturating_add(1))) {
                    self.file[at] = byte;
                } else if irq_status.contains(&at) {
                    self.file[at] &= !byte;
                }
            }
        }

        let has = |register: u32| touched.contains(&(register as usize));
        Effects {
            interrupts: touched.start < IRQ_END && touched.end > IRQ_STATUS as usize,
            command: has(COMMAND).then(|| self.command()),
            generator: has(GEN_CONTROL).then(|| (self.get_u32(GEN_CONTROL), self.params())),
        }
    }

    fn command(&self) -> (Command, bool) {
        let command = self.get_u32(COMMAND);
        (
            Command {
                op: command & !BACKGROUND,
                iova: self.get_u64(IOVA),
                length: self.get_u64(LENGTH),
                seed: self.get_u64(SEED),
            },
            command & BACKGROUND != 0,
        )
    }

    fn params(&self) -> GeneratorParams {
        GeneratorParams {
            iova: self.get_u64(GEN_IOVA),
            length: self.get_u64(GEN_LENGTH),
            seed: self.get_u64(GEN_SEED),
            limit: self.get_u64(GEN_LIMIT),
            rate: self.get_u32(GEN_RATE),
            mode: self.get_u32(GEN_MODE),
        }
    }

    /// Sets REFUSED.
    pub(super) fn set_refused(&mut self, refused: bool) {
        let errno = if refused { EBUSY.to_errno() } else { 0 };
        self.set(REFUSED, errno.unsigned_abs().to_le_bytes());
    }

    /// Sets STATUS, COUNT and DIGEST of a command in progress.
    pub(super) fn set_in_progress(&mut self) {
        self.complete(&Outcome {
            status: IN_PROGRESS,
            ..Default::default()
        });
    }

    /// Sets STATUS, COUNT and DIGEST of a completed command.
    pub(super) fn complete(&mut self, outcome: &Outcome) {
        self.set(STATUS, outcome.status.to_le_bytes());
        self.set(COUNT, outcome.count.to_le_bytes());
        self.set(DIGEST, outcome.digest.to_le_bytes());
    }

    /// Sets GEN_STATUS and GEN_COUNTER.
    pub(super) fn set_generator(&mut self, running: bool, status: u32, counter: u64) {
        let status = if running { IN_PROGRESS } else { status };
        self.set(GEN_STATUS, status.to_le_bytes());
        self.set(GEN_COUNTER, counter.to_le_bytes());
    }

    /// Sets a bit of IRQ_STATUS. Returns whether it is set in IRQ_ENABLE.
    pub(super) fn raise(&mut self, irq: u32) -> bool {
        let status = self.get_u32(IRQ_STATUS) | irq;
        self.set(IRQ_STATUS, status.to_le_bytes());
        self.get_u32(IRQ_ENABLE) & irq != 0
    }

    /// Whether a bit is set in both IRQ_STATUS and IRQ_ENABLE.
    pub(super) fn interrupt_pending(&self) -> bool {
        self.get_u32(IRQ_STATUS) & self.get_u32(IRQ_ENABLE) != 0
    }
}

#[cfg(kunit_suites)]
#[kunit_tests(rust_mdev_dma_registers)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        ops: 6,
        pins: 8,
        length: 9,
    };

    fn long(registers: &Registers, register: u32) -> u32 {
        let mut bytes = [0; 4];
        registers.read(register as usize, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn accesses_that_are_legal() {
        for len in [1, 2, 4, 8] {
            assert!(check_bar_access(BAR_SIZE - len, len).is_ok());
            assert!(check_bar_access(BAR_SIZE, len).is_err());
        }
        for (offset, len) in [(0, 0), (0, 3), (1, 2), (2, 4), (4, 8), (0, 16)] {
            assert!(check_bar_access(offset, len).is_err());
        }
    }

    #[test]
    fn a_command_is_what_was_written() {
        let mut registers = Registers::new(LIMITS);
        for (register, value) in [(IOVA, 1u64), (LENGTH, 2), (SEED, 3)] {
            let effects = registers.write(register as usize, &value.to_le_bytes());
            assert!(effects.command.is_none() && effects.generator.is_none());
        }
        let effects = registers.write(COMMAND as usize, &(5 | BACKGROUND).to_le_bytes());
        let Some((command, background)) = effects.command else {
            assert!(false);
            return;
        };
        assert!(background && !effects.interrupts);
        assert_eq!((command.op, command.iova), (5, 1));
        assert_eq!((command.length, command.seed), (2, 3));
    }

    #[test]
    fn read_only_registers_stay() {
        let mut registers = Registers::new(LIMITS);
        for register in [MAGIC, OPS, MAX_PINS, PINS, STATUS, REFUSED, GEN_STATUS] {
            let before = long(&registers, register);
            registers.write(register as usize, &[0xff; 4]);
            assert_eq!(long(&registers, register), before);
        }
        // One access, of what can be written and what can't.
        registers.write(GEN_CONTROL as usize, &[0xff; 8]);
        assert_eq!(long(&registers, GEN_CONTROL), u32::MAX);
        assert_eq!(long(&registers, GEN_STATUS), 0);
    }

    #[test]
    fn writing_1_clears_irq_status() {
        let mut registers = Registers::new(LIMITS);
        assert!(!registers.raise(1) && !registers.raise(2));
        assert!(!registers.interrupt_pending());
        assert!(
            registers
                .write(IRQ_ENABLE as usize, &[2, 0, 0, 0])
                .interrupts
        );
        assert!(registers.interrupt_pending() && registers.raise(2) && !registers.raise(1));
        assert!(registers.write(IRQ_STATUS as usize, &[2]).interrupts);
        assert_eq!(long(&registers, IRQ_STATUS), 1);
        assert!(!registers.interrupt_pending());
    }

    #[test]
    fn behind_the_last_register_is_0() {
        let mut registers = Registers::new(LIMITS);
        assert!(registers.write(FILE_SIZE, &[0xff; 8]).command.is_none());
        let mut bytes = [7; 8];
        registers.read(FILE_SIZE, &mut bytes);
        assert_eq!(bytes, [0; 8]);
        registers.read(BAR_SIZE - 8, &mut bytes);
        assert_eq!(bytes, [0; 8]);
    }

    #[test]
    fn what_is_restored() -> Result {
        let mut source = Registers::new(Limits { pins: 99, ..LIMITS });
        source.write(SEED as usize, &7u64.to_le_bytes());
        let restored = Registers::from_bytes(&source.file, LIMITS, false)?;
        assert_eq!(long(&restored, MAX_PINS), 8);
        assert_eq!(long(&restored, SEED), 7);
        assert!(Registers::from_bytes(&source.file, LIMITS, true).is_err());
        source.set_in_progress();
        assert!(Registers::from_bytes(&source.file, LIMITS, true).is_ok());
        assert!(Registers::from_bytes(&source.file, LIMITS, false).is_err());
        Ok(())
    }

    #[test]
    fn who_touches_pins() {
        let pins = PINS as usize;
        for (offset, len) in [(pins, 1), (pins, 8), (pins + 7, 1)] {
            assert!(Registers::touches_pins(offset, len));
        }
        assert!(!Registers::touches_pins(pins - 8, 8));
        assert!(!Registers::touches_pins(pins + 8, 8));
    }
}
