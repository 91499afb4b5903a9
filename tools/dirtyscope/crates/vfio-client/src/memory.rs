// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use std::{
    ptr::{NonNull, null_mut},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

const WORD: usize = size_of::<u64>();

/// Anonymous memory for devices to read and write: what a VMM would call guest memory.
///
/// Devices write to it behind Rust's back, at any time while it is mapped into a container. So it is
/// never referred to as bytes: what is read and written is copied, in words that are accessed
/// atomically. A copy isn't atomic as a whole, and bytes that are written while it is made may be
/// old or new in it.
///
/// # Invariants
///
/// `words` and `len` are a mapping of our own, readable and writable, whole pages, zeroed by the
/// kernel when it was made. Rust accesses it by `AtomicU64` only. Behind it are `guard` bytes of our
/// own that can't be accessed.
#[derive(Debug)]
pub struct Memory {
    words: NonNull<AtomicU64>,
    len: usize,
    guard: usize,
}

// SAFETY: The mapping belongs to the process, not to a thread.
unsafe impl Send for Memory {}

// SAFETY: By the type invariant all access is atomic.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory of `len` bytes, a multiple of the page size.
    ///
    /// Fails with what `mmap()` says, `EINVAL` for no bytes.
    pub fn new(len: usize) -> Result<Self> {
        Self::with_guard(len, 0)
    }

    /// As [`Self::new`], with `guard` bytes behind it, a multiple of the page size too, where the
    /// process has no memory: who accesses them faults, the kernel with `EFAULT`.
    pub fn with_guard(len: usize, guard: usize) -> Result<Self> {
        let what = || format!("mmap of {len:#x} bytes and a guard of {guard:#x}");
        let whole_pages = (len | guard) % rustix::param::page_size() == 0;
        assert!(whole_pages, "{len:#x} and {guard:#x} bytes are no whole pages");

        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: The kernel chooses an address where nothing is.
        let ptr = unsafe { mmap_anonymous(null_mut(), len + guard, ProtFlags::empty(), flags) }
            .map_err(|e| Error::new(what(), e))?;
        // INVARIANT: The mapping was just made, it begins at a page, and its first `len` bytes are
        // made accessible. If that fails, it is dropped.
        let words = NonNull::new(ptr.cast()).ok_or_else(|| Error::other(what()))?;
        let this = Self { words, len, guard };
        // SAFETY: This is our own mapping, to which no reference exists yet.
        unsafe { mprotect(ptr, len, MprotectFlags::READ | MprotectFlags::WRITE) }
            .map_err(|e| Error::new(what(), e))?;
        Ok(this)
    }

    /// Bytes that can be mapped: its size, and that of its guard.
    pub fn span(&self) -> usize {
        self.len + self.guard
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes, which never is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The process's address of the byte at `offset`, for the kernel to know.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.words.as_ptr().cast::<u8>().wrapping_add(offset) as u64
    }

    /// Copies what is at `offset` to `to`. Panics if that isn't all inside.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        self.check(offset, to.len());
        let (mut at, mut rest) = (offset, to);
        while !rest.is_empty() {
            let in_word = at % WORD;
            let n = rest.len().min(WORD - in_word);
            let (part, next) = rest.split_at_mut(n);
            let word = self.word(at / WORD).load(Relaxed).to_ne_bytes();
            part.copy_from_slice(&word[in_word..in_word + n]);
            (at, rest) = (at + n, next);
        }
    }

    /// Copies `from` to `offset`. Panics if that isn't all inside. The other bytes of a word that is
    /// written in part are written back as they were: don't race a device for them.
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        let (mut at, mut rest) = (offset, from);
        while !rest.is_empty() {
            let in_word = at % WORD;
            let (part, next) = rest.split_at(rest.len().min(WORD - in_word));
            let word = self.word(at / WORD);
            let mut bytes = word.load(Relaxed).to_ne_bytes();
            bytes[in_word..in_word + part.len()].copy_from_slice(part);
            word.store(u64::from_ne_bytes(bytes), Relaxed);
            (at, rest) = (at + part.len(), next);
        }
    }

    fn check(&self, offset: usize, len: usize) {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "{len:#x} bytes at {offset:#x} of {:#x}", self.len);
    }

    fn word(&self, i: usize) -> &AtomicU64 {
        assert!(i < self.len / WORD);
        // SAFETY: By the type invariant there are `len / WORD` words, valid as long as `self`, which
        // are only accessed as `AtomicU64`; and `i` is less. The kernel, as any other process that
        // shares memory, is no part of this program.
        unsafe { self.words.add(i).as_ref() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this is our own mapping, to which no reference remains.
        // Where a container has it mapped, the container has a share of `self`: see `Container`.
        let unmapped = unsafe { munmap(self.words.as_ptr().cast(), self.span()) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_at_any_alignment() {
        let memory = Memory::new(4096).unwrap();
        let bytes: Vec<u8> = (1..=40).collect();
        for offset in 0..9 {
            for len in [0, 1, 7, 8, 9, 17, 40] {
                memory.write(0, &[0; 64]);
                memory.write(offset, &bytes[..len]);
                let mut all = [0xff; 64];
                memory.read(0, &mut all);
                let mut expected = [0; 64];
                expected[offset..offset + len].copy_from_slice(&bytes[..len]);
                assert_eq!(all, expected);

                let mut some = vec![0; len];
                memory.read(offset, &mut some);
                assert_eq!(some, bytes[..len]);
            }
        }
    }

    #[test]
    #[should_panic(expected = "0x2 bytes at 0xfff")]
    fn nothing_outside() {
        Memory::new(4096).unwrap().read(4095, &mut [0; 2]);
    }
}
