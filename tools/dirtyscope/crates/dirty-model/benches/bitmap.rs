// SPDX-License-Identifier: GPL-2.0-only

//! How fast a reported bitmap is compared with the expected one: 32 MiB, those of a guest of 1 TiB.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dirty_model::Bitmap;

const BYTES: u64 = 32 << 20;
const PAGES: u64 = BYTES * 8;

/// A bitmap with runs of `run` pages, one after every `every`.
fn bitmap(every: u64, run: u64) -> Bitmap {
    let mut bitmap = Bitmap::new(PAGES);
    for start in (0..PAGES).step_by(every as usize) {
        bitmap.set(start..start + run);
    }
    bitmap
}

fn diff(c: &mut Criterion) {
    let mut group = c.benchmark_group("diff");
    group.throughput(Throughput::Bytes(BYTES));
    for (name, every, run) in [("clean", PAGES, 1), ("sparse", 1000, 3), ("dense", 64, 40)] {
        let (expected, reported) = (bitmap(every, run), bitmap(every, run));
        group.bench_function(name, |b| b.iter(|| expected.diff(&reported)));
    }
    // One page in four thousand is lost.
    let (expected, reported) = (bitmap(4096, 3), bitmap(4096, 2));
    group.bench_function("lost", |b| b.iter(|| expected.diff(&reported)));
    group.finish();
}

criterion_group!(benches, diff);
criterion_main!(benches);
