// SPDX-License-Identifier: GPL-2.0-only

use super::{Failure, PAGE};
use anyhow::Result;
use mdev_dma::pattern;
use std::{ops::Range, sync::Arc};
use vfio_client::Memory;

/// The seed of what memory is filled with before devices see it.
const BACKGROUND: u64 = u64::MAX;

/// Bytes that are compared at once.
const BLOCK: usize = 1 << 16;

/// All memory that is mapped, or was: devices must not change it then.
#[derive(Default)]
pub struct Regions(Vec<Region>);

struct Region {
    iova: u64,
    mapped: bool,
    memory: Arc<Memory>,
    /// What must be in it.
    shadow: Vec<u8>,
}

/// New memory for `backed` bytes, or a page if that is no size, filled with what belongs at `iova`.
/// Up to `size` bytes nothing is behind it.
pub fn new_memory(iova: u64, size: u64, backed: u64) -> Result<Arc<Memory>> {
    let len = backed.max(1).next_multiple_of(PAGE);
    let guard = size.next_multiple_of(PAGE).saturating_sub(len);
    let memory = Memory::with_guard(len as usize, guard as usize)?;
    memory.write(0, &background(iova, memory.len()));
    Ok(Arc::new(memory))
}

fn background(iova: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    pattern::fill(&mut bytes, BACKGROUND, iova);
    bytes
}

impl Regions {
    /// `memory`, made by [`new_memory`], was mapped.
    pub fn map(&mut self, iova: u64, memory: Arc<Memory>) {
        let shadow = background(iova, memory.len());
        self.0.push(Region { iova, mapped: true, memory, shadow });
    }

    /// What was mapped in a range isn't any more.
    pub fn unmap(&mut self, iova: u64, size: u64) {
        for region in &mut self.0 {
            region.mapped &= region.iova < iova || region.iova - iova >= size;
        }
    }

    /// A device writes the pattern of `seed` to as much of `range` as is mapped.
    pub fn write(&mut self, range: Range<u64>, seed: u64) {
        let mut iova = range.start;
        while let Some((region, bytes)) = self.find(iova..range.end) {
            let shadow = &mut self.0[region].shadow[bytes];
            pattern::fill(shadow, seed, iova);
            iova += shadow.len() as u64;
        }
    }

    /// The process itself writes to `iova`.
    pub fn user_write(&mut self, iova: u64, bytes: &[u8]) {
        let range = iova..iova + bytes.len() as u64;
        let (region, at) = self.find(range).expect("mapped memory");
        let region = &mut self.0[region];
        let bytes = &bytes[..at.len()];
        region.memory.write(at.start, bytes);
        region.shadow[at].copy_from_slice(bytes);
    }

    /// What must be in `range`, as far as it is mapped.
    pub fn read(&self, range: Range<u64>) -> Vec<u8> {
        let mut read = Vec::new();
        while let Some((region, bytes)) = self.find(range.start + read.len() as u64..range.end) {
            read.extend_from_slice(&self.0[region].shadow[bytes]);
        }
        read
    }

    /// Expects the byte at `iova`, which is mapped, to be another than it is.
    pub fn falsify(&mut self, iova: u64) {
        let (region, at) = self.find(iova..iova + 1).expect("mapped memory");
        self.0[region].shadow[at.start] ^= 1;
    }

    /// Compares all memory with what must be in it.
    pub fn check(&self) -> Result<()> {
        let mut found = vec![0; BLOCK];
        for region in &self.0 {
            for (offset, expected) in (0..).step_by(BLOCK).zip(region.shadow.chunks(BLOCK)) {
                let found = &mut found[..expected.len()];
                region.memory.read(offset, found);
                if found == expected {
                    continue;
                }
                let wrong = |&i: &usize| found[i] != expected[i];
                let count = (0..found.len()).filter(wrong).count();
                let first = (0..found.len()).find(wrong).unwrap_or(0);
                let what = format!(
                    "memory: byte at {:#x} is {:#04x}, not {:#04x}, and {} more near it",
                    region.iova + (offset + first) as u64,
                    found[first],
                    expected[first],
                    count - 1
                );
                return Err(Failure { what, ..Default::default() }.into());
            }
        }
        Ok(())
    }

    /// Which region `range` begins in, and which bytes of it are in the range; if it is mapped.
    fn find(&self, range: Range<u64>) -> Option<(usize, Range<usize>)> {
        let length = range.end.checked_sub(range.start).filter(|&length| length > 0)?;
        self.0.iter().enumerate().find_map(|(i, region)| {
            let start = usize::try_from(range.start.checked_sub(region.iova)?).ok()?;
            let rest = region.shadow.len().checked_sub(start).filter(|&rest| rest > 0)?;
            let end = start + rest.min(usize::try_from(length).unwrap_or(rest));
            region.mapped.then_some((i, start..end))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_go_where_they_belong() {
        let mut regions = Regions::default();
        for (iova, pages) in [(0x1000, 1), (0x2000, 2), (0x8000, 1)] {
            regions.map(iova, new_memory(iova, pages * PAGE, pages * PAGE).unwrap());
        }
        regions.check().unwrap();
        regions.write(0x1ff8..0x2008, 7);
        let mut expected = [0; 16];
        pattern::fill(&mut expected, 7, 0x1ff8);
        assert_eq!(regions.read(0x1ff8..0x2008), expected);
        // The memory was not written.
        let error = regions.check().unwrap_err().to_string();
        assert!(error.contains("byte at 0x1ff8 "), "{error}");

        assert_eq!(regions.read(0x3ff0..0x9000).len(), 16, "there is a hole");
        regions.unmap(0x2000, 0x2000);
        assert_eq!(regions.read(0x1000..0x9000).len(), 0x1000);
        assert_eq!(regions.read(0x7000..0x9000), []);
    }
}
