// SPDX-License-Identifier: GPL-2.0-only

use crate::{DataFile, Error, Memory, Result, sys};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    ioctl::opcode,
    mm::{UserfaultfdFlags, userfaultfd},
};
use std::{os::fd::OwnedFd, time::Duration};

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

const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;

impl Memory {
    /// Has who accesses pages that nobody has accessed yet wait, until what this returns is dropped.
    pub fn unserved(&self) -> Result<Unserved> {
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
        let mut register = Register([self.address(0), self.len() as u64, REGISTER_MODE_MISSING, 0]);
        let request = opcode::read_write::<Register>(UFFD_API as u8, 0);
        // SAFETY: As above; the range is that of the memory.
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
