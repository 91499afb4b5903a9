// SPDX-License-Identifier: GPL-2.0-only

//! What it costs to have many devices in a container.

use super::{
    Bench, Created, DRIVER, IOVA, PAGE_SIZE,
    axis::{Axis, timed},
    bitmap_of, map,
    measurements::{Expected, Growth},
    timed_command,
};
use anyhow::{Result, ensure};
use mdev_dma::{MdevDma, Opcode, sysfs::MdevType};
use std::sync::Arc;
use vfio_client::{Container, Group, Memory, UnmapArgs};

/// Bytes mapped.
const SIZE: u64 = 256 << 20;

const OPERATIONS: [&str; 6] =
    ["join of one more", "PIN of a page", "START", "GET_BITMAP", "STOP", "UNMAP of a pinned page"];

/// A device in a container. Closed before it is removed.
struct Member {
    device: MdevDma,
    _mdev: Created,
}

impl Member {
    /// Opens a device whose group is in the container.
    fn open(container: &Arc<Container>, mdev: Created) -> Result<Self> {
        Ok(Self { device: MdevDma::open(container, &mdev.0.node()?)?, _mdev: mdev })
    }
}

/// Measures it, as far as the driver makes devices.
pub fn run(bench: &Bench<'_>) -> Result<Vec<Growth>> {
    use Expected as E;
    let room = u64::from(MdevType::of_driver(DRIVER)?.available_instances()?);
    let amounts = [1, 4, 16, 64];
    let possible = amounts.iter().filter(|&&amount| amount <= room).count();
    if possible < amounts.len() {
        bench.progress(&format!("no more than {room} devices, see the module's max_instances"));
    }
    let axis = Axis { what: "devices", amounts: &amounts[..possible], operations: OPERATIONS };
    let mut expected = [Some(E::CONSTANT); OPERATIONS.len()];
    // Both go through all of them.
    expected[0] = Some(E::UP_TO_LINEAR);
    expected[OPERATIONS.len() - 1] = Some(E::UP_TO_LINEAR);
    let memory = Arc::new(Memory::new(SIZE as usize)?);
    let room = Memory::new(bitmap_of(SIZE).size as usize)?;
    axis.measure(bench, expected, |amount| {
        // The last one joins when the others are there.
        let first = Created::new(DRIVER)?;
        let container = Container::new(Group::open(&first.0.node()?)?)?;
        let mut members = vec![Member::open(&container, first)?];
        map(&container, &memory, 0, IOVA, SIZE)?;
        let mut join = None;
        for _ in 1..amount {
            let mdev = Created::new(DRIVER)?;
            let group = Group::open(&mdev.0.node()?)?;
            join = Some(timed(|| container.attach(group))?);
            members.push(Member::open(&container, mdev)?);
        }
        let last = &members[members.len() - 1].device;
        let pin = timed_command(last, Opcode::Pin as u32, IOVA, PAGE_SIZE, 0)?;
        let start = timed(|| container.dirty_start())?;
        let get = timed(|| container.dirty_bitmap_into(IOVA, SIZE, &bitmap_of(SIZE), &room, 0))?;
        let mut first = [0];
        room.read(0, &mut first);
        ensure!(first == [1], "a page is pinned, and isn't dirty");
        let stop = timed(|| container.dirty_stop())?;
        let args = UnmapArgs { iova: IOVA, size: SIZE, ..Default::default() };
        let unmap = timed(|| container.unmap(&args).map(drop))?;
        Ok([join, Some(pin), Some(start), Some(get), Some(stop), Some(unmap)])
    })
}
