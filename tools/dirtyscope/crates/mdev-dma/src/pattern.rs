// SPDX-License-Identifier: GPL-2.0-only

//! What the device writes, and the digest of what it reads: see the uapi header.
//!
//! The driver has an implementation of its own; scenarios hold one against the other.

use crate::uapi::{
    RUST_MDEV_DMA_DIGEST_INIT, RUST_MDEV_DMA_DIGEST_MUL, RUST_MDEV_DMA_PATTERN_BLOCK,
    RUST_MDEV_DMA_PATTERN_MIX_1, RUST_MDEV_DMA_PATTERN_MIX_2, RUST_MDEV_DMA_PATTERN_STEP,
    RUST_MDEV_DMA_PATTERN_WORD_STEP,
};

// bindgen takes constants for signed that don't fit an `i64`.
const BLOCK: u64 = RUST_MDEV_DMA_PATTERN_BLOCK as u64;
pub(crate) const STEP: u64 = RUST_MDEV_DMA_PATTERN_STEP as u64;
const MIX_1: u64 = RUST_MDEV_DMA_PATTERN_MIX_1 as u64;
const MIX_2: u64 = RUST_MDEV_DMA_PATTERN_MIX_2 as u64;
const WORD_STEP: u64 = RUST_MDEV_DMA_PATTERN_WORD_STEP as u64;
const DIGEST_INIT: u64 = RUST_MDEV_DMA_DIGEST_INIT as u64;
const DIGEST_MUL: u64 = RUST_MDEV_DMA_DIGEST_MUL;

const WORD: u64 = u64::BITS as u64 / 8;

/// The finalizer of splitmix64.
pub(crate) fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(MIX_1);
    let z = (z ^ (z >> 27)).wrapping_mul(MIX_2);
    z ^ (z >> 31)
}

/// The first word of the block that `iova` is in.
fn block(seed: u64, iova: u64) -> u64 {
    mix(seed.wrapping_add((iova / BLOCK).wrapping_mul(STEP)))
}

/// The word at `iova`, a multiple of 8, in a block that begins with `block`.
fn word_of(block: u64, iova: u64) -> u64 {
    block.wrapping_add((iova % BLOCK / WORD).wrapping_mul(WORD_STEP))
}

/// The word that `seed` puts at `iova`, a multiple of 8.
pub fn word(seed: u64, iova: u64) -> u64 {
    word_of(block(seed, iova), iova)
}

/// The seed that puts at any IOVA plus `offset`, whole pages, what `seed` puts at that IOVA.
pub fn seed_at(seed: u64, offset: u64) -> u64 {
    seed.wrapping_sub((offset / BLOCK).wrapping_mul(STEP))
}

/// Puts into `bytes` what `seed` puts at `iova` and behind it.
pub fn fill(bytes: &mut [u8], seed: u64, iova: u64) {
    let (mut at, mut rest) = (iova, bytes);
    while !rest.is_empty() {
        let in_block = (BLOCK - at % BLOCK).min(rest.len() as u64);
        let (part, next) = rest.split_at_mut(in_block as usize);
        fill_block(part, block(seed, at), at);
        (at, rest) = (at.wrapping_add(in_block), next);
    }
}

/// Whether `bytes`, which are at `iova`, are what `seed` puts there.
pub fn matches(bytes: &[u8], seed: u64, iova: u64) -> bool {
    let mut expected = vec![0; bytes.len()];
    fill(&mut expected, seed, iova);
    bytes == expected
}

/// As [`fill`], for bytes of one block.
fn fill_block(bytes: &mut [u8], block: u64, iova: u64) {
    let in_word = (iova % WORD) as usize;
    let mut word = word_of(block, iova - in_word as u64);
    let (before, rest) =
        bytes.split_at_mut(bytes.len().min((WORD as usize - in_word) % WORD as usize));
    if !before.is_empty() {
        before.copy_from_slice(&word.to_le_bytes()[in_word..in_word + before.len()]);
        word = word.wrapping_add(WORD_STEP);
    }
    // Whole words, which most of it are.
    let mut words = rest.chunks_exact_mut(WORD as usize);
    for bytes in &mut words {
        bytes.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_add(WORD_STEP);
    }
    let behind = words.into_remainder();
    behind.copy_from_slice(&word.to_le_bytes()[..behind.len()]);
}

/// The digest of `bytes`, which are at `iova`.
pub fn digest(bytes: &[u8], iova: u64) -> u64 {
    let in_word = (iova % WORD) as usize;
    let (before, rest) = bytes.split_at(bytes.len().min((WORD as usize - in_word) % WORD as usize));
    let words = rest.chunks_exact(WORD as usize);
    let behind = words.remainder();
    // What isn't of a word is as if it were 0.
    let part = |bytes: &[u8], at: usize| {
        let mut word = [0; WORD as usize];
        word[at..at + bytes.len()].copy_from_slice(bytes);
        (!bytes.is_empty()).then(|| u64::from_le_bytes(word))
    };
    let words = words.map(|word| word.try_into().map_or(0, u64::from_le_bytes));
    let words = part(before, in_word).into_iter().chain(words).chain(part(behind, 0));
    words.fold(DIGEST_INIT, |digest, word| (digest.rotate_left(5) ^ word).wrapping_mul(DIGEST_MUL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elsewhere() {
        for (seed, iova, offset) in [(0, 8, 0), (7, 0x5018, 16 << 40), (u64::MAX, 0, 0x3000)] {
            assert_eq!(word(seed_at(seed, offset), iova + offset), word(seed, iova));
        }
    }

    /// Computed from the header's text by other means than this code.
    const WORDS: &[(u64, u64, u64)] = &[
        (0x0, 0x0, 0x0),
        (0x0, 0x8, 0xd1b5_4a32_d192_ed03),
        (0x1, 0x1000, 0x910a_2dec_8902_5cc1),
        (0x1234_5678_9abc_def0, 0xfff8, 0xa76f_961a_2d8d_ce5f),
        (0xffff_ffff_ffff_ffff, 0x7fff_ffff_f000, 0x85a1_8ab1_3b66_38a3),
        (0x7, 0xffff_ffff_ffff_fff8, 0xeab3_c5bc_1da8_b038),
    ];
    const DIGEST: u64 = 0x495c_e2ef_9fd4_cb57;

    #[test]
    fn words_are_what_the_header_says() {
        for &(seed, iova, expected) in WORDS {
            assert_eq!(word(seed, iova), expected, "seed {seed:#x}, IOVA {iova:#x}");
        }
    }

    #[test]
    fn parts_agree_with_the_whole() {
        let mut whole = [0; 64];
        fill(&mut whole, 42, 0xfe0);
        for start in 0..17 {
            for end in start..64 {
                let mut part = vec![0; end - start];
                fill(&mut part, 42, 0xfe0 + start as u64);
                assert_eq!(part, whole[start..end], "{start}..{end}");
            }
        }
    }

    #[test]
    fn digests_of_parts_of_words() {
        // Word by word, as the header says it.
        let slowly = |bytes: &[u8], iova: u64| {
            let mut words = std::collections::BTreeMap::new();
            for (at, &byte) in (iova..).zip(bytes) {
                words.entry(at / WORD).or_insert([0; 8])[(at % WORD) as usize] = byte;
            }
            words.values().fold(DIGEST_INIT, |digest, &word| {
                (digest.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(DIGEST_MUL)
            })
        };
        let bytes: Vec<u8> = (1..=30).collect();
        for iova in 0x1000..0x1009 {
            for len in 0..30 {
                assert_eq!(
                    digest(&bytes[..len], iova),
                    slowly(&bytes[..len], iova),
                    "{iova:#x} {len}"
                );
            }
        }
    }

    #[test]
    fn the_end_of_the_address_space() {
        let mut bytes = [0; 3];
        fill(&mut bytes, 1, u64::MAX - 2);
        assert_eq!(bytes, word(1, u64::MAX - 7).to_le_bytes()[5..]);
    }

    #[test]
    fn digests_are_what_the_header_says() {
        assert_eq!(digest(&[], 0), DIGEST_INIT);
        let bytes: Vec<u8> = (0..20).collect();
        assert_eq!(digest(&bytes, 0x1003), DIGEST);
        // Zeroes outside of the range don't make it the same range.
        assert_ne!(digest(&[0; 8], 0), digest(&[0; 16], 0));
    }
}
