// SPDX-License-Identifier: GPL-2.0-only

use super::*;

fn iommu() -> GroupKind {
    GroupKind::Iommu { ranges: vec![0..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1], shared: false }
}

#[test]
fn an_iommu_makes_all_dirty_until_it_has_left() {
    let (mut c, dev) = container(8);
    c.map(&mapping(16 * PAGE, 2)).unwrap();
    ok(&mut c, dev, CommandKind::Pin, PAGE, PAGE);
    c.start().unwrap();
    assert_eq!(read(&mut c, 18), [1..2]);
    c.join(1, iommu()).unwrap();
    assert_eq!(c.join(1, iommu()), Err(Errno::EINVAL.into()));
    assert!(c.all_dirty());
    assert_eq!(read(&mut c, 18), [0..8, 16..18]);
    assert_eq!(read(&mut c, 18), [0..8, 16..18]);
    let buffer = BitmapBuffer::covering(2 * PAGE, PAGE);
    let (_, unmapped) = c.unmap_dirty(16 * PAGE, 2 * PAGE, &buffer).unwrap();
    assert_eq!(unmapped.runs(), [0..2]);
    c.leave(1);
    assert!(!c.all_dirty());
    assert_eq!(read(&mut c, 8), [0..8]);
    assert_eq!(read(&mut c, 8), [1..2]);
    // What it wrote while nobody tracked is nobody's business.
    c.join(1, iommu()).unwrap();
    c.stop();
    c.leave(1);
    c.start().unwrap();
    assert_eq!(read(&mut c, 8), [1..2]);
}

#[test]
fn a_pin_promotes_its_group() {
    let (mut c, _) = container(8);
    for group in [1, 2] {
        c.join(group, iommu()).unwrap();
    }
    let devices = [1, 2].map(|group| c.open(group, LIMITS));
    c.start().unwrap();
    fails(&mut c, devices[0], CommandKind::Pin, 7 * PAGE, 2 * PAGE, Errno::EINVAL);
    ok(&mut c, devices[0], CommandKind::Pin, PAGE, PAGE);
    assert_eq!(read(&mut c, 8), [0..8], "the other one isn't promoted");
    ok(&mut c, devices[1], CommandKind::Pin, 2 * PAGE, PAGE);
    assert_eq!(read(&mut c, 8), [1..3]);
    ok(&mut c, devices[1], CommandKind::Pin, 2 * PAGE, PAGE);
    assert_eq!(read(&mut c, 8), [1..3], "once for all");
    c.close(devices[0]);
    assert_eq!(read(&mut c, 8), [1..3], "it stays promoted");
    c.leave(1);
    assert_eq!(read(&mut c, 8), [2..3], "it has told all");
    c.join(1, iommu()).unwrap();
    assert_eq!(read(&mut c, 8), [0..8], "and starts over");
}

#[test]
fn a_pin_does_not_promote_a_group_of_several_devices() {
    let mut c = empty();
    c.map(&mapping(0, 8)).unwrap();
    let GroupKind::Iommu { ranges, .. } = iommu() else { unreachable!() };
    c.join(1, GroupKind::Iommu { ranges, shared: true }).unwrap();
    let dev = c.open(1, LIMITS);
    c.start().unwrap();
    ok(&mut c, dev, CommandKind::Pin, PAGE, PAGE);
    assert_eq!(read(&mut c, 8), [0..8]);
}

#[test]
fn what_an_iommu_cannot_map() {
    let mut c = empty();
    c.map_backed(&mapping(0, 4), 3 * PAGE).unwrap();
    assert_eq!(c.join(1, iommu()), Err(Errno::EFAULT.into()));
    c.unmap(0, 4 * PAGE).unwrap();
    c.map(&mapping(0, 4)).unwrap();
    c.set_hidden(PAGE..2 * PAGE, true);
    assert_eq!(c.join(1, iommu()), Err(Errno::EFAULT.into()));
    c.set_hidden(PAGE..2 * PAGE, false);
    c.map(&mapping(0xfee0_0000, 1)).unwrap();
    assert_eq!(c.join(1, iommu()), Err(Errno::EINVAL.into()));
    c.unmap(0xfee0_0000, PAGE).unwrap();
    c.join(1, iommu()).unwrap();
    for iova in [0xfee0_0000, 0xfedf_f000 - PAGE, 1 << 39] {
        let refused = c.map(&mapping(iova, 3));
        assert_eq!(refused, Err(Errno::EINVAL.into()), "{iova:#x}");
    }
    assert_eq!(c.map_backed(&mapping(0x10000, 2), PAGE), Err(Errno::EFAULT.into()));
    c.leave(1);
    c.map(&mapping(0xfee0_0000, 1)).unwrap();
}

#[test]
fn an_iommu_locks_all_that_is_mapped() {
    let mut c = empty();
    c.limit_locked_pages(Some(10));
    c.map(&mapping(0, 6)).unwrap();
    let dev = c.open(EMULATED, LIMITS);
    ok(&mut c, dev, CommandKind::Pin, PAGE, 2 * PAGE);
    assert_eq!((c.locked_pages(), c.pages_held()), (2, 2));
    c.map(&mapping(16 * PAGE, 5)).unwrap();
    assert_eq!(c.join(1, iommu()), Err(Errno::ENOMEM.into()));
    c.unmap(16 * PAGE, 5 * PAGE).unwrap();
    c.join(1, iommu()).unwrap();
    assert_eq!(c.locked_pages(), 6);
    assert_eq!(c.map(&mapping(16 * PAGE, 5)), Err(Errno::ENOMEM.into()));
    c.map(&mapping(16 * PAGE, 4)).unwrap();
    ok(&mut c, dev, CommandKind::Pin, 16 * PAGE, 4 * PAGE);
    assert_eq!((c.locked_pages(), c.pages_held()), (10, 16));
    c.leave(1);
    assert_eq!((c.locked_pages(), c.pages_held()), (6, 6), "what is pinned");
}

#[test]
fn addresses_go_and_come_back() {
    let mut c = Container::new(PAGE, 10);
    c.join(1, iommu()).unwrap();
    let vaddr = |iova, pages| Mapping { protection: Protection::NONE, ..mapping(iova, pages) };
    c.map(&mapping(0, 4)).unwrap();
    c.map(&mapping(8 * PAGE, 1)).unwrap();
    assert_eq!(c.update_vaddr(&vaddr(0, 4)), Err(Errno::EINVAL.into()), "it has one");
    assert_eq!(c.invalidate_vaddr(0, 2 * PAGE, false), Err(Errno::EINVAL.into()));
    assert_eq!(c.invalidate_vaddr(0, 4 * PAGE, false), Ok(4 * PAGE));
    assert_eq!(c.invalidate_vaddr(0, 0, true), Err(Errno::EINVAL.into()), "one of them again");
    assert_eq!(c.join(EMULATED, GroupKind::Emulated), Err(Errno::EBUSY.into()));
    let dev = c.open(1, LIMITS);
    fails(&mut c, dev, CommandKind::Pin, 8 * PAGE, PAGE, Errno::EBUSY);
    assert_eq!(c.update_vaddr(&vaddr(8 * PAGE, 1)), Err(Errno::EINVAL.into()), "it kept its own");
    assert_eq!(c.update_vaddr(&vaddr(0, 3)), Err(Errno::EINVAL.into()));
    assert_eq!(c.update_vaddr(&vaddr(0, 4)), Ok(()));
    ok(&mut c, dev, CommandKind::Pin, 8 * PAGE, PAGE);
    assert_eq!(c.invalidate_vaddr(0, 0, true), Ok(5 * PAGE));
    c.unmap_all(0, 0).unwrap();
    assert!(!c.lacks_vaddr());
}

#[test]
fn the_last_group_takes_all_with_it() {
    let (mut c, dev) = container(8);
    c.start().unwrap();
    c.join(1, iommu()).unwrap();
    c.close(dev);
    c.leave(EMULATED);
    assert_eq!(read(&mut c, 8), [0..8]);
    c.leave(1);
    assert!(!c.tracking());
    assert_eq!((c.mappings().count(), c.dma_avail()), (0, 10));
}

#[test]
fn dma_through_an_iommu() {
    let (mut c, _) = container(4);
    c.map(&Mapping { protection: Protection::READ, ..mapping(4 * PAGE, 4) }).unwrap();
    let (read, write) = (Protection::READ, Protection::WRITE);
    assert!(!c.has_group(1) && !c.allows_dma(0..PAGE, read), "there is none");
    c.join(1, iommu()).unwrap();
    assert!(c.has_group(1) && !c.has_group(2));
    assert!(c.allows_dma(0..8 * PAGE, read) && c.allows_dma(PAGE + 8..4 * PAGE, write));
    assert!(c.allows_dma(8 * PAGE - 1..8 * PAGE, read));
    assert!(!c.allows_dma(4 * PAGE - 1..4 * PAGE + 1, write), "part of it is read-only");
    assert!(!c.allows_dma(8 * PAGE - 1..8 * PAGE + 1, read), "part of it isn't mapped");
    // What counts is what it wrote, when nothing else makes all dirty.
    c.leave(1);
    c.start().unwrap();
    c.dma_written(PAGE + 8..3 * PAGE + 1);
    c.dma_written(0..1);
    assert_eq!(super::read(&mut c, 8), [0..4]);
    c.dma_written(4 * PAGE..4 * PAGE + 1);
    assert_eq!(super::read(&mut c, 8), [4..5]);
}
