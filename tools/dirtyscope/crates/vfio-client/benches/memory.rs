// SPDX-License-Identifier: GPL-2.0-only

//! How fast memory is compared with what must be in it, beside `memcmp()` of as much.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use vfio_client::Memory;

const BYTES: usize = 64 << 20;

fn compare(c: &mut Criterion) {
    let expected: Vec<u8> = (0..BYTES).map(|i| (i >> 3) as u8).collect();
    let same = expected.clone();
    let memory = Memory::new(BYTES).expect("memory");
    memory.write(0, &expected);

    let mut group = c.benchmark_group("compare");
    group.throughput(Throughput::Bytes(BYTES as u64));
    group.bench_function("memcmp", |b| b.iter(|| black_box(&expected) == black_box(&same)));
    group.bench_function("first_difference", |b| b.iter(|| memory.first_difference(0, &expected)));
    group.finish();
}

criterion_group!(benches, compare);
criterion_main!(benches);
