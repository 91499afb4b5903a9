// SPDX-License-Identifier: GPL-2.0

//! The pattern that the device writes, and the digest of what it reads: see the uapi header.

#![expect(
    clippy::indexing_slicing,
    reason = "ranges are those of words or of bytes in a word, by their callers"
)]

use crate::bindings::{
    RUST_MDEV_DMA_DIGEST_INIT, RUST_MDEV_DMA_DIGEST_MUL as DIGEST_MUL,
    RUST_MDEV_DMA_PATTERN_BLOCK as BLOCK_SIZE, RUST_MDEV_DMA_PATTERN_MIX_1,
    RUST_MDEV_DMA_PATTERN_MIX_2, RUST_MDEV_DMA_PATTERN_STEP, RUST_MDEV_DMA_PATTERN_WORD_STEP,
};
use core::{array::from_fn, ops::Range};

// bindgen makes constants that don't fit an `i64` signed.
pub(super) const STEP: u64 = RUST_MDEV_DMA_PATTERN_STEP as u64;
const MIX_1: u64 = RUST_MDEV_DMA_PATTERN_MIX_1 as u64;
const MIX_2: u64 = RUST_MDEV_DMA_PATTERN_MIX_2 as u64;
const WORD_STEP: u64 = RUST_MDEV_DMA_PATTERN_WORD_STEP as u64;
const BLOCK: u64 = BLOCK_SIZE as u64;
const DIGEST_INIT: u64 = RUST_MDEV_DMA_DIGEST_INIT as u64;

/// Size of a word, the unit of pattern and digest.
pub(super) const WORD: usize = size_of::<u64>();

/// The words that `bytes` touches.
pub(super) fn words_of(bytes: &Range<usize>) -> Range<usize> {
    bytes.start / WORD..bytes.end.div_ceil(WORD)
}

/// The finalizer of splitmix64.
pub(super) fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(MIX_1);
    let z = (z ^ (z >> 27)).wrapping_mul(MIX_2);
    z ^ (z >> 31)
}

/// Words per iteration of the loops that are worth unrolling.
pub(super) const STRIDE: usize = 16;

/// The pattern of one block of `RUST_MDEV_DMA_PATTERN_BLOCK` bytes.
#[derive(Clone, Copy)]
pub(super) struct Block {
    first_word: u64,
}

impl Block {
    /// The block that `iova` lies in.
    pub(super) fn of(seed: u64, iova: u64) -> Self {
        let number = iova / BLOCK;
        Self {
            first_word: mix(seed.wrapping_add(number.wrapping_mul(STEP))),
        }
    }

    /// Word `i` of the block.
    #[inline]
    pub(super) fn word(self, i: usize) -> u64 {
        self.first_word
            .wrapping_add((i as u64).wrapping_mul(WORD_STEP))
    }

    /// The `N` words from word `i` on.
    #[inline]
    pub(super) fn words<const N: usize>(self, i: usize) -> [u64; N] {
        let first = self.word(i);
        from_fn(|j| first.wrapping_add(WORD_STEP.wrapping_mul(j as u64)))
    }

    /// Stores the words of `range` in the same range of `words`, little endian.
    #[inline]
    pub(super) fn fill(self, words: &mut [u64], range: Range<usize>) {
        let mut next = range.start;
        let mut strides = words[range].chunks_exact_mut(STRIDE);
        for stride in &mut strides {
            stride.copy_from_slice(&self.words::<STRIDE>(next).map(u64::to_le));
            next = next.wrapping_add(STRIDE);
        }
        for (i, word) in (next..).zip(strides.into_remainder()) {
            *word = self.word(i).to_le();
        }
    }

    /// Byte `i` of the block.
    pub(super) fn byte(self, i: usize) -> u8 {
        self.word(i / WORD).to_le_bytes()[i % WORD]
    }
}

/// The digest of the concatenation of `parts`, each of which is whole words.
pub(super) fn checksum(parts: &[&[u8]]) -> u64 {
    let mut digest = Digest::new();
    for word in parts.iter().flat_map(|part| part.chunks(WORD)) {
        let mut bytes = [0; WORD];
        bytes[..word.len()].copy_from_slice(word);
        digest.add(&(0..WORD), 0, u64::from_le_bytes(bytes));
    }
    digest.value()
}

/// A digest in progress.
pub(super) struct Digest(u64);

impl Digest {
    pub(super) fn new() -> Self {
        Self(DIGEST_INIT)
    }

    /// Adds word `i` of a page, of which `bytes` are in the range.
    #[inline]
    pub(super) fn add(&mut self, bytes: &Range<usize>, i: usize, word: u64) {
        let start = i.wrapping_mul(WORD);
        let end = start.wrapping_add(WORD);
        let mut word = word;
        // Bits of a word that `bytes` touches: less than all.
        let bits = |bytes: usize| bytes.wrapping_mul(8) as u32;
        if start < bytes.start {
            word &= u64::MAX.wrapping_shl(bits(bytes.start.wrapping_sub(start)));
        }
        if end > bytes.end {
            word &= u64::MAX.wrapping_shr(bits(end.wrapping_sub(bytes.end)));
        }
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(DIGEST_MUL);
    }

    pub(super) fn value(&self) -> u64 {
        self.0
    }
}

#[cfg(kunit_suites)]
#[kernel::macros::kunit_tests(rust_mdev_dma_pattern)]
mod tests {
    use super::*;
    use kernel::prelude::*;

    const WORDS: usize = BLOCK_SIZE as usize / WORD;

    #[test]
    fn mix_is_that_of_splitmix64() {
        // The first numbers from seed 0, and from seed 1234567.
        assert_eq!(mix(STEP), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix(STEP.wrapping_add(1234567)), 6457827717110365317);
    }

    #[test]
    fn bytes_words_and_fill_agree() {
        let block = Block::of(7, 3 * u64::from(BLOCK_SIZE) + 5);
        assert_eq!(
            block.word(0),
            Block::of(7, 3 * u64::from(BLOCK_SIZE)).word(0)
        );
        assert!(block.word(0) != Block::of(7, 4 * u64::from(BLOCK_SIZE)).word(0));
        assert!(block.word(0) != Block::of(8, 3 * u64::from(BLOCK_SIZE)).word(0));
        let words = block.words::<4>(9);
        assert_eq!(words[3], block.word(12));
        for byte in 0..WORD {
            assert_eq!(block.byte(12 * WORD + byte), words[3].to_le_bytes()[byte]);
        }
    }

    #[test]
    fn fill_keeps_to_its_range() -> Result {
        let block = Block::of(1, 0);
        let mut words = KVec::from_elem(0u64, WORDS, GFP_KERNEL)?;
        for range in [0..0, 0..1, 3..STRIDE + 3, 5..2 * STRIDE + 9, 0..WORDS] {
            words.fill(0);
            block.fill(&mut words, range.clone());
            for (i, &word) in words.iter().enumerate() {
                let filled = if range.contains(&i) { block.word(i) } else { 0 };
                assert_eq!(u64::from_le(word), filled);
            }
        }
        Ok(())
    }

    #[test]
    fn words_that_bytes_touch() {
        assert_eq!(words_of(&(0..1)), 0..1);
        assert_eq!(words_of(&(7..9)), 0..2);
        assert_eq!(words_of(&(8..16)), 1..2);
    }

    #[test]
    fn a_digest_has_only_bytes_of_the_range() {
        let of = |bytes: Range<usize>, words: [u64; 2]| {
            let mut digest = Digest::new();
            for (i, word) in words.into_iter().enumerate() {
                digest.add(&bytes, i, word);
            }
            digest.value()
        };
        let words = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        assert_eq!(
            of(3..14, words),
            of(3..14, [words[0] | 0xff, words[1] | 0xff << 56])
        );
        assert!(of(3..14, words) != of(3..14, [words[0] ^ 1 << 24, words[1]]));
        assert!(of(3..14, words) != of(3..14, [words[0], words[1] ^ 1 << 40]));
        assert!(of(0..16, words) != of(0..16, [words[1], words[0]]));
        assert_eq!(
            of(3..14, words),
            of(0..16, [words[0] & !0xff_ffff, words[1] & !(0xffff << 48)])
        );
    }

    #[test]
    fn a_checksum_is_of_what_follows_one_another() {
        let bytes: [u8; 24] = from_fn(|i| i as u8);
        let whole = checksum(&[&bytes]);
        assert_eq!(whole, checksum(&[&bytes[..8], &bytes[8..]]));
        assert_eq!(whole, checksum(&[&bytes[..16], &[], &bytes[16..]]));
        assert!(whole != checksum(&[&bytes[8..], &bytes[..8]]));
        assert_eq!(checksum(&[]), DIGEST_INIT);
    }
}
