// SPDX-License-Identifier: GPL-2.0-only

//! Raw pins in the migration data.

use crate::{
    cost::{KIB, at_most, charged, without_debugging},
    migration_state::{fails, load, not_yet, save},
};
use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Cgroup, Context, Scenario, Skip, scenario};
use mdev_dma::{Opcode, pattern, uapi};
use testbed::fixture::{Fixture, refused, succeeded};
use testbed::{PAGE, at, same};

/// What devices without raw pins do.
pub const SCENARIOS: &[Scenario] = &[scenario(
    "device/migration-state/raw-pins",
    "a stream with raw pins is EOPNOTSUPP and ERROR where devices have none",
    not_supported,
)];

/// What those with them do.
pub const RAW: &[Scenario] = &[
    scenario(
        "device/raw-pin/migration",
        "raw pins arrive as they were: each with its IOVA, pages and protection, to be returned so",
        migration,
    ),
    scenario(
        "device/raw-pin/migration-fails",
        "raw pins that aren't valid, or can't be pinned, fail the load, and none is left",
        migration_fails,
    ),
    scenario(
        "device/raw-pin/cost",
        "memory of MAX_PINS raw pins, a page each; there can't be more",
        cost,
    ),
];

const PAGES: u64 = 64;

/// IOVA, pages and protection of raw pins, some of the same pages.
const PINS: [(u64, u64, u64); 5] = [
    (at(3, 0x800), 2, 3),
    (at(3, 0x800), 2, 1),
    (at(3, 0x800), 2, 3),
    (at(63, 0), 1, 0),
    (at(10, 0xfff), 20, 2),
];

fn has_raw_pins(fixture: &Fixture) -> Result<bool> {
    Ok(fixture.device().limits()?.raw_pins)
}

/// The section of raw pins.
fn section(pins: &[(u64, u64, u64)]) -> Vec<u8> {
    let quads = pins.iter().flat_map(|&(iova, count, prot)| [iova, count | (prot << 32)]);
    let contents: Vec<u8> = quads.flat_map(u64::to_le_bytes).collect();
    let kind = u64::from(uapi::RUST_MDEV_DMA_MIG_RAW_PINS);
    let version = u64::from(uapi::RUST_MDEV_DMA_MIG_VERSION);
    let header = [uapi::RUST_MDEV_DMA_MIG_MAGIC, version | (kind << 32), contents.len() as u64];
    let header: Vec<u8> = header.into_iter().flat_map(u64::to_le_bytes).collect();
    let checksum = pattern::digest(&[&header[..], &contents].concat(), 0);
    [&header[..], &checksum.to_le_bytes(), &contents].concat()
}

fn not_supported(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, PAGES)?;
    ensure!(!has_raw_pins(&fixture)?, Skip("load rust_mdev_dma without raw_pins".into()));
    fixture.pin(0..3)?;
    let stream = save(&fixture)?;
    let other = Fixture::without_mapping(context, 1, PAGES)?;
    other.map(0..PAGES)?;
    let with = |pins| [&stream[..], &section(pins)].concat();
    fails(&other, "raw pins", Errno::EOPNOTSUPP, &with(&PINS))?;
    fails(&other, "no raw pins", Errno::EINVAL, &with(&[]))?;
    load(&other, &stream)
}

fn migration(context: &Context<'_>) -> Result<()> {
    let (fixture, other) = pair(context)?;
    fixture.pin(2..5)?;
    for (iova, count, prot) in PINS {
        let pin = fixture.device().run(Opcode::RawPin as u32, iova, count * PAGE, prot)?;
        succeeded("RAW_PIN", pin)?;
    }
    let stream = save(&fixture)?;
    ensure!(stream.ends_with(&section(&PINS)), "the stream doesn't end with the raw pins");
    other.map(0..PAGES)?;
    load(&other, &stream)?;
    fixture.device().device().reset()?;
    // It goes on where it was loaded.
    crate::migration_state::set(&other, vfio_client::MigState::Running)?;
    same("PINS", 3 + 27, other.device().pins()?)?;
    let run = |op: Opcode, (iova, count, seed): (u64, u64, u64)| {
        other.device().run(op as u32, iova, count * PAGE, seed)
    };
    succeeded("RAW_WRITE", run(Opcode::RawWrite, (at(10, 0xfff), 20, 9))?)?;
    let mut expected = [0];
    pattern::fill(&mut expected, 9, at(10, 0xfff));
    ensure!(other.page(10)[0xfff] == expected[0], "RAW_WRITE wrote elsewhere");
    ensure!(other.page(10)[..0xfff].iter().all(|&byte| byte == 0), "RAW_WRITE wrote too much");
    for pin in PINS {
        succeeded("RAW_UNPIN", run(Opcode::RawUnpin, pin)?)?;
    }
    same("PINS", 3, other.device().pins()?)?;
    succeeded("UNPIN", other.device().unpin(at(2, 0), 3 * PAGE)?)?;
    other.unmap(0..PAGES)
}

fn migration_fails(context: &Context<'_>) -> Result<()> {
    let (fixture, other) = pair(context)?;
    fixture.pin(2..5)?;
    let stream = save(&fixture)?;
    other.map(0..PAGES)?;
    let with = |pins: &[(u64, u64, u64)]| [&stream[..], &section(pins)].concat();
    let both = with(&PINS[..2]);
    fails(&other, "two sections", Errno::EINVAL, &[&both[..], &section(&PINS)].concat())?;
    fails(&other, "an empty section", Errno::EINVAL, &with(&[]))?;
    fails(&other, "no pages", Errno::EINVAL, &with(&[PINS[0], (at(1, 1), 0, 3)]))?;
    for (what, errno, pin) in [
        ("not mapped", Errno::EINVAL, (at(63, 1), 2, 3)),
        ("no such protection", Errno::EPERM, (at(3, 1), 1, 8)),
        ("too many pages", Errno::E2BIG, (at(3, 1), 513, 3)),
    ] {
        not_yet(&other, what, errno, &with(&[PINS[0], pin]))?;
        other.device().device().reset()?;
    }
    let more = [PINS[0], (at(3, 1), 1 << 31, 3)];
    fails(&other, "more than there may be", Errno::ENOSPC, &with(&more))?;
    load(&other, &both)?;
    same("PINS", 3 + 4, other.device().pins()?)
}

/// Two devices with raw pins, the first one with memory mapped.
fn pair(context: &Context<'_>) -> Result<(Fixture, Fixture)> {
    let fixture = Fixture::new(context, PAGES)?;
    ensure!(has_raw_pins(&fixture)?, Skip("load rust_mdev_dma with raw_pins=1".into()));
    Ok((fixture, Fixture::without_mapping(context, 1, PAGES)?))
}

fn cost(context: &Context<'_>) -> Result<()> {
    without_debugging()?;
    // The kernel has a whole number of huge pages for a large array.
    const EACH: u64 = 64 + 2 * 8;
    let fixture = Fixture::new(context, PAGES)?;
    let (device, max) = (fixture.device(), fixture.device().limits()?.max_pins);
    let pin = |n| device.run(Opcode::RawPin as u32, at(n % PAGES, 0), PAGE, 3);
    let cgroup = Cgroup::new()?;
    let bytes = charged(&cgroup, || (0..max).try_for_each(|n| succeeded("RAW_PIN", pin(n)?)))?;
    context.progress(format_args!("{max} raw pins: {} KiB", bytes / KIB));
    at_most("raw pins", max * EACH, bytes)?;
    ensure!(bytes > max * EACH / 2, "{bytes} bytes are charged for {max} pins: not all of them");
    refused("one more RAW_PIN", Errno::ENOSPC, pin(0)?)?;
    same("PINS", max, device.pins()?)
}
