// SPDX-License-Identifier: GPL-2.0-only

use dirty_model::{Bitmap, Errno, Protection};
use mdev_dma::uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND;
use std::fmt;

/// An operation on the container, or on the device in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Maps new memory, filled with a pattern.
    Map { iova: u64, size: u64, protection: Protection },
    /// As `Map`, for reading and writing, where the process has memory for the first `backed` bytes
    /// only.
    MapPart { iova: u64, size: u64, backed: u64 },
    /// Unmaps.
    Unmap { iova: u64, size: u64 },
    /// Unmaps, and gets the bitmap.
    UnmapDirty { iova: u64, size: u64 },
    /// Unmaps all.
    UnmapAll,
    /// Begins to track dirty pages.
    Start,
    /// Ends it.
    Stop,
    /// Gets the bitmap of a range, which forgets what it reported.
    GetBitmap { iova: u64, size: u64 },
    /// Opens the device of a slot.
    Open { device: usize },
    /// Closes it.
    Close { device: usize },
    /// Resets it.
    Reset { device: usize },
    /// Has it run a command, to its end. `op` is a number, so that one that is no operation can be
    /// tried; with `RUST_MDEV_DMA_COMMAND_BACKGROUND` it runs in the background.
    Command { device: usize, op: u32, iova: u64, length: u64, seed: u64 },
}

/// What one side answers to an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Of the call, or of the command.
    pub status: Result<(), Errno>,
    /// Bytes that were unmapped, or that the command dealt with.
    pub count: u64,
    /// Of what was read.
    pub digest: u64,
    /// Of what is dirty.
    pub bitmap: Option<Bitmap>,
}

impl Answer {
    /// An answer without anything but the status.
    pub fn of(status: Result<(), Errno>) -> Self {
        Self { status, count: 0, digest: 0, bitmap: None }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map { iova, size, protection } => {
                let read = if protection.read { "r" } else { "-" };
                let write = if protection.write { "w" } else { "-" };
                write!(f, "MAP {iova:#x}+{size:#x} {read}{write}")
            }
            Self::MapPart { iova, size, backed } => {
                write!(f, "MAP {iova:#x}+{size:#x} rw, memory behind {backed:#x} bytes only")
            }
            Self::Unmap { iova, size } => write!(f, "UNMAP {iova:#x}+{size:#x}"),
            Self::UnmapDirty { iova, size } => write!(f, "UNMAP {iova:#x}+{size:#x} with bitmap"),
            Self::UnmapAll => write!(f, "UNMAP all"),
            Self::Start => write!(f, "START"),
            Self::Stop => write!(f, "STOP"),
            Self::GetBitmap { iova, size } => write!(f, "GET_BITMAP {iova:#x}+{size:#x}"),
            Self::Open { device } => write!(f, "device {device}: open"),
            Self::Close { device } => write!(f, "device {device}: close"),
            Self::Reset { device } => write!(f, "device {device}: RESET"),
            Self::Command { device, op, iova, length, seed } => {
                write!(f, "device {device}: ")?;
                match mdev_dma::Op::from_number(op & !BACKGROUND) {
                    Some(op) => write!(f, "{op} ")?,
                    None => write!(f, "operation {op} ")?,
                }
                if op & BACKGROUND != 0 {
                    write!(f, "in the background ")?;
                }
                write!(f, "{iova:#x}+{length:#x}")?;
                if *seed != 0 {
                    write!(f, " seed {seed:#x}")?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            Ok(()) => write!(f, "ok")?,
            Err(errno) => write!(f, "{errno}")?,
        }
        if self.count != 0 {
            write!(f, " {:#x} bytes", self.count)?;
        }
        if self.digest != 0 {
            write!(f, " digest {:#x}", self.digest)?;
        }
        if let Some(bitmap) = &self.bitmap {
            let runs = bitmap.runs();
            write!(f, " {} dirty", runs.iter().map(|run| run.end - run.start).sum::<u64>())?;
        }
        Ok(())
    }
}
