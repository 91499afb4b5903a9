// SPDX-License-Identifier: GPL-2.0-only

use std::ops::Range;

const WORD_BITS: u64 = u64::BITS as u64;

/// Words that [`Bitmap::diff`] compares at once before it looks at single ones: 4 KiB.
const DIFF_BLOCK: usize = 512;

/// A bitmap as type1 hands it out: one bit a page, page 0 the lowest bit of word 0.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bitmap {
    words: Vec<u64>,
    pages: u64,
}

/// How a reported bitmap differs from the expected one: runs of pages, ascending and not touching.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BitmapDifference {
    /// Expected, but not reported.
    pub lost: Vec<Range<u64>>,
    /// Reported, but not expected.
    pub spurious: Vec<Range<u64>>,
}

impl BitmapDifference {
    /// Whether there is no difference.
    pub fn is_empty(&self) -> bool {
        self.lost.is_empty() && self.spurious.is_empty()
    }
}

impl Bitmap {
    /// A bitmap of `pages` pages, none of them set.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; words_for(pages)], pages }
    }

    /// A bitmap of `pages` pages with the bits of `words`, which has exactly the words that it takes.
    /// Bits past the last page are kept: a kernel that sets them must not get away with it.
    pub fn from_words(words: Vec<u64>, pages: u64) -> Self {
        assert_eq!(words.len(), words_for(pages), "words of a bitmap of {pages} pages");
        Self { words, pages }
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether `page` is set.
    pub fn get(&self, page: u64) -> bool {
        self.words[word_of(page)] & (1 << (page % WORD_BITS)) != 0
    }

    /// Sets all of `pages`.
    pub fn set(&mut self, pages: Range<u64>) {
        assert!(pages.end <= self.pages, "{pages:?} of {}", self.pages);
        let mut next = pages.start;
        while next < pages.end {
            let bit = next % WORD_BITS;
            let n = (WORD_BITS - bit).min(pages.end - next);
            self.words[word_of(next)] |= (u64::MAX >> (WORD_BITS - n)) << bit;
            next += n;
        }
    }

    /// Changes `page` to its opposite.
    pub fn flip(&mut self, page: u64) {
        self.words[word_of(page)] ^= 1 << (page % WORD_BITS);
    }

    /// Sets, from page `at` on, what is set in `other`; which must fit.
    pub fn merge(&mut self, other: &Self, at: u64) {
        assert!(at + other.pages <= self.pages);
        let (first, shift) = (word_of(at), at % WORD_BITS);
        for (i, &word) in other.words.iter().enumerate() {
            self.words[first + i] |= word << shift;
            let high = word.checked_shr((WORD_BITS - shift) as u32).unwrap_or(0);
            if high != 0 {
                self.words[first + i + 1] |= high;
            }
        }
    }

    /// Runs of pages that are set, ascending and not touching.
    pub fn runs(&self) -> Vec<Range<u64>> {
        Self::new(self.pages).diff(self).spurious
    }

    /// How `reported` differs from this, which is expected. Both have the same number of pages.
    pub fn diff(&self, reported: &Self) -> BitmapDifference {
        assert_eq!(self.pages, reported.pages);
        let mut difference = BitmapDifference::default();
        let blocks = self.words.chunks(DIFF_BLOCK).zip(reported.words.chunks(DIFF_BLOCK));
        for (i, (expected, reported)) in blocks.enumerate() {
            if expected == reported {
                continue;
            }
            let first = (i * DIFF_BLOCK) as u64;
            for (word, (&expected, &reported)) in (first..).zip(expected.iter().zip(reported)) {
                push_runs(&mut difference.lost, word * WORD_BITS, expected & !reported);
                push_runs(&mut difference.spurious, word * WORD_BITS, reported & !expected);
            }
        }
        difference
    }
}

fn words_for(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(WORD_BITS)).expect("a bitmap that fits into memory")
}

fn word_of(page: u64) -> usize {
    (page / WORD_BITS) as usize
}

/// Appends the runs of set bits of a word, whose lowest bit is page `first`.
fn push_runs(runs: &mut Vec<Range<u64>>, first: u64, mut bits: u64) {
    let mut next = first;
    while bits != 0 {
        let zeros = bits.trailing_zeros();
        bits >>= zeros;
        let ones = bits.trailing_ones();
        bits = bits.checked_shr(ones).unwrap_or(0);

        let run = next + u64::from(zeros)..next + u64::from(zeros + ones);
        next = run.end;
        match runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => runs.push(run),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(pages: u64, set: &[Range<u64>]) -> Bitmap {
        let mut bitmap = Bitmap::new(pages);
        for run in set {
            bitmap.set(run.clone());
        }
        bitmap
    }

    #[test]
    fn set_and_runs_agree_at_every_edge() {
        for start in [0, 1, 63, 64, 65, 127] {
            for end in [start + 1, 64, 65, 128, 129, 200] {
                if start < end {
                    let b = bitmap(200, &[start..end]);
                    assert_eq!(b.runs(), [start..end]);
                    assert_eq!((0..200).filter(|&p| b.get(p)).count() as u64, end - start);
                }
            }
        }
    }

    #[test]
    fn what_is_set_stays_set() {
        let mut b = bitmap(140, &[0..70, 60..65]);
        assert_eq!(b.runs(), [0..70]);
        b.merge(&bitmap(70, &[0..8, 64..70]), 60);
        assert_eq!(b.runs(), [0..70, 124..130]);
    }

    #[test]
    fn set_of_nothing_sets_nothing() {
        assert!(bitmap(10, &[3..3]).runs().is_empty());
    }

    #[test]
    fn merge_shifts() {
        for at in [0, 1, 6, 63, 64, 70] {
            let mut b = Bitmap::new(200);
            b.merge(&bitmap(130, &[0..1, 58..66, 129..130]), at);
            assert_eq!(b.runs(), [at..at + 1, at + 58..at + 66, at + 129..at + 130]);
        }
    }

    #[test]
    fn diff_tells_lost_from_spurious() {
        let pages = 3 * DIFF_BLOCK as u64 * 64 + 7;
        let expected = bitmap(pages, &[5..6, 60..70, pages - 1..pages]);
        let reported = bitmap(pages, &[5..7, 60..65, 40_000..40_001]);
        let difference = expected.diff(&reported);
        assert_eq!(difference.lost, [65..70, pages - 1..pages]);
        assert_eq!(difference.spurious, [6..7, 40_000..40_001]);
        assert!(expected.diff(&expected).is_empty());
    }

    #[test]
    fn a_difference_of_either_kind_is_one() {
        let (none, one) = (bitmap(10, &[]), bitmap(10, &[3..4]));
        assert!(one.diff(&one).is_empty());
        assert!(!one.diff(&none).is_empty(), "lost");
        assert!(!none.diff(&one).is_empty(), "spurious");
    }

    #[test]
    fn flip_changes_one_page_to_and_fro() {
        for page in [0, 1, 63, 64, 130] {
            let mut b = bitmap(131, &[0..131]);
            b.flip(page);
            let others: Vec<_> =
                [0..page, page + 1..131].into_iter().filter(|run| !run.is_empty()).collect();
            assert_eq!(b.runs(), others);
            b.flip(page);
            assert_eq!(b.runs(), [0..131]);
        }
    }

    #[test]
    fn diff_sees_bits_past_the_end() {
        let reported = Bitmap::from_words(vec![1 << 10], 10);
        assert_eq!(Bitmap::new(10).diff(&reported).spurious, [10..11]);
    }
}
