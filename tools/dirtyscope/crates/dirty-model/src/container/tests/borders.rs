// SPDX-License-Identifier: GPL-2.0-only

//! What lies beside what an operation is about, and limits that are just reached.

use super::*;

/// A container with mappings of pages 4 to 8, 8 to 12 and 40 to 44, all written to, and page 12 pinned, which is
/// in a mapping of its own.
fn neighbours() -> (Container, DeviceId) {
    let mut c = empty();
    for (first, pages) in [(4, 4), (8, 4), (12, 1), (40, 4)] {
        c.map(&mapping(first * PAGE, pages)).unwrap();
    }
    let dev = c.open(EMULATED, LIMITS);
    c.start().unwrap();
    for page in [5, 9, 41] {
        ok(&mut c, dev, CommandKind::DmaWrite, page * PAGE, 1);
    }
    ok(&mut c, dev, CommandKind::Pin, 12 * PAGE, PAGE);
    (c, dev)
}

/// Pages 8 to 12.
const MIDDLE: (u64, u64) = (8 * PAGE, 4 * PAGE);

/// Reads the bitmap of pages.
fn read_pages(c: &mut Container, pages: Range<u64>) -> Vec<Range<u64>> {
    let size = (pages.end - pages.start) * PAGE;
    let bitmap =
        c.get_bitmap(pages.start * PAGE, size, &BitmapBuffer::covering(size, PAGE)).unwrap();
    assert_eq!(bitmap.pages(), pages.end - pages.start);
    bitmap.runs().into_iter().map(|run| pages.start + run.start..pages.start + run.end).collect()
}

#[test]
fn a_read_forgets_nothing_of_its_neighbours() {
    let (mut c, _) = neighbours();
    assert_eq!(read_pages(&mut c, 8..12), [9..10]);
    assert_eq!(read_pages(&mut c, 0..64), [5..6, 12..13, 41..42]);
}

#[test]
fn an_unmap_leaves_its_neighbours() {
    let (iova, size) = MIDDLE;
    for with_bitmap in [false, true] {
        let (mut c, dev) = neighbours();
        if with_bitmap {
            let buffer = BitmapBuffer::covering(size, PAGE);
            let (bytes, bitmap) = c.unmap_dirty(iova, size, &buffer).unwrap();
            assert_eq!((bytes, bitmap.runs(), bitmap.pages()), (size, vec![1..2], 4));
        } else {
            assert_eq!(c.unmap(iova, size), Ok(size));
        }
        assert_eq!((c.mappings().count(), c.pins(dev)), (3, 1));
        assert_eq!(read_pages(&mut c, 0..64), [5..6, 12..13, 41..42]);
    }
}

#[test]
fn invalid_addresses_are_those_of_the_range() {
    let (iova, size) = MIDDLE;
    let mut c = Container::new(PAGE, 10);
    c.join(1, GroupKind::Iommu { ranges: vec![0..=u64::MAX], shared: false }).unwrap();
    for (first, pages) in [(4, 4), (8, 4), (12, 1), (40, 4)] {
        c.map(&mapping(first * PAGE, pages)).unwrap();
    }
    assert_eq!(c.invalidate_vaddr(iova, size, false), Ok(size));
    let vaddr =
        |first, pages| Mapping { protection: Protection::NONE, ..mapping(first * PAGE, pages) };
    for (first, pages) in [(4, 4), (12, 1), (40, 4)] {
        let kept = c.update_vaddr(&vaddr(first, pages));
        assert_eq!(kept, Err(Errno::EINVAL.into()), "{first}");
    }
    assert_eq!(c.update_vaddr(&vaddr(8, 4)), Ok(()));
}

#[test]
fn what_is_mapped_while_tracking_is_tracked() {
    let (mut c, dev) = container(4);
    c.start().unwrap();
    c.map(&mapping(64 * PAGE, 200)).unwrap();
    assert_eq!(read_pages(&mut c, 0..264), []);
    ok(&mut c, dev, CommandKind::DmaWrite, 263 * PAGE, 1);
    assert_eq!(read_pages(&mut c, 64..264), [263..264]);
    // The largest there is.
    c.map(&mapping(1 << 50, BITMAP_PAGES_MAX)).unwrap();
}

#[test]
fn the_largest_buffer_for_a_bitmap() {
    let (mut c, _) = container(4);
    c.start().unwrap();
    let max = BitmapBuffer::bytes(BITMAP_PAGES_MAX);
    let mut get = |size| {
        let buffer = BitmapBuffer { size, ..BitmapBuffer::covering(4 * PAGE, PAGE) };
        c.get_bitmap(0, 4 * PAGE, &buffer).map(drop)
    };
    assert_eq!(get(max), Ok(()));
    assert_eq!(get(max + 1), Err(Errno::EINVAL.into()));
    // And the smallest.
    assert_eq!(get(8), Ok(()));
    assert_eq!(get(7), Err(Errno::EINVAL.into()));
}

#[test]
fn a_bitmap_ends_with_its_last_mapping() {
    let (mut c, dev) = container(64);
    c.map(&mapping(64 * PAGE, 64)).unwrap();
    c.start().unwrap();
    ok(&mut c, dev, CommandKind::DmaWrite, 64 * PAGE, 1);
    let size = 64 * PAGE;
    let mut get = |writable| {
        let buffer = BitmapBuffer { writable, ..BitmapBuffer::covering(size, PAGE) };
        c.get_bitmap(64 * PAGE, size, &buffer).map(|bitmap| bitmap.runs())
    };
    assert_eq!(get(0), Err(Errno::EFAULT.into()));
    assert_eq!(get(8), Ok(vec![0..1]));
}

#[test]
fn nothing_but_whole_pages() {
    let (mut c, dev) = container(4);
    c.start().unwrap();
    let einval = Err(Errno::EINVAL.into());
    // In places where nothing else is wrong: one of them, the other, and both by as much.
    for (more, longer) in [(8, 0), (0, 8), (8, 8)] {
        assert_eq!(c.unmap(100 * PAGE + more, PAGE + longer), einval, "{more} {longer}");
        for (iova, vaddr, size) in [(more, longer, 0), (more, 0, longer), (0, more, longer)] {
            let good = mapping(100 * PAGE, 2);
            let bad = Mapping {
                iova: good.iova + iova,
                vaddr: good.vaddr + vaddr,
                size: good.size + size,
                ..good
            };
            assert_eq!(c.map(&bad), Err(Errno::EINVAL.into()), "{bad:?}");
        }
        fails(&mut c, dev, CommandKind::Pin, more, PAGE + longer, Errno::EINVAL);
    }
    fails(&mut c, dev, CommandKind::Pin, 8, PAGE - 8, Errno::EINVAL);
}

#[test]
fn the_most_that_a_device_pins() {
    let (mut c, dev) = container(300);
    ok(&mut c, dev, CommandKind::DmaRead, 0, LIMITS.max_length);
    ok(&mut c, dev, CommandKind::Pin, 40 * PAGE, 256 * PAGE);
    fails(&mut c, dev, CommandKind::Pin, 0, PAGE, Errno::ENOSPC);
    ok(&mut c, dev, CommandKind::Unpin, 40 * PAGE, 256 * PAGE);
    // Of one page.
    for _ in 0..LIMITS.page_pins {
        ok(&mut c, dev, CommandKind::Pin, 2 * PAGE, PAGE);
    }
    fails(&mut c, dev, CommandKind::Pin, 2 * PAGE, PAGE, Errno::ENOSPC);
    fails(&mut c, dev, CommandKind::Pin, PAGE, 2 * PAGE, Errno::ENOSPC);
    ok(&mut c, dev, CommandKind::Pin, 3 * PAGE, 2 * PAGE);
    assert_eq!((c.pins(dev), c.locked_pages()), (5, 3));
    ok(&mut c, dev, CommandKind::Unpin, 2 * PAGE, PAGE);
    ok(&mut c, dev, CommandKind::Pin, 2 * PAGE, PAGE);
    assert_eq!(c.pinned(dev).collect::<Vec<_>>(), [2 * PAGE, 3 * PAGE, 4 * PAGE]);
    c.revoke(dev, 2 * PAGE..3 * PAGE);
    assert_eq!(c.pins(dev), 2);
    let two = c.open(EMULATED, LIMITS);
    ok(&mut c, two, CommandKind::Pin, 3 * PAGE, PAGE);
    c.revoke(two, 0..300 * PAGE);
    assert_eq!((c.pins(dev), c.pins(two)), (2, 0), "only its own");
}

#[test]
fn a_write_goes_as_far_as_it_may() {
    let (mut c, dev) = container(4);
    c.map(&Mapping { protection: Protection::READ, ..mapping(4 * PAGE, 4) }).unwrap();
    c.start().unwrap();
    let outcome = fails(&mut c, dev, CommandKind::DmaWrite, 2 * PAGE + 8, 4 * PAGE, Errno::EPERM);
    assert_eq!((outcome.count, outcome.transferred), (0, 2 * PAGE - 8));
    assert_eq!(read_pages(&mut c, 0..8), [2..4]);
}

#[test]
fn memory_is_hidden_by_the_page() {
    let mut c = empty();
    // At a page whose number is larger than that of bytes in one.
    let first = 2 * PAGE;
    c.map_backed(&mapping(first * PAGE, 4), 3 * PAGE).unwrap();
    let dev = c.open(EMULATED, LIMITS);
    let at = |page: u64| (first + page) * PAGE;
    c.set_hidden(at(1)..at(2), true);
    c.set_hidden(at(3)..at(4), true);
    for (iova, errno) in [
        (at(0), false),
        (at(1), true),
        (at(1) + 8, true),
        (at(2), false),
        (at(2) + 8, false),
        (at(3), true),
    ] {
        let status = run(&mut c, dev, CommandKind::DmaRead, iova, 1).status;
        assert_eq!(status.is_err(), errno, "{iova:#x}");
    }
    c.set_hidden(at(0)..at(4), false);
    ok(&mut c, dev, CommandKind::DmaRead, at(0), 3 * PAGE);
    fails(&mut c, dev, CommandKind::DmaRead, at(3), 1, Errno::EFAULT);
}
