// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::{fs::File, ptr::NonNull};

/// Registers of a device that are mapped into the process: what is read or written here is one access
/// to the device, of that width.
///
/// # Invariants
///
/// `start` and `len` are addresses of our own, whole pages, that are readable and writable. Rust has no
/// reference to them.
#[derive(Debug)]
pub struct Mmio {
    start: NonNull<u8>,
    len: usize,
}

impl Mmio {
    /// The first `len` bytes, whole pages, of a device's memory that a file is, as `resource0` in the
    /// directory of a PCI function in sysfs.
    pub fn of_file(file: &File, len: usize) -> Result<Self> {
        let whole_pages = len > 0 && len % rustix::param::page_size() == 0;
        assert!(whole_pages, "{len:#x} bytes are no whole pages");
        let what = || format!("mmap of {len:#x} bytes of {file:?}");
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let anywhere = std::ptr::null_mut();
        // SAFETY: The kernel chooses an address where nothing is.
        let ptr = unsafe { mmap(anywhere, len, access, MapFlags::SHARED, file, 0) }
            .map_err(|e| Error::new(what(), e))?;
        // INVARIANT: The mapping was just made, readable and writable, and begins at a page.
        let start = NonNull::new(ptr.cast()).ok_or_else(|| Error::other(what()))?;
        Ok(Self { start, len })
    }

    /// Reads `bytes` bytes at `offset`: 1, 2, 4 or 8. Panics if they aren't inside, and aligned.
    pub fn read(&self, offset: usize, bytes: usize) -> u64 {
        let at = self.at(offset, bytes);
        // SAFETY: What `at` returns is valid for `bytes` bytes and aligned to them. It is memory of a
        // device, to which no reference exists, and all of whose values are valid integers.
        unsafe {
            match bytes {
                1 => at.read_volatile().into(),
                2 => at.cast::<u16>().read_volatile().into(),
                4 => at.cast::<u32>().read_volatile().into(),
                _ => at.cast::<u64>().read_volatile(),
            }
        }
    }

    /// Writes the lower `bytes` bytes of `value` at `offset`: 1, 2, 4 or 8. Panics as [`Self::read`].
    pub fn write(&self, offset: usize, bytes: usize, value: u64) {
        let at = self.at(offset, bytes);
        // SAFETY: As in `read`.
        unsafe {
            match bytes {
                1 => at.write_volatile(value as u8),
                2 => at.cast::<u16>().write_volatile(value as u16),
                4 => at.cast::<u32>().write_volatile(value as u32),
                _ => at.cast::<u64>().write_volatile(value),
            }
        }
    }

    /// The address of bytes, which are inside and aligned to their number.
    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        let whole = matches!(bytes, 1 | 2 | 4 | 8) && offset % bytes == 0;
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.len);
        assert!(whole && inside, "{bytes} bytes at {offset:#x} of {:#x}", self.len);
        self.start.as_ptr().wrapping_add(offset)
    }
}

impl Drop for Mmio {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this is our own mapping, to which no reference exists.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::unix::fs::FileExt;

    fn mapped() -> (File, Mmio) {
        let file = File::from(memfd_create("registers", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(4096).unwrap();
        let mmio = Mmio::of_file(&file, 4096).unwrap();
        (file, mmio)
    }

    #[test]
    fn accesses_are_as_wide_as_they_say() {
        let (file, mmio) = mapped();
        for (bytes, offset) in [(1, 3), (2, 6), (4, 12), (8, 4088)] {
            mmio.write(offset, bytes, 0x8877_6655_4433_2211);
            let mut found = [0; 8];
            file.read_exact_at(&mut found[..bytes], offset as u64).unwrap();
            let expected = 0x8877_6655_4433_2211 & (u64::MAX >> (64 - 8 * bytes));
            assert_eq!(u64::from_le_bytes(found), expected);
            assert_eq!(mmio.read(offset, bytes), expected);
        }
        assert_eq!(mmio.read(0, 8), (0x11 << 24) | (0x2211 << 48));
    }

    #[test]
    #[should_panic(expected = "8 bytes at 0xffc of 0x1000")]
    fn nothing_outside() {
        mapped().1.read(4092, 8);
    }

    #[test]
    #[should_panic(expected = "4 bytes at 0x2 of 0x1000")]
    fn nothing_unaligned() {
        mapped().1.write(2, 4, 0);
    }
}
