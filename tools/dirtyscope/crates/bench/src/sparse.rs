// SPDX-License-Identifier: GPL-2.0-only

//! What it costs to ask for a large range of IOVA in which little is mapped: page by page, or at once.

use super::{
    Bench, IOVA, PAGE_SIZE,
    axis::{Axis, timed},
    bitmap_of, map,
    measurements::{Expected, Growth},
};
use anyhow::{Result, ensure};
use std::sync::Arc;
use vfio_client::{Memory, UnmapArgs};

/// Measures it, with one page mapped, in the middle.
pub fn run(bench: &Bench<'_>) -> Result<Vec<Growth>> {
    let memory = Arc::new(Memory::new(PAGE_SIZE as usize)?);
    let axis = Axis {
        what: "pages of IOVA",
        amounts: &[1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24],
        operations: ["GET_BITMAP, one by one", "GET_BITMAP of all"],
    };
    let expected = [Some(Expected::LINEAR), Some(Expected::CONSTANT)];
    axis.measure(bench, expected, |pages| {
        let container = bench.container();
        let (mapped, end) = (IOVA + pages / 2 * PAGE_SIZE, IOVA + pages * PAGE_SIZE);
        map(container, &memory, 0, mapped, PAGE_SIZE)?;
        // Dirty: so it can be seen who has found it.
        ensure!(bench.rust.pin(mapped, PAGE_SIZE)?.status == 0, "the page can't be pinned");
        container.dirty_start()?;

        let page = bitmap_of(PAGE_SIZE);
        let word = Memory::new(PAGE_SIZE as usize)?;
        let mut found = 0;
        let each = timed(|| {
            for iova in (IOVA..end).step_by(PAGE_SIZE as usize) {
                container.dirty_bitmap_into(iova, PAGE_SIZE, &page, &word, 0)?;
                if iova == mapped {
                    found = read_word(&word, 0);
                }
            }
            Ok(())
        })?;
        ensure!(found == 1, "the page that is mapped isn't dirty, page by page");

        let bits = bitmap_of(end - IOVA);
        let room = Memory::new((bits.size as usize).next_multiple_of(PAGE_SIZE as usize))?;
        let at = (pages / 2 / 8) as usize;
        // Nobody has to wait for its page.
        room.write(at, &[0; 8]);
        let whole = timed(|| container.dirty_bitmap_into(IOVA, end - IOVA, &bits, &room, 0))?;
        ensure!(read_word(&room, at) == 1, "the page that is mapped isn't dirty");
        container.dirty_stop()?;
        container.unmap(&UnmapArgs { iova: mapped, size: PAGE_SIZE, ..Default::default() })?;
        Ok([Some(each), Some(whole)])
    })
}

fn read_word(memory: &Memory, at: usize) -> u64 {
    let mut bytes = [0; 8];
    memory.read(at, &mut bytes);
    u64::from_le_bytes(bytes)
}
