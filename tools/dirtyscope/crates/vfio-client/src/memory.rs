// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap,
};
use std::{
    ffi::c_void,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt as _,
    ptr::{NonNull, null_mut},
    sync::{
        OnceLock, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// What memory this process has.
static PAGEMAP: OnceLock<Option<File>> = OnceLock::new();

const WORD: usize = size_of::<u64>();

/// Words that [`Memory::first_difference`] compares before it looks at the result.
const COMPARED: usize = 8;

/// What the process, and with it the kernel on its behalf, may do to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: accesses fault.
    None,
    /// Read it.
    Read,
    /// Read and write it.
    ReadWrite,
}

type Restricted = Vec<(Range<usize>, Access)>;

/// Memory for devices to read and write: what a VMM would call guest memory. It is anonymous, or that
/// of a file, which other processes may map too.
///
/// Devices write to it behind Rust's back, at any time while it is mapped into a container. So it is
/// never referred to as bytes: what is read and written is copied, in words that are accessed
/// atomically. A copy isn't atomic as a whole, and bytes that are written while it is made may be
/// old or new in it.
///
/// # Invariants
///
/// `words` and `len` are addresses of our own, whole pages, with memory that is readable and writable
/// but for the pages in `restricted`. Rust accesses it by `AtomicU64` only, while it holds the lock of
/// `restricted`, and no more than that allows. Behind it are `guard` bytes of our own that can't be
/// accessed.
#[derive(Debug)]
pub struct Memory {
    words: NonNull<AtomicU64>,
    len: usize,
    guard: usize,
    /// Ranges of whole pages, none of which overlap.
    restricted: RwLock<Restricted>,
}

// SAFETY: The mapping belongs to the process, not to a thread.
unsafe impl Send for Memory {}

// SAFETY: By the type invariant all access is atomic.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory of `len` bytes, a multiple of the page size.
    ///
    /// Fails with what `mmap()` says.
    pub fn new(len: usize) -> Result<Self> {
        Self::with_guard(len, 0)
    }

    /// As [`Self::new`], with `guard` bytes behind it, a multiple of the page size too, where the
    /// process has no memory: accesses to them fault, those of the kernel with `EFAULT`. Without a
    /// guard, no bytes are `EINVAL`.
    pub fn with_guard(len: usize, guard: usize) -> Result<Self> {
        let what = || format!("mmap of {len:#x} bytes and a guard of {guard:#x}");
        let whole_pages = (len | guard) % rustix::param::page_size() == 0;
        assert!(whole_pages, "{len:#x} and {guard:#x} bytes are no whole pages");

        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let access =
            if guard == 0 { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::empty() };
        // SAFETY: The kernel chooses an address where nothing is.
        let ptr = unsafe { mmap_anonymous(null_mut(), len + guard, access, flags) }
            .map_err(|e| Error::new(what(), e))?;
        // INVARIANT: The mapping was just made, it begins at a page, and its first `len` bytes are, or
        // are made, accessible. If that fails, it is dropped.
        let words = NonNull::new(ptr.cast()).ok_or_else(|| Error::other(what()))?;
        let this = Self { words, len, guard, restricted: RwLock::default() };
        if guard == 0 {
            return Ok(this);
        }
        // SAFETY: This is our own mapping, to which no reference exists yet.
        unsafe { mprotect(ptr, len, MprotectFlags::READ | MprotectFlags::WRITE) }
            .map_err(|e| Error::new(what(), e))?;
        Ok(this)
    }

    /// The first `len` bytes of a file, a multiple of the page size: what is written here is there, and
    /// the other way round. The file must not shrink.
    ///
    /// Fails with what `mmap()` says.
    pub fn of_file(file: &File, len: usize) -> Result<Self> {
        Self::map(file, 0, len, MapFlags::SHARED, Vec::new())
    }

    /// The same of a file whose contents a process serves, which may fail: so Rust may not access them, as
    /// that would end this process. What devices write is in this memory only, not in the file.
    pub fn of_served_file(file: &File, len: usize) -> Result<Self> {
        Self::map(file, 0, len, MapFlags::PRIVATE, untouchable(len))
    }

    /// A device's memory, at `offset` of its file, whole pages; of `/dev/mem`, too. Rust may not access it, as
    /// long as nobody gives it access: loads and stores might not be what the device takes, and they end the
    /// process when the device's memory can't be accessed.
    pub fn of_region(file: &File, offset: u64, len: usize) -> Result<Self> {
        Self::map(file, offset, len, MapFlags::SHARED, untouchable(len))
    }

    fn map(
        file: &File,
        offset: u64,
        len: usize,
        flags: MapFlags,
        restricted: Restricted,
    ) -> Result<Self> {
        let what = || format!("mmap of {len:#x} bytes of {file:?}");
        let whole_pages = len % rustix::param::page_size() == 0;
        assert!(whole_pages, "{len:#x} bytes are no whole pages");
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: The kernel chooses an address where nothing is.
        let ptr = unsafe { mmap(null_mut(), len, access, flags, file, offset) }
            .map_err(|e| Error::new(what(), e))?;
        // INVARIANT: The mapping was just made, readable and writable, and begins at a page.
        let words = NonNull::new(ptr.cast()).ok_or_else(|| Error::other(what()))?;
        Ok(Self { words, len, guard: 0, restricted: RwLock::new(restricted) })
    }

    /// Bytes that can be mapped: its size, and that of its guard.
    pub fn span(&self) -> usize {
        self.len + self.guard
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes, but a guard.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The process's address of the byte at `offset`, for the kernel to know.
    pub fn address(&self, offset: usize) -> u64 {
        self.words.as_ptr().cast::<u8>().wrapping_add(offset) as u64
    }

    /// Lets the process do no more than `access` to whole pages, or again all it wants. Their contents
    /// stay, and so do pins that devices have of them. Panics if these aren't whole pages inside.
    pub fn set_access(&self, bytes: Range<usize>, access: Access) -> Result<()> {
        let flags = match access {
            Access::None => MprotectFlags::empty(),
            Access::Read => MprotectFlags::READ,
            Access::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        self.change(bytes, Some(access), "mprotect", |ptr, len| {
            // SAFETY: These are pages of our own mapping. Nobody accesses them now: it would take the
            // lock of `restricted`, which is held.
            unsafe { mprotect(ptr, len, flags) }
        })
    }

    /// Maps other, zeroed memory where whole pages are, by `MAP_FIXED`: what was there is gone, but for
    /// who has it pinned. Panics as [`Self::set_access`] does.
    pub fn replace(&self, bytes: Range<usize>) -> Result<()> {
        self.map_over(bytes, Access::ReadWrite)
    }

    /// Takes memory away, as `munmap()` does: nothing is there any more. The addresses remain ours, so
    /// that nothing else can come there. Panics as [`Self::set_access`] does.
    pub fn remove(&self, bytes: Range<usize>) -> Result<()> {
        self.map_over(bytes, Access::None)
    }

    /// Maps a device's memory, at `offset` of its file, where whole pages are. Rust may not access it: see
    /// [`Self::of_region`]. Panics as [`Self::set_access`] does.
    pub(crate) fn replace_by_region(
        &self,
        bytes: Range<usize>,
        file: &File,
        offset: u64,
    ) -> Result<()> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        self.change(bytes, Some(Access::None), "mmap of a region with MAP_FIXED", |ptr, len| {
            // SAFETY: These are pages of our own mapping, which nobody accesses now, as above, nor
            // afterwards: `restricted` has them.
            unsafe { mmap(ptr, len, protection, flags, file, offset) }.map(drop)
        })
    }

    fn map_over(&self, bytes: Range<usize>, access: Access) -> Result<()> {
        let protection = match access {
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
            _ => ProtFlags::empty(),
        };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        self.change(bytes, Some(access), "mmap with MAP_FIXED", |ptr, len| {
            // SAFETY: These are pages of our own mapping, which nobody accesses now, as above; their
            // contents may change at any time.
            unsafe { mmap_anonymous(ptr, len, protection, flags) }.map(drop)
        })
    }

    /// Drops the contents of whole pages, by `MADV_DONTNEED`: they are zero then, or what the file has.
    /// Panics as [`Self::set_access`] does.
    pub fn discard(&self, bytes: Range<usize>) -> Result<()> {
        self.change(bytes, None, "MADV_DONTNEED", |ptr, len| {
            // SAFETY: These are pages of our own mapping, whose contents may change at any time.
            unsafe { madvise(ptr, len, Advice::LinuxDontNeed) }
        })
    }

    /// Makes a call that changes whole pages; afterwards the process may do `access` to them, or what it
    /// could before.
    fn change(
        &self,
        bytes: Range<usize>,
        access: Option<Access>,
        what: &str,
        call: impl FnOnce(*mut c_void, usize) -> rustix::io::Result<()>,
    ) -> Result<()> {
        let page_size = rustix::param::page_size();
        let whole = (bytes.start | bytes.end) % page_size == 0 && bytes.end <= self.len;
        assert!(whole, "{bytes:#x?} of {:#x} are no whole pages inside", self.len);
        let mut restricted = self.restricted.write().unwrap_or_else(PoisonError::into_inner);
        let ptr = self.words.as_ptr().wrapping_byte_add(bytes.start);
        call(ptr.cast(), bytes.len())
            .map_err(|e| Error::new(format!("{what} of {bytes:#x?}"), e))?;
        let Some(access) = access else { return Ok(()) };
        // INVARIANT: `restricted` says what the pages are now.
        let beside = |(range, access): (Range<usize>, Access)| {
            let before = range.start..range.end.min(bytes.start);
            let behind = range.start.max(bytes.end)..range.end;
            [before, behind].map(|range| (range, access))
        };
        *restricted = restricted.drain(..).flat_map(beside).collect();
        if access != Access::ReadWrite {
            restricted.push((bytes, access));
        }
        restricted.retain(|(range, _)| !range.is_empty());
        Ok(())
    }

    /// Copies what is at `offset` to `to`. Panics if that isn't all inside, and readable.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let _lock = self.lock(offset, to.len(), Access::Read);
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

    /// Copies `from` to `offset`. Panics if that isn't all inside, and writable. The other bytes of a
    /// word that is written in part are written back as they were: don't race a device for them.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let _lock = self.lock(offset, from.len(), Access::ReadWrite);
        // Whole words, which most of it are, between what is less.
        let before = (offset.next_multiple_of(WORD) - offset).min(from.len());
        let (before, rest) = from.split_at(before);
        let (whole, behind) = rest.split_at(rest.len() - rest.len() % WORD);
        self.write_in_word(offset, before);
        let at = offset + before.len();
        let words = self.words_at(at / WORD, whole.len() / WORD);
        for (word, bytes) in words.iter().zip(whole.chunks_exact(WORD)) {
            word.store(bytes.try_into().map_or(0, u64::from_ne_bytes), Relaxed);
        }
        self.write_in_word(at + whole.len(), behind);
    }

    /// Writes bytes that all are of one word, if there are any.
    fn write_in_word(&self, offset: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let (word, at) = (self.word(offset / WORD), offset % WORD);
        let mut all = word.load(Relaxed).to_ne_bytes();
        all[at..at + bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_ne_bytes(all), Relaxed);
    }

    /// Which of some pages, whole ones inside, the process has: one that was never accessed is none of them, and
    /// still is zero. If the kernel doesn't say, all are.
    pub fn populated(&self, bytes: Range<usize>) -> Vec<bool> {
        // See Documentation/admin-guide/mm/pagemap.rst: present, or in swap.
        const THERE: u64 = 0b11 << 62;
        let pages = bytes.len() / rustix::param::page_size();
        let entries = self.pagemap(bytes).unwrap_or_else(|| vec![THERE; pages]);
        entries.into_iter().map(|entry| entry & THERE != 0).collect()
    }

    /// The page frame numbers of some pages, whole ones inside, which are there, or `None` if the kernel doesn't say.
    /// It has 0 for those without CAP_SYS_ADMIN.
    pub fn frames(&self, bytes: Range<usize>) -> Option<Vec<u64>> {
        const FRAME: u64 = (1 << 55) - 1;
        let entries = self.pagemap(bytes)?;
        Some(entries.into_iter().map(|entry| entry & FRAME).collect())
    }

    /// What /proc/self/pagemap has of some pages.
    fn pagemap(&self, bytes: Range<usize>) -> Option<Vec<u64>> {
        let page_size = rustix::param::page_size();
        let mut entries = vec![0; bytes.len() / page_size * size_of::<u64>()];
        let at = self.address(bytes.start) / page_size as u64 * size_of::<u64>() as u64;
        let file = PAGEMAP.get_or_init(|| File::open("/proc/self/pagemap").ok()).as_ref()?;
        file.read_exact_at(&mut entries, at).ok()?;
        let entry = |entry: &[u8]| entry.try_into().map_or(0, u64::from_ne_bytes);
        Some(entries.chunks(size_of::<u64>()).map(entry).collect())
    }

    /// Compares what is at `offset` with `expected`; both are whole words. Returns where in `expected`
    /// the first word begins that differs. Panics as [`Self::read`] does.
    pub fn first_difference(&self, offset: usize, expected: &[u8]) -> Option<usize> {
        let whole_words = (offset | expected.len()) % WORD == 0;
        assert!(whole_words, "{:#x} bytes at {offset:#x} are no whole words", expected.len());
        let _lock = self.lock(offset, expected.len(), Access::Read);
        let words = self.words_at(offset / WORD, expected.len() / WORD);
        let blocks = words.chunks(COMPARED).zip(expected.chunks(COMPARED * WORD));
        for (i, (found, expected)) in blocks.enumerate() {
            let differences = || {
                let expected = expected.chunks_exact(WORD);
                found.iter().zip(expected).map(|(found, expected)| {
                    let expected = expected.try_into().map_or(0, u64::from_ne_bytes);
                    found.load(Relaxed) ^ expected
                })
            };
            if differences().fold(0, |all, word| all | word) != 0 {
                // Devices may write meanwhile: what differed may not do so any more.
                let first = differences().position(|word| word != 0).unwrap_or(0);
                return Some((i * COMPARED + first) * WORD);
            }
        }
        None
    }

    /// Locks the access to bytes. Panics if they aren't all inside, or may not be accessed.
    fn lock(&self, offset: usize, len: usize, wanted: Access) -> RwLockReadGuard<'_, Restricted> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "{len:#x} bytes at {offset:#x} of {:#x}", self.len);
        let restricted = self.restricted.read().unwrap_or_else(PoisonError::into_inner);
        let mut accessed = restricted
            .iter()
            .filter(|(range, _)| range.start.max(offset) < range.end.min(offset + len));
        let refused = accessed.find(|&&(_, access)| access == Access::None || access != wanted);
        assert!(refused.is_none(), "{wanted:?} of {len:#x} bytes at {offset:#x}: {refused:x?}");
        restricted
    }

    fn word(&self, i: usize) -> &AtomicU64 {
        &self.words_at(i, 1)[0]
    }

    /// `count` words from number `i` on.
    fn words_at(&self, i: usize, count: usize) -> &[AtomicU64] {
        assert!(i <= self.len / WORD && count <= self.len / WORD - i);
        // SAFETY: By the type invariant there are `len / WORD` words, valid as long as `self`, which
        // are only accessed as `AtomicU64`; and these are among them. The kernel, as any other process
        // that shares memory, is no part of this program.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().add(i), count) }
    }
}

/// All pages of so many bytes, which Rust may not access.
fn untouchable(len: usize) -> Restricted {
    vec![(0..len, Access::None)]
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
    fn the_first_difference() {
        let memory = Memory::new(4096).unwrap();
        let mut expected = vec![0; 4096];
        for at in [0, 9, 63, 64, 800, 4095] {
            assert_eq!(memory.first_difference(0, &expected), None);
            memory.write(at, &[1]);
            let word = at - at % 8;
            assert_eq!(memory.first_difference(0, &expected), Some(word));
            assert_eq!(memory.first_difference(word, &expected[word..word + 8]), Some(0));
            expected[at] = 1;
        }
        memory.write(8, &[0xff; 8]);
        assert_eq!(memory.first_difference(16, &expected[16..]), None);
    }

    #[test]
    fn pages_are_populated_when_they_are_accessed() {
        let memory = Memory::new(5 * 4096).unwrap();
        memory.write(4096, &[0]);
        memory.write(3 * 4096, &[1]);
        memory.set_access(3 * 4096..4 * 4096, Access::None).unwrap();
        assert_eq!(memory.populated(0..5 * 4096), [false, true, false, true, false]);
        assert_eq!(memory.populated(3 * 4096..4 * 4096), [true]);
        memory.discard(4096..2 * 4096).unwrap();
        assert_eq!(memory.populated(4096..3 * 4096), [false, false]);
    }

    #[test]
    fn memory_is_replaced_discarded_and_removed() {
        let memory = Memory::new(4 * 4096).unwrap();
        memory.write(0, &[7; 4 * 4096]);
        memory.replace(4096..2 * 4096).unwrap();
        memory.discard(2 * 4096..3 * 4096).unwrap();
        memory.remove(3 * 4096..4 * 4096).unwrap();
        assert_eq!(memory.first_difference(0, &[7; 4096]), None);
        assert_eq!(memory.first_difference(4096, &[0; 2 * 4096]), None);
        memory.replace(3 * 4096..4 * 4096).unwrap();
        memory.write(3 * 4096, &[1]);

        memory.set_access(0..4096, Access::Read).unwrap();
        memory.discard(0..4096).unwrap();
        assert_eq!(memory.first_difference(0, &[0; 4096]), None);
        assert!(
            *memory.restricted.read().unwrap() == [(0..4096, Access::Read)],
            "it is as restricted as it was"
        );
    }

    #[test]
    fn access_is_restricted_page_by_page() {
        let memory = Memory::new(3 * 4096).unwrap();
        memory.write(5000, &[7]);
        memory.set_access(4096..8192, Access::Read).unwrap();
        let mut byte = [0];
        memory.read(5000, &mut byte);
        memory.write(4095, &byte);
        memory.write(8192, &byte);
        assert_eq!(byte, [7]);
        memory.set_access(4096..8192, Access::ReadWrite).unwrap();
        memory.write(5000, &[8]);

        // Part of what is restricted is so in another way.
        memory.set_access(0..3 * 4096, Access::Read).unwrap();
        memory.set_access(4096..8192, Access::None).unwrap();
        memory.set_access(0..4096, Access::ReadWrite).unwrap();
        let restricted = [(2 * 4096..3 * 4096, Access::Read), (4096..8192, Access::None)];
        assert_eq!(*memory.restricted.read().unwrap(), restricted);
        memory.set_access(0..3 * 4096, Access::ReadWrite).unwrap();
        assert!(memory.restricted.read().unwrap().is_empty());
    }

    #[test]
    #[should_panic(expected = "ReadWrite of 0x2 bytes at 0xfff: Some((1000..2000, Read))")]
    fn no_write_to_what_is_read_only() {
        let memory = Memory::new(3 * 4096).unwrap();
        memory.set_access(4096..8192, Access::Read).unwrap();
        memory.write(4095, &[0; 2]);
    }

    #[test]
    #[should_panic(expected = "Read of 0x1 bytes at 0x1fff: Some((1000..2000, None))")]
    fn no_read_of_what_is_not_there() {
        let memory = Memory::new(3 * 4096).unwrap();
        memory.set_access(4096..8192, Access::None).unwrap();
        memory.read(8191, &mut [0]);
    }

    #[test]
    #[should_panic(expected = "0x2 bytes at 0xfff")]
    fn nothing_outside() {
        Memory::new(4096).unwrap().read(4095, &mut [0; 2]);
    }
}
