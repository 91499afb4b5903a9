// SPDX-License-Identifier: GPL-2.0-only

//! Raw pins.

use super::*;

fn raw(c: &mut Container, dev: DeviceId, iova: u64, pages: u64, protection: u64) -> Option<Errnos> {
    run(c, dev, CommandKind::RawPin(protection), iova, pages * PAGE).status.err()
}

#[test]
fn a_raw_pin_is_of_the_pages_that_contain_it() {
    let (mut c, dev) = container(4);
    c.map(&mapping(4 * PAGE, 2)).unwrap();
    c.start().unwrap();
    assert_eq!(raw(&mut c, dev, 3 * PAGE + 0x800, 2, 3), None);
    assert_eq!(read(&mut c, 6), [3..5]);
    assert_eq!((c.pins(dev), c.locked_pages()), (2, 2));
    let wrote = run(&mut c, dev, CommandKind::RawWrite, 3 * PAGE + 0x800, 2 * PAGE);
    assert_eq!((wrote.count, wrote.transferred), (0x1800, 0x1800));
    // It is a page of its own right: PIN has not pinned it.
    fails(&mut c, dev, CommandKind::Write, 3 * PAGE, PAGE, Errno::ENXIO);
    // One page that is pinned at several offsets is locked once.
    assert_eq!(raw(&mut c, dev, 3 * PAGE + 1, 1, 0), None);
    ok(&mut c, dev, CommandKind::Pin, 3 * PAGE, PAGE);
    assert_eq!((c.pins(dev), c.locked_pages()), (4, 2));
    fails(&mut c, dev, CommandKind::RawRead, 3 * PAGE + 1, PAGE, Errno::EACCES);
    fails(&mut c, dev, CommandKind::RawRead, 3 * PAGE, PAGE, Errno::ENXIO);
    fails(&mut c, dev, CommandKind::RawUnpin(1), 3 * PAGE + 1, PAGE, Errno::ENXIO);
    ok(&mut c, dev, CommandKind::RawUnpin(0), 3 * PAGE + 1, PAGE);
    // A raw pin goes as a whole.
    c.unmap(4 * PAGE, 2 * PAGE).unwrap();
    assert_eq!((c.pins(dev), c.locked_pages()), (1, 1));
    fails(&mut c, dev, CommandKind::RawRead, 3 * PAGE + 0x800, 2 * PAGE, Errno::ENXIO);
}

#[test]
fn raw_pins_that_are_refused_change_nothing() {
    let (mut c, dev) = container(2);
    c.map(&Mapping { protection: Protection::READ, ..mapping(2 * PAGE, 10) }).unwrap();
    c.start().unwrap();
    let one = |errno: Errno| Some(Errnos::from(errno));
    assert_eq!(raw(&mut c, dev, 12 * PAGE, 1, 1), one(Errno::EINVAL));
    assert_eq!(raw(&mut c, dev, 11 * PAGE + 1, 2, 1), one(Errno::EINVAL));
    assert_eq!(raw(&mut c, dev, 1, 0, 1), one(Errno::EINVAL));
    assert_eq!(raw(&mut c, dev, 2 * PAGE, 1, 2), one(Errno::EPERM));
    assert_eq!(raw(&mut c, dev, 0, 1, 4), one(Errno::EPERM));
    assert_eq!(raw(&mut c, dev, 0, 9, 1), one(Errno::E2BIG));
    assert_eq!(raw(&mut c, dev, PAGE, 2, 3), one(Errno::EPERM));
    assert_eq!(raw(&mut c, dev, 1, 1, 1 << 32), one(Errno::EINVAL));
    assert_eq!(raw(&mut c, dev, 1, 300, 1), one(Errno::E2BIG));
    assert_eq!(raw(&mut c, dev, 0, 256, 1), Some(Errno::E2BIG | Errno::EINVAL));
    assert_eq!(raw(&mut c, dev, PAGE.wrapping_neg() + 1, 2, 1), one(Errno::EOVERFLOW));
    fails(&mut c, dev, CommandKind::RawPin(1), 0, PAGE + 8, Errno::EINVAL);
    assert_eq!((c.pins(dev), c.locked_pages()), (0, 0));
    assert!(read(&mut c, 2).is_empty());
    assert_eq!(raw(&mut c, dev, 2 * PAGE + 5, 8, 1), None);

    let none = c.open(EMULATED, Limits { raw_pages: None, ..LIMITS });
    assert_eq!(raw(&mut c, none, 0, 1, 1), one(Errno::EOPNOTSUPP));
}

#[test]
fn the_last_page_of_the_address_space_can_be_pinned_raw() {
    let mut c = empty();
    c.map(&mapping(PAGE.wrapping_neg(), 1)).unwrap();
    let dev = c.open(EMULATED, LIMITS);
    c.start().unwrap();
    assert_eq!(raw(&mut c, dev, u64::MAX - 7, 1, 3), None);
    fails(&mut c, dev, CommandKind::RawWrite, u64::MAX - 7, PAGE, Errno::EOVERFLOW);
    let buffer = BitmapBuffer::covering(PAGE, PAGE);
    let bitmap = c.get_bitmap(PAGE.wrapping_neg(), PAGE, &buffer).unwrap();
    assert_eq!((bitmap.runs(), c.locked_pages()), (vec![0..1], 1));
    c.unmap(PAGE.wrapping_neg(), PAGE).unwrap();
    assert_eq!(c.pins(dev), 0);
}

#[test]
fn a_raw_pin_ends_with_its_last_page() {
    let (mut c, dev) = container(4);
    c.map(&mapping(4 * PAGE, 4)).unwrap();
    ok(&mut c, dev, CommandKind::Pin, 0, PAGE);
    ok(&mut c, dev, CommandKind::Pin, 7 * PAGE, PAGE);
    assert_eq!(raw(&mut c, dev, PAGE + 8, 3, 3), None);
    let pin = RawPin { iova: PAGE + 8, length: 3 * PAGE, protection: 3 };
    assert_eq!(c.raw_pins(dev), [pin]);
    assert_eq!(c.all_pinned(dev).collect::<Vec<_>>(), [0, 7 * PAGE, PAGE, 2 * PAGE, 3 * PAGE]);
    assert_eq!([0, 1, 3, 4].map(|page| c.is_pinned(page * PAGE)), [true, true, true, false]);
    // Behind it, and before it.
    c.revoke(dev, 4 * PAGE..8 * PAGE);
    assert_eq!((c.pins(dev), c.raw_pins(dev).len()), (4, 1));
    c.revoke(dev, 0..PAGE);
    assert_eq!((c.pins(dev), c.raw_pins(dev).len()), (3, 1));
    ok(&mut c, dev, CommandKind::Pin, 4 * PAGE, 2 * PAGE);
    assert_eq!(raw(&mut c, dev, 6 * PAGE, 2, 3), None);
    // Its last page; and its first.
    c.revoke(dev, 3 * PAGE..4 * PAGE);
    assert_eq!((c.pins(dev), c.raw_pins(dev).len()), (4, 1));
    c.revoke(dev, 6 * PAGE..7 * PAGE);
    assert_eq!((c.pins(dev), c.raw_pins(dev).len()), (2, 0));
}

#[test]
fn raw_pins_need_what_they_ask_for_and_no_more() {
    let mut c = empty();
    for (i, protection) in (0..).zip([Protection::READ, Protection::WRITE]) {
        c.map(&Mapping { protection, ..mapping(i * PAGE, 1) }).unwrap();
    }
    let dev = c.open(EMULATED, LIMITS);
    let eperm = Some(Errnos::from(Errno::EPERM));
    for (asked, readable, writable) in
        [(0, None, None), (1, None, eperm), (2, eperm, None), (3, eperm, eperm)]
    {
        assert_eq!(raw(&mut c, dev, 0, 1, asked), readable, "{asked}");
        assert_eq!(raw(&mut c, dev, PAGE, 1, asked), writable, "{asked}");
    }
    fails(&mut c, dev, CommandKind::RawWrite, 0, PAGE, Errno::EACCES);
    ok(&mut c, dev, CommandKind::RawRead, 0, PAGE);
    ok(&mut c, dev, CommandKind::RawWrite, PAGE, PAGE);
    fails(&mut c, dev, CommandKind::RawRead, PAGE, PAGE, Errno::EACCES);
}

#[test]
fn raw_pins_that_are_too_many() {
    let (mut c, _) = container(16);
    let few = c.open(EMULATED, Limits { max_pins: 3, ..LIMITS });
    let enospc = Some(Errnos::from(Errno::ENOSPC));
    assert_eq!(raw(&mut c, few, 0, 4, 3), enospc);
    assert_eq!(raw(&mut c, few, 0, 2, 3), None);
    assert_eq!(raw(&mut c, few, 4 * PAGE, 2, 3), enospc);
    assert_eq!(raw(&mut c, few, 4 * PAGE, 1, 3), None);
    assert_eq!(raw(&mut c, few, 5 * PAGE, 1, 3), enospc);
    ok(&mut c, few, CommandKind::RawUnpin(3), 0, 2 * PAGE);
    assert_eq!(c.pins(few), 1);
    assert_eq!(raw(&mut c, few, 8 * PAGE, 2, 3), None);

    let short = c.open(EMULATED, Limits { max_length: 2 * PAGE, ..LIMITS });
    assert_eq!(raw(&mut c, short, 0, 2, 3), None);
    assert_eq!(raw(&mut c, short, 0, 3, 3), Some(Errno::E2BIG.into()));
}

#[test]
fn pages_pinned_for_a_moment() {
    let (mut c, dev) = container(4);
    let none = c.open(EMULATED, Limits { raw_pages: None, ..LIMITS });
    let few = c.open(EMULATED, Limits { max_pins: 3, ..LIMITS });
    c.map(&Mapping { protection: Protection::READ, ..mapping(4 * PAGE, 1) }).unwrap();
    let before = |c: &Container, id, iova, pages, protection| {
        c.raw_pinned_before_failure(id, &RawPin { iova, length: pages * PAGE, protection })
    };
    // All of it, or the first can't be pinned.
    assert!(before(&c, dev, PAGE + 8, 3, 3).is_empty());
    assert!(before(&c, dev, 4 * PAGE, 1, 3).is_empty());
    // Up to what can't be written, and up to a hole.
    assert_eq!(before(&c, dev, 2 * PAGE + 8, 3, 3), [2 * PAGE, 3 * PAGE]);
    assert_eq!(before(&c, dev, 3 * PAGE, 3, 1), [3 * PAGE, 4 * PAGE]);
    // It isn't tried: by the device, and by vfio_pin_pages().
    assert!(before(&c, none, 2 * PAGE, 3, 3).is_empty());
    assert!(before(&c, few, PAGE, 4, 3).is_empty());
    assert_eq!(before(&c, few, 2 * PAGE, 3, 3), [2 * PAGE, 3 * PAGE]);
    assert!(before(&c, dev, 0, 9, 3).is_empty());
    assert!(before(&c, dev, 2 * PAGE, 3, 7).is_empty());
    assert!(before(&c, dev, PAGE.wrapping_neg() + 1, 2, 1).is_empty());
    // What may be locked counts, and what of it is.
    c.limit_locked_pages(Some(2));
    c.map(&mapping(8 * PAGE, 4)).unwrap();
    assert_eq!(before(&c, dev, 8 * PAGE, 4, 3), [8 * PAGE, 9 * PAGE]);
    assert_eq!(raw(&mut c, dev, 9 * PAGE, 1, 3), None);
    assert_eq!(before(&c, dev, 8 * PAGE, 4, 3), [8 * PAGE, 9 * PAGE]);
    // It has changed nothing.
    assert_eq!((c.pins(dev), c.locked_pages()), (1, 1));
}
