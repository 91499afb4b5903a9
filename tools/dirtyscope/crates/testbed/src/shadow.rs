// SPDX-License-Identifier: GPL-2.0-only

use crate::PAGE;
use std::{collections::BTreeMap, ops::Range};

/// Bytes of a page.
const SIZE: usize = PAGE as usize;

/// What must be in memory that was zeroed once. It has the pages only that have been written since, which are
/// few.
pub struct Shadow {
    len: usize,
    /// By where they begin.
    written: BTreeMap<usize, Box<[u8; SIZE]>>,
}

impl Shadow {
    /// Of `len` zeroed bytes, whole pages.
    pub fn zeroed(len: usize) -> Self {
        Self { len, written: BTreeMap::new() }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Has `change` change bytes: it gets those of each page, and where they begin.
    pub fn change(&mut self, bytes: Range<usize>, mut change: impl FnMut(usize, &mut [u8])) {
        for part in self.cut(bytes) {
            let page = part.start - part.start % SIZE;
            let written = self.written.entry(page).or_insert_with(|| Box::new([0; SIZE]));
            change(part.start, &mut written[part.start - page..part.end - page]);
        }
    }

    /// Appends bytes to `to`.
    pub fn read(&self, bytes: Range<usize>, to: &mut Vec<u8>) {
        for (part, written) in self.parts(bytes) {
            match written {
                Some(written) => to.extend_from_slice(written),
                None => to.resize(to.len() + part.len(), 0),
            }
        }
    }

    /// Bytes, page by page, with what must be in them if that was ever written: else it is 0.
    pub fn parts(
        &self,
        bytes: Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, Option<&[u8]>)> {
        self.cut(bytes).map(|part| {
            let page = part.start - part.start % SIZE;
            let written = self.written.get(&page);
            let written = written.map(|bytes| &bytes[part.start - page..part.end - page]);
            (part, written)
        })
    }

    /// The parts of a range that are of one page each.
    fn cut(&self, bytes: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        assert!(bytes.end <= self.len, "{bytes:#x?} of {:#x}", self.len);
        let mut next = bytes.start;
        std::iter::from_fn(move || {
            let start = next;
            next = (start - start % SIZE + SIZE).min(bytes.end);
            (start < bytes.end).then_some(start..next)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(shadow: &Shadow, bytes: Range<usize>) -> Vec<u8> {
        let mut read = Vec::new();
        shadow.read(bytes, &mut read);
        read
    }

    #[test]
    fn what_is_written_is_there_and_nothing_else() {
        let mut shadow = Shadow::zeroed(4 * SIZE);
        let mut expected = vec![0; 4 * SIZE];
        for (i, bytes) in [(1, SIZE - 3..SIZE + 5), (2, 0..1), (3, SIZE + 4..3 * SIZE)] {
            expected[bytes.clone()].fill(i);
            shadow.change(bytes, |_, part| part.fill(i));
            assert_eq!(read(&shadow, 0..4 * SIZE), expected);
        }
        assert_eq!(read(&shadow, SIZE - 1..SIZE + 6), expected[SIZE - 1..SIZE + 6]);
        assert!(read(&shadow, 7..7).is_empty());
        let parts =
            shadow.parts(SIZE + 1..4 * SIZE).map(|(part, written)| (part, written.is_some()));
        let parts: Vec<_> = parts.collect();
        let pages =
            [(SIZE + 1..2 * SIZE, true), (2 * SIZE..3 * SIZE, true), (3 * SIZE..4 * SIZE, false)];
        assert_eq!(parts, pages);
    }

    #[test]
    fn changes_know_where_they_are() {
        let mut shadow = Shadow::zeroed(2 * SIZE);
        let mut seen = Vec::new();
        shadow.change(SIZE - 2..SIZE + 3, |at, part| seen.push(at..at + part.len()));
        assert_eq!(seen, [SIZE - 2..SIZE, SIZE..SIZE + 3]);
    }

    #[test]
    #[should_panic(expected = "of 0x1000")]
    fn nothing_is_behind_its_end() {
        read(&Shadow::zeroed(SIZE), 1..SIZE + 1);
    }
}
