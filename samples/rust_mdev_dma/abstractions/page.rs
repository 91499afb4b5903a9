// SPDX-License-Identifier: GPL-2.0

//! The memory of pages that others write to as well.
//!
//! C header: [`include/linux/highmem.h`](srctree/include/linux/highmem.h)

use core::{marker::PhantomData, ops::Range, ptr::NonNull};
use kernel::{bindings, page::PAGE_SIZE, prelude::*};

/// The memory of a borrowed page, mapped.
///
/// The user and other devices may read and write it at any time, so there are no Rust references to
/// it: words and bytes are copied in and out one at a time, each by one volatile access.
///
/// # Examples
///
/// ```
/// fn clear(memory: &PageMemory<'_>) {
///     memory.write_words(0..PageMemory::WORDS, |_| [0; 8]);
/// }
/// ```
///
/// # Invariants
///
/// `self.0` is valid for reads and writes of a page for the lifetime `'a`, and page aligned.
pub(crate) struct PageMemory<'a>(NonNull<u8>, PhantomData<&'a ()>);

impl PageMemory<'_> {
    /// Maps `page` and calls `f` with its memory.
    ///
    /// # Safety
    ///
    /// `page` is a valid page, and isn't freed before this has returned.
    #[inline]
    pub(crate) unsafe fn with(page: *mut bindings::page, f: impl FnOnce(&PageMemory<'_>)) {
        // SAFETY: The caller promises that `page` is valid.
        let addr = unsafe { bindings::kmap_local_page(page) };
        if let Some(ptr) = NonNull::new(addr.cast()) {
            // INVARIANT: The page is mapped at `ptr` until `kunmap_local()`, and the caller
            // promises that it isn't freed meanwhile.
            f(&PageMemory(ptr, PhantomData));
        }
        // SAFETY: `addr` is the latest local mapping: those that `f` made it has removed, as all
        // safe functions that map a page take a closure, as this one does.
        unsafe { bindings::kunmap_local(addr) };
    }

    /// Number of 64-bit words of a page.
    pub(crate) const WORDS: usize = PAGE_SIZE / size_of::<u64>();

    /// Writes `words`, as far as they are in the page, little endian: `f(i)` returns the `N` words
    /// from word `i` on.
    ///
    /// Each iteration writes `N` words, more than the compiler would unroll.
    #[inline]
    pub(crate) fn write_words<const N: usize>(
        &self,
        words: Range<usize>,
        f: impl Fn(usize) -> [u64; N],
    ) {
        const { assert!(N > 0) };
        let end = words.end.min(Self::WORDS);
        let rest = end.saturating_sub(words.start).checked_rem(N).unwrap_or(0);
        let whole = words.start..end.saturating_sub(rest);
        for i in whole.clone().step_by(N) {
            // CAST: By the type invariant the page is aligned for words.
            // SAFETY: The length of `whole` is a multiple of `N`: `i + N` is at most `WORDS`.
            let at = unsafe { self.0.cast::<u64>().add(i) };
            for (j, word) in f(i).into_iter().enumerate() {
                // SAFETY: `i + j` is less than `WORDS`, as `j` is less than `N`; by the type
                // invariant the page is valid for writes.
                unsafe { at.add(j).write_volatile(word.to_le()) };
            }
        }
        for (i, word) in (whole.end..end).zip(f(whole.end)) {
            // SAFETY: `i` is less than `WORDS`; by the type invariant the page is valid.
            unsafe { self.0.cast::<u64>().add(i).write_volatile(word.to_le()) };
        }
    }

    /// Writes `byte(i)` to every byte `i` of `bytes` that is in the page.
    #[inline]
    pub(crate) fn write_bytes(&self, bytes: Range<usize>, mut byte: impl FnMut(usize) -> u8) {
        for i in bytes.start..bytes.end.min(PAGE_SIZE) {
            // SAFETY: `i` is less than `PAGE_SIZE`; by the type invariant the page is valid.
            unsafe { self.0.add(i).write_volatile(byte(i)) };
        }
    }

    /// Calls `f(i, word)` for every word `i` of `words` that is in the page, read as little endian.
    #[inline]
    pub(crate) fn read_words(&self, words: Range<usize>, mut f: impl FnMut(usize, u64)) {
        for i in words.start..words.end.min(Self::WORDS) {
            // SAFETY: `i` is less than `WORDS`; by the type invariant the page is valid.
            let word = unsafe { self.0.cast::<u64>().add(i).read_volatile() };
            f(i, u64::from_le(word));
        }
    }
}
