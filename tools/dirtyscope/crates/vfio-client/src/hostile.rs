// SPDX-License-Identifier: GPL-2.0-only

//! System calls as they come, for a client that means harm to the kernel, and none to this process.
//!
//! The kernel may read and write where an argument says. What can be said is therefore limited to
//! memory that is [`Ground`], and to where this process has nothing: below [`OURS`], which is checked,
//! and beyond what a process can have. Everything else is free: any number, size, flag or file.

use crate::{Access, Error, EventFd, Memory, Result, sys};
use rustix::ioctl::{Opcode, opcode};
use std::{
    fs,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FEATURE_MASK, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET, VFIO_TYPE,
};

/// What this process has is between these: the kernel places it there, and a program that doesn't
/// depend on its address, too.
pub const OURS: Range<u64> = 1 << 46..1 << 47;

/// Bytes that no call reads or writes at an address that it was given: `MAX_RW_COUNT`, or a bitmap.
const REACH: u64 = 2 << 30;

/// Bytes of an argument that are looked at for addresses.
const ARGUMENT: usize = 256;

/// Memory to be read and written by calls that mean harm.
///
/// # Invariants
///
/// It is there for ever. Its guard has `REACH` bytes or more. When it was made, this process had nothing below `OURS`, where the
/// kernel puts nothing unasked.
#[derive(Debug)]
pub struct Ground(Memory);

/// The number of an ioctl: what it is about (`;` for VFIO and iommufd), and which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(pub u8, pub u8);

impl Request {
    /// The one that comes `nr` after `VFIO_BASE`.
    pub const fn vfio(nr: u8) -> Self {
        Self(VFIO_TYPE, VFIO_BASE as u8 + nr)
    }

    const fn opcode(self) -> Opcode {
        opcode::none(self.0, self.1)
    }
}

/// A word of memory that another thread changes while a call uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flip {
    /// Where, a multiple of 8.
    pub offset: usize,
    /// What it is, too.
    pub other: u64,
}

/// What a call made.
#[derive(Debug)]
pub enum Answer {
    /// It was not made: it could have changed this process.
    NotMade,
    /// It failed.
    Failed(i32),
    /// It returned a number.
    Done(i32),
    /// It opened a file.
    Opened(HostileFile),
}

impl Answer {
    fn new(result: rustix::io::Result<i32>) -> Self {
        result.map_or_else(|errno| Self::Failed(errno.raw_os_error()), Self::Done)
    }

    /// The errno, 0 for success; nothing if it was not made.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::NotMade => None,
            Self::Failed(errno) => Some(*errno),
            Self::Done(_) | Self::Opened(_) => Some(0),
        }
    }
}

impl Ground {
    /// So many bytes, zero, the last page of which can only be read. It is never given back: a container
    /// may have it mapped for as long as anybody has it open.
    pub fn new(len: usize) -> Result<&'static Self> {
        let maps = fs::read_to_string("/proc/self/maps")
            .map_err(|error| Error::other(format!("/proc/self/maps: {error}")))?;
        let lowest = maps.split('-').next().and_then(|text| u64::from_str_radix(text, 16).ok());
        if lowest.is_none_or(|lowest| lowest < OURS.start) {
            return Err(Error::other(format!("something of this process is at {lowest:x?}"))
                .hint("build it as a program that doesn't depend on its address"));
        }
        let memory = Memory::with_guard(len, 4 * REACH as usize)?;
        let page = rustix::param::page_size();
        memory.set_access(len - page..len, Access::Read)?;
        Ok(Box::leak(Box::new(Self(memory))))
    }

    /// The memory.
    pub fn memory(&self) -> &Memory {
        &self.0
    }

    /// The address of the byte at `offset`, which may be in the guard.
    pub fn address(&self, offset: usize) -> u64 {
        assert!(offset <= self.0.span());
        self.0.address(offset)
    }

    /// Whether `len` bytes from `address` on are no business of this process.
    fn is_free(&self, address: u64, len: u64) -> bool {
        let begin = self.0.address(0);
        let end = begin + self.0.span() as u64;
        let last = address.saturating_add(len.saturating_sub(1));
        let inside = address >= begin && last < end;
        inside || last < OURS.start || address >= OURS.end
    }

    /// Where an argument at `address` begins in the memory, if it does.
    fn offset(&self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(self.0.address(0))? as usize;
        (offset < self.0.len()).then_some(offset)
    }

    /// Whether a structure at `address` has no address of this process in it, wherever in it that is.
    fn argument_is_free(&self, request: Request, address: u64) -> bool {
        if !self.is_free(address, REACH) {
            return false;
        }
        // Behind the memory is nothing to be read, and before it nothing that isn't ours.
        let Some(offset) = self.offset(address) else { return true };
        let mut bytes = vec![0; ARGUMENT.min(self.0.len() - offset)];
        self.0.read(offset, &mut bytes);
        let word = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        let mut words = (0..bytes.len()).step_by(4).filter_map(word);
        if !words.all(|word| self.is_free(word, REACH)) {
            return false;
        }
        // What is mapped is used as long as it is mapped, all of it.
        let mapped = match request {
            Request::MAP_DMA => word(8).zip(word(24)),
            Request::IOAS_MAP => word(16).zip(word(24)),
            _ => None,
        };
        mapped.is_none_or(|(address, size)| self.is_free(address, size))
    }

    fn word(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.0.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

impl Request {
    const MAP_DMA: Self = Self::vfio(13);
    const GET_DEVICE_FD: Self = Self::vfio(6);
    const DEVICE_FEATURE: Self = Self::vfio(17);
    const IOAS_MAP: Self = Self(VFIO_TYPE, 0x85);
}

/// A file that calls which mean harm are made on.
#[derive(Debug)]
pub struct HostileFile(OwnedFd);

impl HostileFile {
    /// Opens a file for reading and writing.
    pub fn open(path: &str) -> Result<Self> {
        crate::group::open(path)
            .map(|file| Self(file.into()))
            .map_err(|e| Error::new(format!("open {path}"), e))
    }

    /// Its number, for arguments.
    pub fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// One more descriptor of the same file.
    pub fn duplicate(&self) -> Result<Self> {
        self.0.try_clone().map(Self).map_err(|e| Error::other(format!("dup: {e}")))
    }

    /// Makes an ioctl with an address or a number, while another thread changes what is at the address
    /// if that is asked for.
    pub fn ioctl(
        &self,
        ground: &Ground,
        request: Request,
        argument: u64,
        flip: Option<Flip>,
    ) -> Answer {
        if !ground.argument_is_free(request, argument) {
            return Answer::NotMade;
        }
        // Which file a call has opened can't be told from what changes meanwhile.
        let flip = flip.filter(|_| request != Request::DEVICE_FEATURE);
        let Some(flip) = flip else { return self.ioctl_checked(ground, request, argument) };
        let one = ground.word(flip.offset);
        ground.0.write(flip.offset, &flip.other.to_le_bytes());
        let free = ground.argument_is_free(request, argument);
        ground.0.write(flip.offset, &one.to_le_bytes());
        if !free {
            return Answer::NotMade;
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    ground.0.write(flip.offset, &flip.other.to_le_bytes());
                    ground.0.write(flip.offset, &one.to_le_bytes());
                }
            });
            let answer = self.ioctl_checked(ground, request, argument);
            done.store(true, Relaxed);
            answer
        })
    }

    /// The argument was found to be free, and changes at most to one that is.
    fn ioctl_checked(&self, ground: &Ground, request: Request, argument: u64) -> Answer {
        let pointer = std::ptr::without_provenance_mut(argument as usize);
        // SAFETY: By `argument_is_free`, what the kernel reads and writes at the argument or at an
        // address in it, or maps for devices, is `Ground`, which is there for ever and only accessed as
        // atomics are, or memory that this process doesn't have.
        let result = sys::call(|| unsafe { sys::raw_ioctl(&self.0, request.opcode(), pointer) });
        match (request, result) {
            (Request::GET_DEVICE_FD, Ok(fd)) => Answer::Opened(Self::opened(fd)),
            (Request::DEVICE_FEATURE, Ok(value)) => match ground.data_file(argument) {
                Some(fd) => Answer::Opened(Self::opened(fd)),
                None => Answer::Done(value),
            },
            (_, result) => Answer::new(result),
        }
    }

    fn opened(fd: RawFd) -> Self {
        // SAFETY: The kernel just opened this file descriptor for us, nobody else knows of it.
        Self(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Reads to an address.
    pub fn read(&self, ground: &Ground, address: u64, len: usize, offset: Option<u64>) -> Answer {
        if !ground.is_free(address, REACH) {
            return Answer::NotMade;
        }
        let (fd, at) = (self.0.as_raw_fd(), address as usize as *mut libc::c_void);
        // SAFETY: The kernel writes to `Ground`, which is only accessed as atomics are, or where this
        // process has nothing: no more than `REACH` bytes, whatever `len` is.
        let done = sys::call(|| unsafe {
            match offset {
                Some(offset) => libc::pread(fd, at, len, offset as i64),
                None => libc::read(fd, at, len),
            }
        });
        transferred(done)
    }

    /// Writes from an address.
    pub fn write(&self, ground: &Ground, address: u64, len: usize, offset: Option<u64>) -> Answer {
        if !ground.is_free(address, REACH) {
            return Answer::NotMade;
        }
        let (fd, at) = (self.0.as_raw_fd(), address as usize as *const libc::c_void);
        // SAFETY: The kernel reads from `Ground`, or where this process has nothing.
        let done = sys::call(|| unsafe {
            match offset {
                Some(offset) => libc::pwrite(fd, at, len, offset as i64),
                None => libc::write(fd, at, len),
            }
        });
        transferred(done)
    }
}

impl Ground {
    /// The data file that a successful `VFIO_DEVICE_FEATURE` has opened, if it did.
    fn data_file(&self, argument: u64) -> Option<RawFd> {
        let offset = self.offset(argument)?;
        let mut bytes = [0; 16];
        self.0.read(offset, &mut bytes);
        let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[4 * i + byte]));
        let set = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
        let kind = VFIO_DEVICE_FEATURE_MASK | VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_PROBE;
        (word(1) & kind == set).then(|| word(3) as RawFd).filter(|&fd| fd >= 0)
    }
}

impl From<OwnedFd> for HostileFile {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for HostileFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<EventFd> for HostileFile {
    fn from(eventfd: EventFd) -> Self {
        Self(eventfd.into())
    }
}

impl From<HostileFile> for OwnedFd {
    fn from(file: HostileFile) -> Self {
        file.0
    }
}

fn transferred(done: isize) -> Answer {
    if done >= 0 {
        return Answer::Done(done as i32);
    }
    Answer::Failed(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}
