// SPDX-License-Identifier: GPL-2.0-only

use crate::PAGE;
use crate::testbed::{as_runs, to_iova};
use dirty_model::{Bitmap, BitmapBuffer, Errno, Errnos, Protection};
use events::{Call, Kind, Reply};
use mdev_dma::{Opcode, uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND};
use std::fmt::Display;
use vfio_client::{
    Leave,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL},
};

thread_local! {
    /// The number of this thread, which the kernel needn't be asked for again.
    static THREAD: i32 = rustix::thread::gettid().as_raw_nonzero().get();
}

/// An operation on the container, on the device in a slot, or on the process's own memory.
///
/// It has a text form, see the module `text`. Addresses and sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Maps new memory. The process has the first `backed` bytes only of it. `flags` are
    /// `VFIO_DMA_MAP_FLAG_*`, or what isn't one.
    Map { iova: u64, size: u64, backed: u64, flags: u32 },
    /// Unmaps. `flags` are `VFIO_DMA_UNMAP_FLAG_*` but that for the bitmap, or what isn't one.
    Unmap { iova: u64, size: u64, flags: u32 },
    /// Unmaps, and gets the bitmap.
    UnmapBitmap { iova: u64, size: u64, buffer: Buffer },
    /// Begins to track dirty pages.
    Start,
    /// Ends it.
    Stop,
    /// `VFIO_IOMMU_DIRTY_PAGES` with other flags than those for START, STOP or GET_BITMAP alone.
    DirtyPages { flags: u32 },
    /// Gets the bitmap of a range, which forgets what it reported.
    GetBitmap { iova: u64, size: u64, buffer: Buffer },
    /// The group of the device in a slot joins the container, see [`crate::slots`].
    Join { device: usize },
    /// It leaves the container.
    Leave { device: usize, by: Leave },
    /// Opens the device of a slot.
    Open { device: usize },
    /// Closes it.
    Close { device: usize },
    /// Resets it.
    Reset { device: usize },
    /// Has it run a command, to its end. `op` is a number, so that one that is no operation can be
    /// tried; with `RUST_MDEV_DMA_COMMAND_BACKGROUND` it runs in the background. The seed of RAW_PIN
    /// and RAW_UNPIN is the protection.
    Command { device: usize, op: u32, iova: u64, length: u64, seed: u64 },
    /// An edu copies up to 4,096 bytes, by DMA through the IOMMU.
    Copy { device: usize, from: u64, to: u64, length: u64 },
    /// The process makes pages that are mapped inaccessible: accesses to them fault.
    Hide { iova: u64, size: u64 },
    /// It makes them accessible again, with their contents.
    Show { iova: u64, size: u64 },
    /// It writes the pattern of `seed` to as much of the range as is mapped and isn't hidden.
    UserWrite { iova: u64, length: u64, seed: u64 },
    /// It may lock so many pages from now on, beside what it has locked for itself, and has no
    /// CAP_IPC_LOCK; or it may lock all it wants.
    Limit { pages: Option<u64> },
    /// Compares memory and counters.
    Check,
}

impl Op {
    /// Maps memory that is all there.
    pub fn map(iova: u64, size: u64, protection: Protection) -> Self {
        let mut flags = 0;
        if protection.read {
            flags |= VFIO_DMA_MAP_FLAG_READ;
        }
        if protection.write {
            flags |= VFIO_DMA_MAP_FLAG_WRITE;
        }
        Self::Map { iova, size, backed: size, flags }
    }

    /// Unmaps.
    pub fn unmap(iova: u64, size: u64) -> Self {
        Self::Unmap { iova, size, flags: 0 }
    }

    /// Unmaps everything.
    pub fn unmap_all() -> Self {
        Self::Unmap { iova: 0, size: 0, flags: VFIO_DMA_UNMAP_FLAG_ALL }
    }

    /// Unmaps, and gets the bitmap into a buffer that is right for it.
    pub fn unmap_bitmap(iova: u64, size: u64) -> Self {
        Self::UnmapBitmap { iova, size, buffer: Buffer::covering(size) }
    }

    /// Gets the bitmap of a range into a buffer that is right for it.
    pub fn get_bitmap(iova: u64, size: u64) -> Self {
        Self::GetBitmap { iova, size, buffer: Buffer::covering(size) }
    }

    /// The IOVA and the bytes that it is about, if any.
    pub fn range(&self) -> Option<(u64, u64)> {
        match *self {
            Self::Map { iova, size, .. }
            | Self::Unmap { iova, size, .. }
            | Self::UnmapBitmap { iova, size, .. }
            | Self::GetBitmap { iova, size, .. }
            | Self::Command { iova, length: size, .. }
            | Self::Copy { to: iova, length: size, .. }
            | Self::Hide { iova, size }
            | Self::Show { iova, size }
            | Self::UserWrite { iova, length: size, .. } => Some((iova, size)),
            _ => None,
        }
    }

    /// The slot of the device that does it.
    pub fn device(&self) -> Option<usize> {
        match *self {
            Self::Join { device }
            | Self::Leave { device, .. }
            | Self::Open { device }
            | Self::Close { device }
            | Self::Reset { device }
            | Self::Command { device, .. }
            | Self::Copy { device, .. } => Some(device),
            _ => None,
        }
    }

    /// As the log has it, done by this thread and a device of `group`.
    pub fn to_call(&self, group: Option<u32>) -> Call {
        let whole = |(iova, size): (u64, u64)| match (self, iova, size) {
            (Self::Unmap { flags, .. }, 0, 0) if *flags != 0 => (0, u64::MAX),
            _ => (iova, iova.saturating_add(size)),
        };
        Call {
            n: 0,
            op: self.to_string(),
            kind: self.kind(),
            range: self.range().map(whole),
            thread: THREAD.with(|&thread| thread),
            device: self.device(),
            group,
        }
    }

    fn kind(&self) -> Kind {
        match *self {
            Self::Map { .. } => Kind::Map,
            Self::Unmap { .. } | Self::UnmapBitmap { .. } => Kind::Unmap,
            Self::GetBitmap { .. } => Kind::Read,
            Self::Start => Kind::Start,
            Self::Stop => Kind::Stop,
            Self::Close { .. } | Self::Reset { .. } => Kind::Release,
            Self::Copy { .. } => Kind::Write,
            Self::Hide { .. } => Kind::Hide,
            Self::Show { .. } => Kind::Show,
            Self::Command { op, .. } => match operation(op) {
                Some(Opcode::Pin | Opcode::RawPin) => Kind::Pin,
                Some(Opcode::Unpin | Opcode::RawUnpin) => Kind::Unpin,
                Some(Opcode::Write | Opcode::DmaWrite | Opcode::RawWrite) => Kind::Write,
                _ => Kind::Other,
            },
            _ => Kind::Other,
        }
    }
}

/// The operation of a command, in the background or not.
pub fn operation(op: u32) -> Option<Opcode> {
    Opcode::from_number(op & !BACKGROUND)
}

/// A buffer for a bitmap: what the kernel is told of it, and how it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Bytes of a page.
    pub pgsize: u64,
    /// Bytes of the buffer.
    pub size: u64,
    /// What is there.
    pub memory: BufferMemory,
}

/// The memory of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferMemory {
    /// All of it is there.
    Whole,
    /// It ends after so many bytes, a multiple of 8.
    Ends(u64),
    /// It can only be read.
    ReadOnly,
}

impl Buffer {
    /// The smallest buffer for the bitmap of `size` bytes of IOVA.
    pub fn covering(size: u64) -> Self {
        let BitmapBuffer { pgsize, size, .. } = BitmapBuffer::covering(size, PAGE);
        Self { pgsize, size, memory: BufferMemory::Whole }
    }

    /// The same, whose memory isn't whole.
    pub fn with_memory(self, memory: BufferMemory) -> Self {
        Self { memory, ..self }
    }

    /// As the model takes it.
    pub fn to_model(self) -> BitmapBuffer {
        let writable = match self.memory {
            BufferMemory::Whole => u64::MAX,
            BufferMemory::Ends(bytes) => bytes,
            BufferMemory::ReadOnly => 0,
        };
        BitmapBuffer { pgsize: self.pgsize, size: self.size, writable }
    }
}

/// What one side answers to an operation: the kernel with an errno if it fails, the model with those
/// that may be it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer<E = Errno> {
    /// Of the call, or of the command.
    pub status: Result<(), E>,
    /// Bytes that were unmapped, or that the command dealt with.
    pub count: u64,
    /// Of what was read.
    pub digest: u64,
    /// Of what is dirty.
    pub bitmap: Option<Bitmap>,
}

impl<E> Answer<E> {
    /// An answer without anything but the status.
    pub fn of(status: Result<(), E>) -> Self {
        Self { status, count: 0, digest: 0, bitmap: None }
    }

    /// The answer of what returns a size and a bitmap.
    pub fn with_bitmap(result: Result<(u64, Bitmap), E>) -> Self {
        match result {
            Ok((count, bitmap)) => Self { count, bitmap: Some(bitmap), ..Self::of(Ok(())) },
            Err(status) => Self::of(Err(status)),
        }
    }

    /// As the log has it, of an operation.
    pub fn to_reply(&self, op: &Op) -> Reply
    where
        E: Display,
    {
        let iova = op.range().map_or(0, |(iova, _)| iova);
        Reply {
            text: self.to_string(),
            ok: self.status.is_ok(),
            count: self.count,
            dirty: self.bitmap.as_ref().map(|bitmap| as_runs(to_iova(bitmap.runs(), iova))),
        }
    }
}

impl Answer<Errnos> {
    /// Whether `found` is an answer that is owed.
    pub fn allows(&self, found: &Answer) -> bool {
        let status = match (self.status, found.status) {
            (Ok(()), Ok(())) => true,
            (Err(errnos), Err(errno)) => errnos.contains(errno),
            _ => false,
        };
        status
            && (self.count, self.digest) == (found.count, found.digest)
            && self.bitmap == found.bitmap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_errno_that_is_owed_and_no_other() {
        let owed = Answer::of(Err(Errno::EINVAL | Errno::EOVERFLOW));
        let kernel = |status| Answer::<Errno>::of(status);
        assert!(owed.allows(&kernel(Err(Errno::EINVAL))));
        assert!(owed.allows(&kernel(Err(Errno::EOVERFLOW))));
        assert!(!owed.allows(&kernel(Err(Errno::EFAULT))));
        assert!(!owed.allows(&kernel(Ok(()))));
        assert!(!owed.allows(&Answer { count: 1, ..kernel(Err(Errno::EINVAL)) }));
        assert_eq!(owed.to_string(), "EINVAL or EOVERFLOW");

        let owed: Answer<Errnos> = Answer::of(Ok(()));
        assert!(owed.allows(&kernel(Ok(()))));
        assert!(!owed.allows(&kernel(Err(Errno::EINVAL))));
    }
}
