// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result, sysfs::Mdev, uapi};
use rustix::io::Errno;
use std::{
    fmt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use vfio_client::{Container, Device, DeviceNode, Ioas, RegionInfo, uapi as vfio};

/// The operations, with their numbers: `enum rust_mdev_dma_op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Op {
    /// Pins whole pages.
    Pin = uapi::RUST_MDEV_DMA_OP_PIN,
    /// Gives back one pin of each page.
    Unpin = uapi::RUST_MDEV_DMA_OP_UNPIN,
    /// Writes the pattern through pinned pages.
    Write = uapi::RUST_MDEV_DMA_OP_WRITE,
    /// Reads through pinned pages.
    Read = uapi::RUST_MDEV_DMA_OP_READ,
    /// Writes the pattern by `vfio_dma_rw()`.
    DmaWrite = uapi::RUST_MDEV_DMA_OP_DMA_WRITE,
    /// Reads by `vfio_dma_rw()`.
    DmaRead = uapi::RUST_MDEV_DMA_OP_DMA_READ,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Pin, Self::Unpin, Self::Write, Self::Read, Self::DmaWrite, Self::DmaRead];

    /// The operation of this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&op| op as u32 == number)
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pin => "PIN",
            Self::Unpin => "UNPIN",
            Self::Write => "WRITE",
            Self::Read => "READ",
            Self::DmaWrite => "DMA_WRITE",
            Self::DmaRead => "DMA_READ",
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
    /// Bytes dealt with.
    pub count: u64,
    /// Digest of what was read, else 0.
    pub digest: u64,
}

/// What a device takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pins held at once.
    pub max_pins: u64,
    /// Bytes of one command.
    pub max_length: u64,
}

/// How many bytes an access to a register has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Width {
    /// 1
    Byte = 1,
    /// 2
    Word = 2,
    /// 4
    Long = 4,
    /// 8
    Quad = 8,
}

/// An open `rust_mdev_dma` device.
#[derive(Debug)]
pub struct MdevDma {
    device: Device,
    bar: RegionInfo,
    limits: Limits,
}

impl MdevDma {
    /// Opens the device, and checks that it is one whose interface this crate knows.
    pub fn open(container: &Arc<Container>, node: &DeviceNode) -> Result<Self> {
        Self::new(Device::open(container, node)?)
    }

    /// As [`Self::open`], by iommufd: see [`Device::open_in`].
    pub fn open_in(ioas: &Arc<Ioas>, mdev: &Mdev) -> Result<Self> {
        Self::new(Device::open_in(ioas, &mdev.path())?)
    }

    fn new(device: Device) -> Result<Self> {
        let bar = device.region_info(vfio::VFIO_PCI_BAR0_REGION_INDEX, None)?;
        if bar.size != u64::from(uapi::RUST_MDEV_DMA_BAR_SIZE) {
            return Err(Error::Unknown(format!("BAR 0 has {:#x} bytes", bar.size)));
        }
        let mut this = Self { device, bar, limits: Limits { max_pins: 0, max_length: 0 } };
        this.check(uapi::RUST_MDEV_DMA_REG_MAGIC, "magic number", uapi::RUST_MDEV_DMA_MAGIC)?;
        this.check(uapi::RUST_MDEV_DMA_REG_VERSION, "version", uapi::RUST_MDEV_DMA_VERSION)?;
        let block = uapi::RUST_MDEV_DMA_PATTERN_BLOCK;
        this.check(uapi::RUST_MDEV_DMA_REG_PAGE_SIZE, "page size", block)?;
        this.limits = Limits {
            max_pins: this.read(uapi::RUST_MDEV_DMA_REG_MAX_PINS, Width::Quad)?,
            max_length: this.read(uapi::RUST_MDEV_DMA_REG_MAX_LENGTH, Width::Quad)?,
        };
        Ok(this)
    }

    fn check(&self, register: u32, what: &str, expected: u32) -> Result<()> {
        match self.read(register, Width::Long)? {
            value if value == u64::from(expected) => Ok(()),
            value => Err(Error::Unknown(format!(
                "the device's {what} is {value:#x}, not {expected:#x}: driver and tool differ"
            ))),
        }
    }

    /// The device, for what isn't a command.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where the registers begin in the device's file.
    pub fn bar_offset(&self) -> u64 {
        self.bar.offset
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The pins it holds now.
    pub fn pins(&self) -> Result<u64> {
        self.read(uapi::RUST_MDEV_DMA_REG_PINS, Width::Quad)
    }

    /// Reads a register, or part of one.
    pub fn read(&self, register: u32, width: Width) -> Result<u64> {
        let mut bytes = [0; 8];
        let offset = self.bar.offset + u64::from(register);
        let n = self.device.read_at(offset, &mut bytes[..width as usize])?;
        whole(n, width)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes a register, or part of one.
    pub fn write(&self, register: u32, width: Width, value: u64) -> Result<()> {
        let offset = self.bar.offset + u64::from(register);
        let n = self.device.write_at(offset, &value.to_le_bytes()[..width as usize])?;
        whole(n, width)
    }

    /// Runs a command: `op` is a number, so that one that is no [`Op`] can be tried. Fails if the
    /// registers can't be accessed; what the command says is in the outcome.
    pub fn run(&self, op: u32, iova: u64, length: u64, seed: u64) -> Result<Outcome> {
        self.write(uapi::RUST_MDEV_DMA_REG_IOVA, Width::Quad, iova)?;
        self.write(uapi::RUST_MDEV_DMA_REG_LENGTH, Width::Quad, length)?;
        self.write(uapi::RUST_MDEV_DMA_REG_SEED, Width::Quad, seed)?;
        self.write(uapi::RUST_MDEV_DMA_REG_COMMAND, Width::Long, op.into())?;
        self.outcome()
    }

    /// Runs a command in the background, unless another is in progress: see [`Self::refused`].
    pub fn run_in_background(&self, op: Op, iova: u64, length: u64, seed: u64) -> Result<()> {
        self.run(op as u32 | uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND, iova, length, seed).map(drop)
    }

    /// Waits for the end of the command that is in progress. Its status is [`IN_PROGRESS`] if that
    /// takes too long.
    pub fn wait(&self, timeout: Duration) -> Result<Outcome> {
        let begin = Instant::now();
        loop {
            let outcome = self.outcome()?;
            if outcome.status != IN_PROGRESS || begin.elapsed() > timeout {
                return Ok(outcome);
            }
            thread::sleep(Duration::from_micros(100));
        }
    }

    /// Whether the last command wasn't run because another was in progress.
    pub fn refused(&self) -> Result<bool> {
        Ok(self.read(uapi::RUST_MDEV_DMA_REG_REFUSED, Width::Long)? != 0)
    }

    /// What happened, of `RUST_MDEV_DMA_IRQ_*`, since it was cleared.
    pub fn irq_status(&self) -> Result<u32> {
        Ok(self.read(uapi::RUST_MDEV_DMA_REG_IRQ_STATUS, Width::Long)? as u32)
    }

    /// Clears bits of [`Self::irq_status`].
    pub fn clear_irqs(&self, irqs: u32) -> Result<()> {
        self.write(uapi::RUST_MDEV_DMA_REG_IRQ_STATUS, Width::Long, irqs.into())
    }

    /// Says what interrupts, of `RUST_MDEV_DMA_IRQ_*`.
    pub fn enable_irqs(&self, irqs: u32) -> Result<()> {
        self.write(uapi::RUST_MDEV_DMA_REG_IRQ_ENABLE, Width::Long, irqs.into())
    }

    /// How the last command ended.
    pub fn outcome(&self) -> Result<Outcome> {
        Ok(Outcome {
            status: self.read(uapi::RUST_MDEV_DMA_REG_STATUS, Width::Long)? as u32,
            count: self.read(uapi::RUST_MDEV_DMA_REG_COUNT, Width::Quad)?,
            digest: self.read(uapi::RUST_MDEV_DMA_REG_DIGEST, Width::Quad)?,
        })
    }

    /// Pins the pages of `[iova, iova + length)`.
    pub fn pin(&self, iova: u64, length: u64) -> Result<Outcome> {
        self.run(Op::Pin as u32, iova, length, 0)
    }

    /// Gives back one pin of each page of `[iova, iova + length)`.
    pub fn unpin(&self, iova: u64, length: u64) -> Result<Outcome> {
        self.run(Op::Unpin as u32, iova, length, 0)
    }

    /// Writes the pattern of `seed` to `[iova, iova + length)`, through pinned pages.
    pub fn write_pinned(&self, iova: u64, length: u64, seed: u64) -> Result<Outcome> {
        self.run(Op::Write as u32, iova, length, seed)
    }

    /// Reads `[iova, iova + length)` through pinned pages.
    pub fn read_pinned(&self, iova: u64, length: u64) -> Result<Outcome> {
        self.run(Op::Read as u32, iova, length, 0)
    }

    /// Writes the pattern of `seed` to `[iova, iova + length)`, by `vfio_dma_rw()`.
    pub fn dma_write(&self, iova: u64, length: u64, seed: u64) -> Result<Outcome> {
        self.run(Op::DmaWrite as u32, iova, length, seed)
    }

    /// Reads `[iova, iova + length)`, by `vfio_dma_rw()`.
    pub fn dma_read(&self, iova: u64, length: u64) -> Result<Outcome> {
        self.run(Op::DmaRead as u32, iova, length, 0)
    }
}

fn whole(n: usize, width: Width) -> Result<()> {
    if n == width as usize {
        return Ok(());
    }
    Err(Error::Unknown(format!("{n} of {} bytes of a register were transferred", width as usize)))
}
