// SPDX-License-Identifier: GPL-2.0-only

//! The kernel memory that drivers take for what they keep pinned.

use super::{
    Bench, C_DRIVER, DRIVER, IOVA, PAGE_SIZE,
    measurements::{Footprint, Goal},
    timed_command,
};
use anyhow::{Context as _, Result};
use mdev_dma::{MdevDma, Opcode, uapi};
use std::{fs, sync::Arc};
use vfio_client::Memory;

const SLABINFO: &str = "/proc/slabinfo";

/// The caches that drivers take memory for pins from: those of `kmalloc()`, and that of `xarray`.
const CACHES: [&str; 2] = ["kmalloc-", "radix_tree_node"];

/// Bytes mapped.
const SIZE: u64 = 256 << 20;

/// Bytes that a pinned page may take.
const GOAL: f64 = 16.0;

/// Measures it for both drivers. type1 has an entry for every page that is pinned, whoever pins it: so
/// the other device has pinned the pages before, and all that is taken is the driver's.
pub fn run(bench: &Bench<'_>) -> Result<Vec<Footprint>> {
    bench.progress("memory for pins");
    let memory = Arc::new(Memory::new(SIZE as usize)?);
    bench.map(&memory, 0, SIZE)?;

    let mut rows = Vec::new();
    let (rust, c) = (&bench.rust, &bench.c);
    for (driver, device, other) in [(DRIVER, rust, c), (C_DRIVER, c, rust)] {
        for (pins, step) in [
            ("side by side", 1),
            ("one in each batch of 64", u64::from(uapi::RUST_MDEV_DMA_PIN_BATCH)),
        ] {
            let bytes_per_page = measure(device, other, step)?;
            let judged = step == 1 && driver == DRIVER;
            let goal = judged.then(|| Goal::at_most(GOAL, bytes_per_page));
            rows.push(Footprint { driver, pins, bytes_per_page, goal });
        }
    }
    bench.unmap(SIZE)?;
    Ok(rows)
}

/// Bytes that `device` takes for a page, if it pins one of every `step` pages.
fn measure(device: &MdevDma, other: &MdevDma, step: u64) -> Result<f64> {
    let pages = SIZE / PAGE_SIZE / step;
    for_each(other, Opcode::Pin, step)?;
    let before = allocated()?;
    for_each(device, Opcode::Pin, step)?;
    let after = allocated()?;
    for_each(device, Opcode::Unpin, step)?;
    for_each(other, Opcode::Unpin, step)?;
    Ok((after as f64 - before as f64) / pages as f64)
}

fn for_each(device: &MdevDma, op: Opcode, step: u64) -> Result<()> {
    if step == 1 {
        return timed_command(device, op as u32, IOVA, SIZE, 0).map(drop);
    }
    (0..SIZE).step_by((step * PAGE_SIZE) as usize).try_for_each(|offset| {
        timed_command(device, op as u32, IOVA + offset, PAGE_SIZE, 0).map(drop)
    })
}

/// Bytes that are allocated from the caches.
fn allocated() -> Result<u64> {
    let needs = "needs root, and a kernel with CONFIG_SLUB_DEBUG";
    let read = || fs::read_to_string(SLABINFO).with_context(|| format!("{SLABINFO}: {needs}"));
    // What is free in a CPU's stock counts as allocated: have it flushed.
    for line in caches(&read()?) {
        let name = line.split_whitespace().next().unwrap_or_default();
        let path = format!("/sys/kernel/slab/{name}/shrink");
        fs::write(&path, "1").with_context(|| format!("{path}: {needs}"))?;
    }
    allocated_bytes(&read()?).with_context(|| format!("{SLABINFO} is not as expected"))
}

fn caches(slabinfo: &str) -> impl Iterator<Item = &str> {
    slabinfo.lines().filter(|line| CACHES.iter().any(|cache| line.starts_with(cache)))
}

/// The sum over all caches. A line has the cache's name, its objects that are allocated, all its
/// objects, and the bytes of one.
fn allocated_bytes(slabinfo: &str) -> Option<u64> {
    caches(slabinfo)
        .map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let active: u64 = fields.next()?.parse().ok()?;
            let size: u64 = fields.nth(1)?.parse().ok()?;
            Some(active * size)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_up() {
        let text = "slabinfo - version: 2.1\n\
                    # name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>\n\
                    vm_area_struct      3000   3100    192   21    1 : tunables 0 0 0\n\
                    kmalloc-rnd-01-64     10     64     64   64    1 : tunables 0 0 0\n\
                    kmalloc-512            3      8    512    8    1 : tunables 0 0 0\n";
        assert_eq!(allocated_bytes(text), Some(10 * 64 + 3 * 512));
        assert_eq!(allocated_bytes("kmalloc-8 many"), None);
    }
}
