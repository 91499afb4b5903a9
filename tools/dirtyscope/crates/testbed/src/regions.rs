// SPDX-License-Identifier: GPL-2.0-only

use crate::{PAGE, shadow::Shadow};
use anyhow::Result;
use events::Difference;
use harness::Failure;
use mdev_dma::pattern;
use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{Arc, LazyLock},
};
use vfio_client::{Access, Memory};

/// All memory that is mapped, or was: devices must not change it then.
#[derive(Default)]
pub struct Regions(Vec<Region>);

struct Region {
    iova: u64,
    mapped: bool,
    /// What is mapped of it begins behind its border, and ends before it if there is one.
    memory: Arc<Memory>,
    /// What must be in what is mapped.
    shadow: Shadow,
    /// Pages that the process made inaccessible, by their offset in it.
    hidden: BTreeSet<usize>,
}

/// Bytes around what is mapped that nobody may write to: a page.
pub const BORDER: usize = PAGE as usize;

/// What must be in a page that nobody has written.
const ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];

/// The seed of the pattern in a border.
const BORDER_SEED: u64 = 0x626f_7264_6572;

/// What is in a border.
static BORDER_BYTES: LazyLock<[u8; BORDER]> = LazyLock::new(|| {
    let mut bytes = [0; BORDER];
    pattern::fill(&mut bytes, BORDER_SEED, 0);
    bytes
});

/// New memory for `backed` bytes, behind a border. Up to `size` bytes, at least one, nothing is behind
/// it; if nothing is missing, a border.
pub fn new_memory(size: u64, backed: u64) -> Result<Arc<Memory>> {
    let len = backed.next_multiple_of(PAGE) as usize;
    let guard = (size.max(1).next_multiple_of(PAGE) as usize).saturating_sub(len);
    let behind = if guard == 0 { BORDER } else { 0 };
    let memory = Memory::with_guard(BORDER + len + behind, guard)?;
    memory.write(0, &*BORDER_BYTES);
    if guard == 0 {
        memory.write(BORDER + len, &*BORDER_BYTES);
    }
    Ok(Arc::new(memory))
}

impl Regions {
    /// The memory that is mapped at `iova`, if it has as many bytes and as many behind them.
    pub fn memory_at(&self, iova: u64, size: u64) -> Option<Arc<Memory>> {
        let mut mapped = self.0.iter().filter(|region| region.mapped && region.iova == iova);
        let memory = mapped.next().map(|region| region.memory.clone());
        memory.filter(|memory| size <= (memory.span() - BORDER) as u64)
    }

    /// `memory`, made by [`new_memory`], was mapped.
    pub fn map(&mut self, iova: u64, memory: Arc<Memory>) {
        // Without a guard there is another border.
        let behind = if memory.span() > memory.len() { 0 } else { BORDER };
        let shadow = Shadow::zeroed(memory.len() - BORDER - behind);
        let hidden = BTreeSet::new();
        self.0.push(Region { iova, mapped: true, memory, shadow, hidden });
    }

    /// What was mapped in a range isn't any more. What was hidden of it can be seen again.
    pub fn unmap(&mut self, iova: u64, size: u64) -> Result<()> {
        for region in self.0.iter_mut().filter(|region| region.mapped) {
            if region.iova >= iova && region.iova - iova < size {
                region.mapped = false;
                for page in std::mem::take(&mut region.hidden) {
                    region.set_access(page..page + PAGE as usize, Access::ReadWrite)?;
                }
            }
        }
        Ok(())
    }

    /// The process takes pages of a range away from itself, as far as they are mapped; or gives them
    /// back.
    pub fn set_hidden(&mut self, iova: u64, size: u64, hidden: bool) -> Result<()> {
        for (region, bytes) in self.parts(iova, size) {
            let region = &mut self.0[region];
            let access = if hidden { Access::None } else { Access::ReadWrite };
            region.set_access(bytes.clone(), access)?;
            for page in bytes.step_by(PAGE as usize) {
                if hidden {
                    region.hidden.insert(page);
                } else {
                    region.hidden.remove(&page);
                }
            }
        }
        Ok(())
    }

    /// A device writes the pattern of `seed` to as much of `range` as is mapped from its begin on.
    pub fn write(&mut self, range: Range<u64>, seed: u64) {
        let mut iova = range.start;
        while let Some((region, bytes)) = self.find(iova..range.end) {
            let region = &mut self.0[region];
            let (begin, len) = (region.iova, bytes.len());
            region.shadow.change(bytes, |at, part| pattern::fill(part, seed, begin + at as u64));
            iova += len as u64;
        }
    }

    /// A device copies bytes that are all mapped to others.
    pub fn copy(&mut self, from: u64, to: u64, length: u64) {
        let bytes = self.read(from..from + length);
        let mut done = 0;
        while let Some((region, part)) = self.find(to + done as u64..to + length) {
            self.0[region].shadow.change(part, |_, part| {
                part.copy_from_slice(&bytes[done..done + part.len()]);
                done += part.len();
            });
        }
    }

    /// The process itself writes the pattern of `seed` to what is mapped and not hidden of a range.
    pub fn user_write(&mut self, iova: u64, length: u64, seed: u64) {
        for (region, bytes) in self.parts(iova, length) {
            let region = &mut self.0[region];
            for part in visible(&region.hidden, bytes) {
                let (iova, memory) = (region.iova, &region.memory);
                region.shadow.change(part, |at, part| {
                    pattern::fill(part, seed, iova + at as u64);
                    memory.write(BORDER + at, part);
                });
            }
        }
    }

    /// What must be in `range`, as far as it is mapped from its begin on.
    pub fn read(&self, range: Range<u64>) -> Vec<u8> {
        let mut read = Vec::new();
        while let Some((region, bytes)) = self.find(range.start + read.len() as u64..range.end) {
            self.0[region].shadow.read(bytes, &mut read);
        }
        read
    }

    /// Expects the byte at `iova`, which is mapped, to be another than it is.
    pub fn falsify(&mut self, iova: u64) {
        let (region, at) = self.find(iova..iova + 1).expect("mapped memory");
        self.0[region].shadow.change(at, |_, byte| byte[0] ^= 1);
    }

    /// Compares all memory that isn't hidden, and its borders, with what must be in it.
    pub fn check(&self) -> Result<()> {
        self.check_borders(usize::MAX)?;
        for region in &self.0 {
            for part in visible(&region.hidden, 0..region.shadow.len()) {
                region.check(part)?;
            }
        }
        Ok(())
    }

    /// Compares the borders of the memory that was mapped in the last so many mappings.
    pub fn check_borders(&self, count: usize) -> Result<()> {
        for region in self.0.iter().rev().take(count) {
            let behind = BORDER + region.shadow.len();
            let both = [(0, "before"), (behind, "behind")];
            for (at, place) in both.into_iter().filter(|&(at, _)| at < region.memory.len()) {
                if let Some(word) = region.memory.first_difference(at, &*BORDER_BYTES) {
                    let what = format!(
                        "memory: what is {place} that of the mapping at {:#x} was written, at byte {word:#x}",
                        region.iova
                    );
                    return Err(Failure::new(what).into());
                }
            }
        }
        Ok(())
    }

    /// Which regions have bytes of a range, and which.
    fn parts(&self, iova: u64, size: u64) -> Vec<(usize, Range<usize>)> {
        let regions = self.0.iter().enumerate().filter(|(_, region)| region.mapped);
        let parts = regions.filter_map(|(i, region)| {
            let (start, before) =
                (iova.saturating_sub(region.iova), region.iova.saturating_sub(iova));
            let rest = (region.shadow.len() as u64).checked_sub(start)?;
            let len = size.checked_sub(before)?.min(rest);
            (len > 0).then_some((i, start as usize..(start + len) as usize))
        });
        parts.collect()
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

impl Region {
    /// Lets the process do no more than `access` to bytes of what is mapped.
    fn set_access(&self, bytes: Range<usize>, access: Access) -> Result<()> {
        Ok(self.memory.set_access(BORDER + bytes.start..BORDER + bytes.end, access)?)
    }

    /// Compares bytes, whole pages, with what must be in them.
    fn check(&self, bytes: Range<usize>) -> Result<()> {
        let populated = self.memory.populated(BORDER + bytes.start..BORDER + bytes.end);
        for ((part, written), populated) in self.shadow.parts(bytes).zip(populated) {
            // What is neither there nor must be needs no page to be read, and isn't given one.
            if written.is_none() && !populated {
                continue;
            }
            let expected = written.unwrap_or(&ZEROES);
            if let Some(word) = self.memory.first_difference(BORDER + part.start, expected) {
                return Err(self.difference(part.start + word));
            }
        }
        Ok(())
    }

    /// What is to be said of a word that differs.
    fn difference(&self, word: usize) -> anyhow::Error {
        let mut found = [0; 8];
        self.memory.read(BORDER + word, &mut found);
        let mut expected = Vec::new();
        self.shadow.read(word..word + found.len(), &mut expected);
        let byte = (0..found.len()).find(|&i| found[i] != expected[i]).unwrap_or(0);
        let at = self.iova + (word + byte) as u64;
        let what =
            format!("memory: byte at {at:#x} is {:#04x}, not {:#04x}", found[byte], expected[byte]);
        Failure(Difference { what, at: Some(at), ..Default::default() }).into()
    }
}

/// The parts of `bytes` that aren't in `hidden` pages.
fn visible(hidden: &BTreeSet<usize>, bytes: Range<usize>) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let mut next = bytes.start;
    let first = bytes.start - bytes.start % PAGE as usize;
    for &page in hidden.range(first..bytes.end) {
        parts.push(next..page);
        next = page + PAGE as usize;
    }
    parts.push(next..bytes.end);
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_go_where_they_belong() {
        let mut regions = Regions::default();
        for (iova, pages) in [(0x1000, 1), (0x2000, 2), (0x8000, 1)] {
            regions.map(iova, new_memory(pages * PAGE, pages * PAGE).unwrap());
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
        regions.unmap(0x2000, 0x2000).unwrap();
        assert_eq!(regions.read(0x1000..0x9000).len(), 0x1000);
        assert!(regions.read(0x7000..0x9000).is_empty());
    }

    #[test]
    fn borders_are_watched() {
        for (backed, borders) in [(2, 2), (1, 1), (0, 1)] {
            let memory = new_memory(2 * PAGE, backed * PAGE).unwrap();
            let mut regions = Regions::default();
            regions.map(0x1000, memory.clone());
            regions.check().unwrap();
            let end = BORDER + (backed * PAGE) as usize;
            for (at, place) in [(BORDER - 8, "before"), (end, "behind")].into_iter().take(borders) {
                memory.write(at, &[1; 8]);
                let error = regions.check_borders(1).unwrap_err().to_string();
                assert!(error.contains(place), "{error}");
                regions.check_borders(0).unwrap();
                memory.write(0, &*BORDER_BYTES);
            }
        }
    }

    #[test]
    fn hidden_pages_are_left_alone() {
        let mut regions = Regions::default();
        regions.map(0x1000, new_memory(4 * PAGE, 4 * PAGE).unwrap());
        regions.set_hidden(0x2000, 0x1000, true).unwrap();
        regions.user_write(0x1800, 0x2000, 3);
        regions.check().unwrap();
        assert_eq!(regions.read(0x2000..0x2010), [0; 16]);
        regions.falsify(0x2004);
        regions.check().unwrap();
        regions.set_hidden(0x0, 0x10000, false).unwrap();
        assert!(regions.check().unwrap_err().to_string().contains("byte at 0x2004 "));

        regions.set_hidden(0x2000, 0x1000, true).unwrap();
        regions.unmap(0, 0x10000).unwrap();
        assert!(regions.check().is_err(), "what is unmapped can be seen");
    }
}
