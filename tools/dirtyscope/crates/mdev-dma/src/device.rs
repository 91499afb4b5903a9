// SPDX-License-Identifier: GPL-2.0-only

use crate::{DeviceFile, Error, PAGE, RegisterAccess, Result, Width, sysfs::Mdev, uapi};
use rustix::io::Errno;
use std::{
    fmt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use vfio_client::{Container, Device, DeviceNode, Ioas};

/// The operations, with their numbers: `enum rust_mdev_dma_op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Opcode {
    /// Pins whole pages.
    Pin = uapi::RUST_MDEV_DMA_OP_PIN,
    /// Unpins each page once.
    Unpin = uapi::RUST_MDEV_DMA_OP_UNPIN,
    /// Writes the pattern through pinned pages.
    Write = uapi::RUST_MDEV_DMA_OP_WRITE,
    /// Reads through pinned pages.
    Read = uapi::RUST_MDEV_DMA_OP_READ,
    /// Writes the pattern by `vfio_dma_rw()`.
    DmaWrite = uapi::RUST_MDEV_DMA_OP_DMA_WRITE,
    /// Reads by `vfio_dma_rw()`.
    DmaRead = uapi::RUST_MDEV_DMA_OP_DMA_READ,
    /// Pins pages from any IOVA on, with the protection that is given as seed.
    RawPin = uapi::RUST_MDEV_DMA_OP_RAW_PIN,
    /// Unpins what one such pin took.
    RawUnpin = uapi::RUST_MDEV_DMA_OP_RAW_UNPIN,
    /// Writes the pattern through its pages, from its IOVA on.
    RawWrite = uapi::RUST_MDEV_DMA_OP_RAW_WRITE,
    /// Reads through them.
    RawRead = uapi::RUST_MDEV_DMA_OP_RAW_READ,
}

impl Opcode {
    /// Those that every device has.
    pub const ALL: [Self; 6] =
        [Self::Pin, Self::Unpin, Self::Write, Self::Read, Self::DmaWrite, Self::DmaRead];

    /// Those of raw pins, which devices have if the driver was loaded with `raw_pins=1`.
    pub const RAW: [Self; 4] = [Self::RawPin, Self::RawUnpin, Self::RawWrite, Self::RawRead];

    /// The operation of this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().chain(Self::RAW).find(|&opcode| opcode as u32 == number)
    }

    /// The operation of this name, as it is shown.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().chain(Self::RAW).find(|opcode| opcode.to_string() == name)
    }
}

impl fmt::Display for Opcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pin => "PIN",
            Self::Unpin => "UNPIN",
            Self::Write => "WRITE",
            Self::Read => "READ",
            Self::DmaWrite => "DMA_WRITE",
            Self::DmaRead => "DMA_READ",
            Self::RawPin => "RAW_PIN",
            Self::RawUnpin => "RAW_UNPIN",
            Self::RawWrite => "RAW_WRITE",
            Self::RawRead => "RAW_READ",
        })
    }
}

/// The status of a command, or of the generator, that has not ended yet.
pub const IN_PROGRESS: u32 = Errno::INPROGRESS.raw_os_error() as u32;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// 0, or an errno.
    pub status: u32,
    /// Bytes processed.
    pub count: u64,
    /// Digest of what was read, else 0.
    pub digest: u64,
}

impl Outcome {
    /// Whether the command has not ended yet.
    pub fn is_in_progress(&self) -> bool {
        self.status == IN_PROGRESS
    }
}

/// What a device takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Pins held at once.
    pub max_pins: u64,
    /// Bytes of one command.
    pub max_length: u64,
    /// Whether it has [`Opcode::RAW`].
    pub raw_pins: bool,
}

/// A `rust_mdev_dma` device, driven through its registers; by default those of its file descriptor.
#[derive(Debug)]
pub struct MdevDma<A = DeviceFile>(A);

impl MdevDma {
    /// Opens a device whose group is in `container`, and checks that it is one that this crate knows.
    pub fn open(container: &Arc<Container>, node: &DeviceNode) -> Result<Self> {
        Self::checked(DeviceFile::open(container, node)?)
    }

    /// As [`Self::open`], by iommufd: see [`Device::open_in`].
    pub fn open_in(ioas: &Arc<Ioas>, mdev: &Mdev) -> Result<Self> {
        Self::checked(DeviceFile::open_in(ioas, mdev)?)
    }

    fn checked(file: DeviceFile) -> Result<Self> {
        let this = Self::new(file);
        this.check()?;
        Ok(this)
    }

    /// The VFIO device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Where the registers begin in the device's file.
    pub fn bar_offset(&self) -> u64 {
        self.0.bar.offset
    }
}

impl<A: RegisterAccess> MdevDma<A> {
    /// Drives the device that has these registers.
    pub fn new(registers: A) -> Self {
        Self(registers)
    }

    /// What gives access to the registers.
    pub fn access(&self) -> &A {
        &self.0
    }

    /// Fails unless the device is one whose interface this crate knows.
    pub fn check(&self) -> Result<(), A::Error> {
        for (register, what, expected) in [
            (uapi::RUST_MDEV_DMA_REG_MAGIC, "magic number", uapi::RUST_MDEV_DMA_MAGIC),
            (uapi::RUST_MDEV_DMA_REG_VERSION, "version", uapi::RUST_MDEV_DMA_VERSION),
            (uapi::RUST_MDEV_DMA_REG_PAGE_SIZE, "page size", PAGE as u32),
        ] {
            let found = self.read_long(register)?;
            if found != expected {
                let differ = "driver and tool differ";
                let what =
                    format!("the device's {what} is {found:#x}, not {expected:#x}: {differ}");
                return Err(Error::Unknown(what).into());
            }
        }
        Ok(())
    }

    /// Its limits.
    pub fn limits(&self) -> Result<DeviceLimits, A::Error> {
        Ok(DeviceLimits {
            max_pins: self.read(uapi::RUST_MDEV_DMA_REG_MAX_PINS, Width::Quad)?,
            max_length: self.read(uapi::RUST_MDEV_DMA_REG_MAX_LENGTH, Width::Quad)?,
            raw_pins: {
                let ops = self.read_long(uapi::RUST_MDEV_DMA_REG_OPS)?;
                Opcode::RAW.into_iter().all(|op| ops & (1 << op as u32) != 0)
            },
        })
    }

    /// The pins it holds now.
    pub fn pins(&self) -> Result<u64, A::Error> {
        self.read(uapi::RUST_MDEV_DMA_REG_PINS, Width::Quad)
    }

    /// Reads a register, or part of one.
    pub fn read(&self, register: u32, width: Width) -> Result<u64, A::Error> {
        self.0.read(register, width)
    }

    /// Writes a register, or part of one.
    pub fn write(&self, register: u32, width: Width, value: u64) -> Result<(), A::Error> {
        self.0.write(register, width, value)
    }

    /// Reads a register of 4 bytes.
    pub(crate) fn read_long(&self, register: u32) -> Result<u32, A::Error> {
        Ok(self.read(register, Width::Long)? as u32)
    }

    /// Writes a register of 4 bytes.
    pub(crate) fn write_long(&self, register: u32, value: u32) -> Result<(), A::Error> {
        self.write(register, Width::Long, value.into())
    }

    /// Writes the arguments of the next command.
    pub fn prepare(&self, iova: u64, length: u64, seed: u64) -> Result<(), A::Error> {
        self.0.write_all(uapi::RUST_MDEV_DMA_REG_IOVA, &arguments(iova, length, seed))
    }

    /// Writes COMMAND, the doorbell: an operation's number, with `RUST_MDEV_DMA_COMMAND_*`.
    pub fn write_command(&self, command: u32) -> Result<(), A::Error> {
        self.write_long(uapi::RUST_MDEV_DMA_REG_COMMAND, command)
    }

    /// Runs a command, given as in [`Self::write_command`], so that a number that is no operation can
    /// be tried. Fails if the registers can't be accessed; how the command ends is in the outcome.
    pub fn run(
        &self,
        command: u32,
        iova: u64,
        length: u64,
        seed: u64,
    ) -> Result<Outcome, A::Error> {
        let [iova, length, seed] = arguments(iova, length, seed);
        let command = (Width::Long, command.into());
        self.0.write_all(uapi::RUST_MDEV_DMA_REG_IOVA, &[iova, length, seed, command])?;
        self.outcome()
    }

    /// Runs a command in the background, unless another is in progress: see [`Self::refused`].
    pub fn run_in_background(
        &self,
        opcode: Opcode,
        iova: u64,
        length: u64,
        seed: u64,
    ) -> Result<(), A::Error> {
        self.prepare(iova, length, seed)?;
        self.write_command(opcode as u32 | uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND)
    }

    /// How the last command ended, or that it is in progress.
    pub fn outcome(&self) -> Result<Outcome, A::Error> {
        // STATUS, COUNT, DIGEST
        let widths = [Width::Long, Width::Quad, Width::Quad];
        let [status, count, digest] = self.0.read_all(uapi::RUST_MDEV_DMA_REG_STATUS, widths)?;
        Ok(Outcome { status: status as u32, count, digest })
    }

    /// Waits for the end of the command that is in progress, which it still is if that takes too long.
    pub fn wait(&self, timeout: Duration) -> Result<Outcome, A::Error> {
        let begin = Instant::now();
        // Most take no longer than it takes to be run at all.
        let mut pause = Duration::from_micros(5);
        loop {
            let outcome = self.outcome()?;
            if !outcome.is_in_progress() || begin.elapsed() > timeout {
                return Ok(outcome);
            }
            thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_micros(100));
        }
    }

    /// Whether the last command wasn't run because another was in progress.
    pub fn refused(&self) -> Result<bool, A::Error> {
        Ok(self.read_long(uapi::RUST_MDEV_DMA_REG_REFUSED)? != 0)
    }

    /// What happened, of `RUST_MDEV_DMA_IRQ_*`, since it was cleared.
    pub fn irq_status(&self) -> Result<u32, A::Error> {
        self.read_long(uapi::RUST_MDEV_DMA_REG_IRQ_STATUS)
    }

    /// Clears bits of [`Self::irq_status`].
    pub fn clear_irqs(&self, irqs: u32) -> Result<(), A::Error> {
        self.write_long(uapi::RUST_MDEV_DMA_REG_IRQ_STATUS, irqs)
    }

    /// Says what interrupts, of `RUST_MDEV_DMA_IRQ_*`.
    pub fn enable_irqs(&self, irqs: u32) -> Result<(), A::Error> {
        self.write_long(uapi::RUST_MDEV_DMA_REG_IRQ_ENABLE, irqs)
    }

    /// What interrupts.
    pub fn enabled_irqs(&self) -> Result<u32, A::Error> {
        self.read_long(uapi::RUST_MDEV_DMA_REG_IRQ_ENABLE)
    }

    /// Pins the pages of `[iova, iova + length)`.
    pub fn pin(&self, iova: u64, length: u64) -> Result<Outcome, A::Error> {
        self.run(Opcode::Pin as u32, iova, length, 0)
    }

    /// Unpins each page of `[iova, iova + length)` once.
    pub fn unpin(&self, iova: u64, length: u64) -> Result<Outcome, A::Error> {
        self.run(Opcode::Unpin as u32, iova, length, 0)
    }

    /// Writes the pattern of `seed` to `[iova, iova + length)`, through pinned pages.
    pub fn write_pinned(&self, iova: u64, length: u64, seed: u64) -> Result<Outcome, A::Error> {
        self.run(Opcode::Write as u32, iova, length, seed)
    }

    /// Reads `[iova, iova + length)` through pinned pages.
    pub fn read_pinned(&self, iova: u64, length: u64) -> Result<Outcome, A::Error> {
        self.run(Opcode::Read as u32, iova, length, 0)
    }

    /// Writes the pattern of `seed` to `[iova, iova + length)`, by `vfio_dma_rw()`.
    pub fn dma_write(&self, iova: u64, length: u64, seed: u64) -> Result<Outcome, A::Error> {
        self.run(Opcode::DmaWrite as u32, iova, length, seed)
    }

    /// Reads `[iova, iova + length)`, by `vfio_dma_rw()`.
    pub fn dma_read(&self, iova: u64, length: u64) -> Result<Outcome, A::Error> {
        self.run(Opcode::DmaRead as u32, iova, length, 0)
    }
}

/// IOVA, LENGTH and SEED, as they follow one another.
fn arguments(iova: u64, length: u64, seed: u64) -> [(Width, u64); 3] {
    [iova, length, seed].map(|value| (Width::Quad, value))
}
