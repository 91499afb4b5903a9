// SPDX-License-Identifier: GPL-2.0-only

use crate::{DataFile, Error, Memory, Result, sys};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    ioctl::opcode,
    mm::{UserfaultfdFlags, userfaultfd},
};
use std::{
    ops::Range,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// While this exists, whoever first accesses a page of a memory waits, for nobody serves it.
#[derive(Debug)]
pub struct Unserved {
    userfaults: OwnedFd,
}

/// `struct uffdio_api` and `struct uffdio_register`
#[repr(C)]
struct Api([u64; 3]);
#[repr(C)]
struct Register([u64; 4]);

/// `struct uffdio_zeropage` and `struct uffdio_range`
#[repr(C)]
struct Zeropage([u64; 4]);
#[repr(C)]
struct Range64([u64; 2]);

/// Bytes of `struct uffd_msg`, and where the address of a page fault is.
const MESSAGE: usize = 32;
const ADDRESS: usize = 16;

const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;

impl Memory {
    /// Has who accesses pages that nobody has accessed yet wait, until what this returns is dropped.
    pub fn unserved(&self) -> Result<Unserved> {
        self.unserved_in(0..self.len())
    }

    /// The same of whole pages. Panics if these aren't inside.
    pub fn unserved_in(&self, bytes: Range<usize>) -> Result<Unserved> {
        assert!(bytes.end <= self.len(), "{bytes:#x?} of {:#x}", self.len());
        let failed = |what| move |errno| Error::new(what, errno);
        // It can't be polled otherwise.
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: It is registered below, for memory that is accessed by atomics and the kernel only:
        // waiting is all that comes of it.
        let fd = unsafe { userfaultfd(flags) };
        let fd = fd.map_err(failed("userfaultfd"))?;
        let mut api = Api([UFFD_API, 0, 0]);
        let request = opcode::read_write::<Api>(UFFD_API as u8, 0x3f);
        // SAFETY: The kernel fills in no more than the structure, which has no pointers.
        unsafe { sys::ioctl(&fd, request, &mut api) }.map_err(failed("UFFDIO_API"))?;
        let (start, len) = (self.address(bytes.start), bytes.len() as u64);
        let mut register = Register([start, len, REGISTER_MODE_MISSING, 0]);
        let request = opcode::read_write::<Register>(UFFD_API as u8, 0);
        // SAFETY: As above; the range is in the memory.
        unsafe { sys::ioctl(&fd, request, &mut register) }.map_err(failed("UFFDIO_REGISTER"))?;
        Ok(Unserved { userfaults: fd })
    }
}

impl Unserved {
    /// Waits until somebody waits for a page, at most so long. Says whether that is so.
    pub fn is_awaited(&self, limit: Duration) -> Result<bool> {
        let limit = Timespec::try_from(limit).map_err(|e| Error::other(format!("poll: {e}")))?;
        let mut fds = [PollFd::new(&self.userfaults, PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&limit)));
        Ok(ready.map_err(|e| Error::new("poll of a userfaultfd", e))? > 0)
    }

    /// From now on serves what is waited for with zeroes, a page each so long after somebody came to wait.
    pub fn serve(self, delay: Duration) -> Served {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let server = thread::spawn(move || {
            while !stopped.load(Relaxed) {
                if self.is_awaited(Duration::from_millis(5)).unwrap_or(false) {
                    thread::sleep(delay);
                    self.serve_page();
                }
            }
        });
        Served { stop, server: Some(server) }
    }

    fn serve_page(&self) {
        let page = rustix::param::page_size() as u64;
        let mut message = [0; MESSAGE];
        if rustix::io::read(&self.userfaults, &mut message) != Ok(MESSAGE) {
            return;
        }
        let address = message[ADDRESS..ADDRESS + 8].try_into().map_or(0, u64::from_ne_bytes);
        let mut range = Range64([address & !(page - 1), page]);
        let mut zeropage = Zeropage([range.0[0], page, 0, 0]);
        let request = opcode::read_write::<Zeropage>(UFFD_API as u8, 4);
        // SAFETY: The kernel puts zeroes where there is nothing yet of the memory that is registered, which
        // may change at any time; and fills in the structure. If it can't, others have served it.
        let served = unsafe { sys::ioctl(&self.userfaults, request, &mut zeropage) };
        if served.is_err() {
            let request = opcode::read::<Range64>(UFFD_API as u8, 2);
            // SAFETY: The kernel wakes who waits, and only reads the structure.
            let _ = unsafe { sys::ioctl(&self.userfaults, request, &mut range) };
        }
    }
}

/// What serves memory until it is dropped. What is waited for then is zero.
#[derive(Debug)]
pub struct Served {
    stop: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let ended = self.server.take().map(JoinHandle::join);
        debug_assert!(ended.is_some_and(|ended| ended.is_ok()));
    }
}

impl DataFile {
    /// Writes the first `len` bytes of a memory, or reads as many to it: what the file is for.
    pub fn transfer(&self, memory: &Memory, len: usize) -> Result<usize> {
        assert!(len <= memory.len());
        let (reads, _) = self.access()?;
        // SAFETY: The memory has so many bytes, and all access to it is atomic or the kernel's.
        unsafe { sys::transfer(self, memory.address(0), len, reads) }
            .map_err(|e| Error::new("transfer of migration data", e))
    }
}
