// SPDX-License-Identifier: GPL-2.0-only

use super::*;
use crate::device::{Command, CommandKind, CommandOutcome};

mod borders;
mod groups;
mod raw;

const PAGE: u64 = 4096;
const LIMITS: Limits = Limits {
    max_pins: 256,
    page_pins: 3,
    max_length: 1 << 20,
    pin_batch: 64 * PAGE,
    dma_chunk: 16 * PAGE,
    raw_pages: Some(8),
};

fn mapping(iova: u64, pages: u64) -> Mapping {
    Mapping { iova, vaddr: 0x7000_0000, size: pages * PAGE, protection: Protection::READ_WRITE }
}

/// The group of devices without an IOMMU.
const EMULATED: u32 = 0;

/// A container without mappings.
fn empty() -> Container {
    let mut container = Container::new(PAGE, 10);
    container.join(EMULATED, GroupKind::Emulated).unwrap();
    container
}

/// A container with `pages` pages at 0, and a device in it.
fn container(pages: u64) -> (Container, DeviceId) {
    let mut container = empty();
    container.map(&mapping(0, pages)).unwrap();
    let id = container.open(EMULATED, LIMITS);
    (container, id)
}

fn run(
    container: &mut Container,
    id: DeviceId,
    kind: CommandKind,
    iova: u64,
    length: u64,
) -> CommandOutcome {
    let kind = Some(kind);
    container.command(id, &Command { kind, iova, length })
}

fn ok(container: &mut Container, id: DeviceId, kind: CommandKind, iova: u64, length: u64) {
    let outcome = run(container, id, kind, iova, length);
    assert_eq!((outcome.status, outcome.count), (Ok(()), length), "{kind:?}");
}

fn fails(
    container: &mut Container,
    id: DeviceId,
    kind: CommandKind,
    iova: u64,
    length: u64,
    errno: Errno,
) -> CommandOutcome {
    let outcome = run(container, id, kind, iova, length);
    assert_eq!(outcome.status, Err(errno.into()), "{kind:?} of {iova:#x}+{length:#x}");
    outcome
}

/// Reads the bitmap of pages `[0, pages)`.
fn read(container: &mut Container, pages: u64) -> Vec<Range<u64>> {
    let size = pages * PAGE;
    let buffer = BitmapBuffer::covering(size, PAGE);
    container.get_bitmap(0, size, &buffer).unwrap().runs()
}

#[test]
fn pinned_pages_are_dirty_until_the_read_after_unpinning() {
    let (mut c, dev) = container(16);
    ok(&mut c, dev, CommandKind::Pin, 2 * PAGE, 3 * PAGE);
    assert!(c.has_pins_in(4 * PAGE..16 * PAGE) && !c.has_pins_in(5 * PAGE..16 * PAGE));
    c.start().unwrap();
    assert_eq!(read(&mut c, 16), [2..5]);
    assert_eq!(read(&mut c, 16), [2..5]);
    ok(&mut c, dev, CommandKind::Unpin, 3 * PAGE, PAGE);
    assert_eq!(read(&mut c, 16), [2..5]);
    assert_eq!(read(&mut c, 16), [2..3, 4..5]);
}

#[test]
fn dma_writes_are_dirty_once() {
    let (mut c, dev) = container(40);
    c.start().unwrap();
    ok(&mut c, dev, CommandKind::DmaWrite, PAGE - 1, 2);
    ok(&mut c, dev, CommandKind::DmaWrite, 20 * PAGE + 5, 1);
    ok(&mut c, dev, CommandKind::DmaRead, 0, 40 * PAGE);
    assert_eq!(read(&mut c, 40), [0..2, 20..21]);
    assert_eq!(read(&mut c, 40), []);
}

#[test]
fn start_is_idempotent_and_stop_forgets() {
    let (mut c, dev) = container(4);
    c.start().unwrap();
    ok(&mut c, dev, CommandKind::DmaWrite, 0, 8);
    c.start().unwrap();
    assert!(c.tracking());
    assert_eq!(read(&mut c, 4), [0..1]);
    ok(&mut c, dev, CommandKind::DmaWrite, 0, 8);
    c.stop();
    c.stop();
    let buffer = BitmapBuffer::covering(4 * PAGE, PAGE);
    assert_eq!(c.get_bitmap(0, 4 * PAGE, &buffer), Err(Errno::EINVAL.into()));
    c.start().unwrap();
    assert_eq!(read(&mut c, 4), []);
}

#[test]
fn start_fails_as_a_whole() {
    let (mut c, _) = container(4);
    c.map(&mapping(1 << 50, BITMAP_PAGES_MAX + 1)).unwrap();
    assert_eq!(c.start(), Err(Errno::EINVAL.into()));
    assert!(!c.tracking());
    c.unmap(1 << 50, (BITMAP_PAGES_MAX + 1) * PAGE).unwrap();
    c.start().unwrap();
    let too_big = mapping(1 << 50, BITMAP_PAGES_MAX + 1);
    assert_eq!(c.map(&too_big), Err(Errno::EINVAL.into()));
}

#[test]
fn ranges_may_club_but_not_bisect() {
    let (mut c, dev) = container(10);
    c.map(&mapping(10 * PAGE, 5)).unwrap();
    c.map(&mapping(20 * PAGE, 5)).unwrap();
    c.start().unwrap();
    ok(&mut c, dev, CommandKind::DmaWrite, 9 * PAGE, 2 * PAGE);
    ok(&mut c, dev, CommandKind::DmaWrite, 24 * PAGE, 1);
    let get = |c: &mut Container, first: u64, pages: u64| {
        let buffer = BitmapBuffer::covering(pages * PAGE, PAGE);
        c.get_bitmap(first * PAGE, pages * PAGE, &buffer).map(|b| b.runs())
    };
    for (first, pages) in [(1, 9), (0, 9), (0, 14), (11, 20), (0, 24), (21, 1)] {
        assert_eq!(get(&mut c, first, pages), Err(Errno::EINVAL.into()), "{first}+{pages}");
    }
    assert_eq!(get(&mut c, 15, 5), Ok(vec![]));
    assert_eq!(get(&mut c, 10, 20), Ok(vec![0..1, 14..15]));
    assert_eq!(read(&mut c, 30), [9..10]);
}

#[test]
fn arguments_of_a_read() {
    let (mut c, _) = container(100);
    c.start().unwrap();
    let size = 100 * PAGE;
    let good = BitmapBuffer::covering(size, PAGE);
    assert_eq!(good.size, 16);
    let get = |c: &mut Container, iova, size, buffer| c.get_bitmap(iova, size, &buffer).err();
    assert_eq!(get(&mut c, 0, size, good), None);
    assert_eq!(get(&mut c, 0, 0, good), Some(Errno::EINVAL.into()));
    assert_eq!(get(&mut c, 1, size, good), Some(Errno::EINVAL.into()));
    assert_eq!(get(&mut c, 0, size + 1, good), Some(Errno::EINVAL.into()));
    assert_eq!(
        get(&mut c, 2 * PAGE, u64::MAX - PAGE + 1, good),
        Some(Errno::EINVAL | Errno::EOVERFLOW)
    );
    for (pgsize, size_of_buffer) in [(0, 16), (2 * PAGE, 16), (PAGE, 8), (PAGE, 1 << 29)] {
        let bad = BitmapBuffer { pgsize, size: size_of_buffer, ..good };
        assert_eq!(get(&mut c, 0, size, bad), Some(Errno::EINVAL.into()), "{bad:?}");
    }
}

#[test]
fn unmap_revokes_and_reports() {
    let (mut c, dev) = container(8);
    c.map(&mapping(8 * PAGE, 8)).unwrap();
    assert_eq!(c.dma_avail(), 8);
    ok(&mut c, dev, CommandKind::Pin, 6 * PAGE, 4 * PAGE);
    ok(&mut c, dev, CommandKind::Pin, 6 * PAGE, PAGE);
    assert_eq!(c.pins(dev), 5);
    c.start().unwrap();
    ok(&mut c, dev, CommandKind::DmaWrite, PAGE, 1);

    let buffer = BitmapBuffer::covering(8 * PAGE, PAGE);
    let (bytes, bitmap) = c.unmap_dirty(0, 8 * PAGE, &buffer).unwrap();
    assert_eq!(bytes, 8 * PAGE);
    assert_eq!(bitmap.runs(), [1..2, 6..8]);
    assert_eq!((c.pins(dev), c.dma_avail()), (2, 9));
    fails(&mut c, dev, CommandKind::Write, 6 * PAGE, PAGE, Errno::ENXIO);
    ok(&mut c, dev, CommandKind::Write, 8 * PAGE, 2 * PAGE);

    assert_eq!(c.unmap(9 * PAGE, PAGE), Err(Errno::EINVAL.into()));
    assert_eq!(c.unmap(0, 8 * PAGE), Ok(0));
    assert_eq!(c.unmap_all(0, PAGE), Err(Errno::EINVAL.into()));
    assert_eq!(c.unmap_all(0, 0), Ok(8 * PAGE));
    assert_eq!((c.pins(dev), c.dma_avail()), (0, 10));
}

#[test]
fn arguments_of_a_map() {
    let (mut c, _) = container(4);
    let good = mapping(8 * PAGE, 4);
    let mut map = |m: Mapping| c.map(&m).err();
    assert_eq!(map(Mapping { size: 0, ..good }), Some(Errno::EINVAL.into()));
    assert_eq!(map(Mapping { size: 1, ..good }), Some(Errno::EINVAL.into()));
    assert_eq!(map(Mapping { iova: 8 * PAGE + 1, ..good }), Some(Errno::EINVAL.into()));
    assert_eq!(map(Mapping { vaddr: 1, ..good }), Some(Errno::EINVAL.into()));
    let nothing = Protection::NONE;
    assert_eq!(map(Mapping { protection: nothing, ..good }), Some(Errno::EINVAL.into()));
    assert_eq!(map(Mapping { iova: 3 * PAGE, ..good }), Some(Errno::EEXIST.into()));
    assert_eq!(map(Mapping { iova: u64::MAX - PAGE + 1, ..good }), Some(Errno::EOVERFLOW.into()));
    for i in 0..9 {
        assert_eq!(map(mapping((100 + i) * PAGE, 1)), None);
    }
    assert_eq!(map(mapping(200 * PAGE, 1)), Some(Errno::ENOSPC.into()));
}

#[test]
fn errors_of_the_device_come_in_order() {
    let (mut c, dev) = container(300);
    let unknown = Command { kind: None, iova: 0, length: 0 };
    assert_eq!(c.command(dev, &unknown).status, Err(Errno::EOPNOTSUPP.into()));
    let f = &mut c;
    fails(f, dev, CommandKind::Pin, 1, 0, Errno::EINVAL);
    fails(f, dev, CommandKind::Pin, 1, u64::MAX, Errno::EOVERFLOW);
    fails(f, dev, CommandKind::Pin, 1, LIMITS.max_length + 1, Errno::E2BIG);
    fails(f, dev, CommandKind::Pin, 1, 257 * PAGE, Errno::E2BIG);
    fails(f, dev, CommandKind::Pin, 1, PAGE, Errno::EINVAL);
    fails(f, dev, CommandKind::Unpin, 0, PAGE, Errno::ENXIO);
    ok(f, dev, CommandKind::Pin, 0, PAGE);
    fails(f, dev, CommandKind::Pin, 0, 256 * PAGE, Errno::ENOSPC);
    fails(f, dev, CommandKind::Unpin, 0, 2 * PAGE, Errno::ENXIO);
    fails(f, dev, CommandKind::Write, PAGE - 1, 2, Errno::ENXIO);
    fails(f, dev, CommandKind::Pin, 300 * PAGE, PAGE, Errno::EINVAL);
    assert_eq!(f.pins(dev), 1);
}

#[test]
fn pins_that_fail_in_a_later_batch_leave_nothing_but_what_was_pinned_for_a_moment() {
    let (mut c, dev) = container(100);
    c.start().unwrap();
    fails(&mut c, dev, CommandKind::Pin, 10 * PAGE, 100 * PAGE, Errno::EINVAL);
    assert_eq!(c.pins(dev), 0);
    assert_eq!(read(&mut c, 100), [10..64]);
    assert_eq!(read(&mut c, 100), []);
}

#[test]
fn dma_stops_where_the_mapping_does() {
    let (mut c, dev) = container(20);
    c.start().unwrap();
    let outcome = fails(&mut c, dev, CommandKind::DmaWrite, PAGE, 30 * PAGE, Errno::EINVAL);
    assert_eq!((outcome.count, outcome.transferred), (15 * PAGE, 19 * PAGE));
    assert_eq!(read(&mut c, 20), [1..20]);
}

#[test]
fn protections() {
    let (mut c, dev) = container(1);
    for (i, protection) in [(1, Protection::READ), (2, Protection::WRITE)] {
        let iova = i * PAGE;
        c.map(&Mapping { protection, ..mapping(iova, 1) }).unwrap();
        fails(&mut c, dev, CommandKind::Pin, iova, PAGE, Errno::EPERM);
        fails(&mut c, dev, CommandKind::DmaWrite, iova, 1, Errno::EPERM);
    }
    ok(&mut c, dev, CommandKind::DmaRead, PAGE, PAGE);
    fails(&mut c, dev, CommandKind::DmaRead, 2 * PAGE, PAGE, Errno::EPERM);
}

#[test]
fn a_page_is_pinned_while_any_device_pins_it() {
    let (mut c, one) = container(4);
    let two = c.open(EMULATED, LIMITS);
    ok(&mut c, one, CommandKind::Pin, 0, PAGE);
    ok(&mut c, two, CommandKind::Pin, 0, 2 * PAGE);
    c.start().unwrap();
    c.close(two);
    assert_eq!(read(&mut c, 4), [0..2]);
    assert_eq!(read(&mut c, 4), [0..1]);
    c.reset(one);
    assert_eq!(read(&mut c, 4), [0..1]);
    assert_eq!(read(&mut c, 4), []);
}

#[test]
fn the_last_page_of_the_address_space() {
    let mut c = empty();
    c.map(&mapping(PAGE.wrapping_neg(), 1)).unwrap();
    let dev = c.open(EMULATED, LIMITS);
    c.start().unwrap();
    ok(&mut c, dev, CommandKind::DmaWrite, PAGE.wrapping_neg(), PAGE - 1);
    fails(&mut c, dev, CommandKind::Pin, PAGE.wrapping_neg(), PAGE, Errno::EOVERFLOW);
    let buffer = BitmapBuffer::covering(PAGE, PAGE);
    let bitmap = c.get_bitmap(PAGE.wrapping_neg(), PAGE, &buffer).unwrap();
    assert_eq!(bitmap.runs(), [0..1]);
    assert_eq!(c.unmap(PAGE.wrapping_neg(), PAGE), Ok(PAGE));
}

#[test]
fn a_bitmap_that_cannot_be_written_loses_nothing() {
    let (mut c, dev) = container(64);
    c.map(&mapping(64 * PAGE, 64)).unwrap();
    c.start().unwrap();
    ok(&mut c, dev, CommandKind::DmaWrite, 3 * PAGE, 1);
    ok(&mut c, dev, CommandKind::DmaWrite, 70 * PAGE, 1);
    ok(&mut c, dev, CommandKind::Pin, 71 * PAGE, PAGE);
    let (size, covering) = (128 * PAGE, BitmapBuffer::covering(128 * PAGE, PAGE));
    for writable in [0, 8] {
        let buffer = BitmapBuffer { writable, ..covering };
        assert_eq!(c.get_bitmap(0, size, &buffer), Err(Errno::EFAULT.into()));
        assert_eq!(c.unmap_dirty(0, size, &buffer), Err(Errno::EFAULT.into()));
    }
    let enough = BitmapBuffer { writable: 16, ..covering };
    assert_eq!(c.get_bitmap(0, size, &enough).unwrap().runs(), [3..4, 70..72]);
    assert_eq!(c.pins(dev), 0);
    // Nothing is mapped there, so nothing is written.
    let nothing = BitmapBuffer { writable: 0, ..covering };
    assert_eq!(c.get_bitmap(size, size, &nothing).unwrap().runs(), []);
}

#[test]
fn memory_that_is_taken_away() {
    let (mut c, dev) = container(8);
    ok(&mut c, dev, CommandKind::Pin, 3 * PAGE, PAGE);
    c.start().unwrap();
    assert_eq!(read(&mut c, 8), [3..4]);
    c.set_hidden(2 * PAGE..4 * PAGE, true);
    let outcome = fails(&mut c, dev, CommandKind::DmaWrite, PAGE, 3 * PAGE, Errno::EFAULT);
    assert_eq!((outcome.count, outcome.transferred), (0, PAGE));
    fails(&mut c, dev, CommandKind::Pin, PAGE, 3 * PAGE, Errno::EFAULT);
    // What is pinned stays so, and can be pinned once more.
    ok(&mut c, dev, CommandKind::Pin, 3 * PAGE, PAGE);
    ok(&mut c, dev, CommandKind::Write, 3 * PAGE, PAGE);
    assert_eq!(read(&mut c, 8), [1..2, 3..4]);
    c.set_hidden(0..8 * PAGE, false);
    ok(&mut c, dev, CommandKind::Pin, PAGE, 3 * PAGE);
}

#[test]
fn locked_pages_are_counted_once_and_limited() {
    let (mut c, one) = container(8);
    let two = c.open(EMULATED, LIMITS);
    ok(&mut c, one, CommandKind::Pin, 0, 2 * PAGE);
    ok(&mut c, two, CommandKind::Pin, PAGE, 2 * PAGE);
    ok(&mut c, two, CommandKind::Pin, PAGE, PAGE);
    assert_eq!(c.locked_pages(), 3);
    c.limit_locked_pages(Some(5));
    c.map(&mapping(8 * PAGE, 8)).unwrap();
    fails(&mut c, one, CommandKind::Pin, 8 * PAGE, 3 * PAGE, Errno::ENOMEM);
    ok(&mut c, one, CommandKind::Pin, 8 * PAGE, 2 * PAGE);
    fails(&mut c, two, CommandKind::Pin, 10 * PAGE, PAGE, Errno::ENOMEM);
    ok(&mut c, two, CommandKind::Pin, 9 * PAGE, PAGE);
    // Mapped by a user without a limit.
    ok(&mut c, two, CommandKind::Pin, 6 * PAGE, 2 * PAGE);
    assert_eq!(c.locked_pages(), 7);
}

#[test]
fn a_mapping_beyond_the_largest_bitmap() {
    let mut c = empty();
    let most = mapping(0, BITMAP_PAGES_MAX);
    let too_large = mapping(1 << 50, BITMAP_PAGES_MAX + 1);
    c.map(&mapping(1 << 60, 1)).unwrap();
    c.map(&most).unwrap();
    c.map(&too_large).unwrap();
    assert_eq!(c.start(), Err(Errno::EINVAL.into()));
    assert!(!c.tracking() && c.mappings().all(|m| m.dirty.is_none()));
    c.unmap(1 << 50, too_large.size).unwrap();
    c.start().unwrap();
    assert_eq!(c.map(&too_large), Err(Errno::EINVAL.into()));
    assert_eq!(c.dma_avail(), 8);
    let buffer = BitmapBuffer::covering(most.size, PAGE);
    assert!(c.get_bitmap(0, most.size, &buffer).unwrap().runs().is_empty());
}

#[test]
fn addresses_are_never_invalid() {
    let (mut c, _) = container(4);
    let vaddr = Mapping { protection: Protection::NONE, ..mapping(0, 4) };
    assert_eq!(c.update_vaddr(&vaddr), Err(Errno::EINVAL.into()));
    assert_eq!(c.update_vaddr(&Mapping { iova: 8 * PAGE, ..vaddr }), Err(Errno::ENOENT.into()));
    assert_eq!(c.update_vaddr(&mapping(8 * PAGE, 4)), Err(Errno::EINVAL | Errno::ENOENT));
    assert_eq!(c.invalidate_vaddr(0, 4 * PAGE, false), Err(Errno::EBUSY.into()));
    assert_eq!(c.invalidate_vaddr(0, 0, false), Err(Errno::EBUSY | Errno::EINVAL));
    assert_eq!(c.invalidate_vaddr(0, 0, true), Err(Errno::EBUSY.into()));
    assert_eq!(c.invalidate_vaddr(0, PAGE, true), Err(Errno::EBUSY | Errno::EINVAL));
}

#[test]
fn what_is_wrong_in_two_ways_is_either() {
    let (mut c, dev) = container(4);
    let either = Errno::EINVAL | Errno::EOVERFLOW;
    let end = PAGE.wrapping_neg();
    assert_eq!(c.map(&Mapping { iova: end + 8, ..mapping(0, 2) }), Err(either));
    assert_eq!(c.map_with_unknown_flag(&mapping(end, 2)), either);
    let unaligned = Mapping { iova: PAGE + 8, ..mapping(0, 1) };
    assert_eq!(c.map(&unaligned), Err(Errno::EINVAL | Errno::EEXIST));
    assert_eq!(c.unmap(end + 8, 2 * PAGE), Err(either));
    assert_eq!(c.unmap_with_unknown_flag(end, 2 * PAGE), either);

    c.start().unwrap();
    let covering = BitmapBuffer::covering(2 * PAGE, PAGE);
    let wrong = BitmapBuffer { pgsize: 0, ..covering };
    assert_eq!(c.get_bitmap(end, 2 * PAGE, &wrong), Err(either));
    assert_eq!(c.unmap_dirty(end, 2 * PAGE, &wrong), Err(either));
    assert_eq!(c.get_bitmap(end, 2 * PAGE, &covering), Err(Errno::EOVERFLOW.into()));

    // Each of several pages of a batch may be the reason, and a page may have two.
    let read_only = Mapping { protection: Protection::READ, ..mapping(4 * PAGE, 2) };
    c.map_backed(&read_only, PAGE).unwrap();
    let pin = |c: &mut Container, page, pages| {
        run(c, dev, CommandKind::Pin, page * PAGE, pages * PAGE).status
    };
    assert_eq!(pin(&mut c, 4, 1), Err(Errno::EPERM.into()));
    assert_eq!(pin(&mut c, 5, 1), Err(Errno::EPERM | Errno::EFAULT));
    assert_eq!(pin(&mut c, 4, 3), Err(Errno::EPERM | Errno::EFAULT | Errno::EINVAL));
    c.limit_locked_pages(Some(1));
    c.map(&mapping(6 * PAGE, 2)).unwrap();
    assert_eq!(pin(&mut c, 6, 3), Err(Errno::ENOMEM | Errno::EINVAL));
    assert_eq!(pin(&mut c, 6, 1), Ok(()));
    assert_eq!(read(&mut c, 4), []);
}
