// SPDX-License-Identifier: GPL-2.0-only

mod dirty;
mod mapper;
mod odd;

pub use dirty::DirtyTracking;
pub use mapper::Mapper;

use crate::{DeviceNode, Error, Group, Memory, Result, fail_nth::counted, group, sys};
use rustix::io::Errno;
use std::{
    collections::BTreeMap,
    fs::File,
    ops::RangeInclusive,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
    VFIO_DMA_UNMAP_FLAG_VADDR, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, VFIO_TYPE1v2_IOMMU,
    vfio_bitmap, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info,
};

/// The largest bitmap that type1 takes, in words; see `DIRTY_BITMAP_SIZE_MAX` there.
const BITMAP_WORDS_MAX: u64 = 1 << 25;

/// Bytes for the capabilities of `VFIO_IOMMU_GET_INFO`.
const CAPS_SIZE: usize = 4072;

/// The arguments of `VFIO_IOMMU_MAP_DMA`.
#[derive(Clone, Copy, Debug)]
pub struct MapArgs<'a> {
    /// What to map, from byte `offset` on. There are `size` bytes.
    pub memory: &'a Arc<Memory>,
    /// See `memory`.
    pub offset: usize,
    /// Where devices shall see it.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// `VFIO_DMA_MAP_FLAG_*`
    pub flags: u32,
    /// Bytes of the structure that the kernel is told of, or `None` for as many as it has.
    pub argsz: Option<u32>,
}

/// The arguments of `VFIO_IOMMU_UNMAP_DMA`.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnmapArgs {
    /// First byte.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// `VFIO_DMA_UNMAP_FLAG_*`. With `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`, see
    /// [`Container::unmap_dirty`].
    pub flags: u32,
    /// As in [`MapArgs`].
    pub argsz: Option<u32>,
}

/// What the kernel is told of a buffer for a bitmap: `struct vfio_bitmap` without the pointer.
#[derive(Clone, Copy, Debug)]
pub struct BitmapArgs {
    /// Bytes of a page, one bit each.
    pub pgsize: u64,
    /// Bytes of the buffer.
    pub size: u64,
}

/// What `VFIO_IOMMU_GET_INFO` says.
#[derive(Clone, Debug, Default)]
pub struct IommuInfo {
    /// The supported page sizes, one bit each: bit 12 is 4 KiB.
    pub pgsizes: u64,
    /// The capability `VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION`.
    pub migration: Option<MigrationInfo>,
    /// The capability `VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`: how many more mappings there may be.
    pub dma_avail: Option<u32>,
    /// The capability `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`: what can be mapped. It is there since a
    /// group with an IOMMU joined.
    pub iova_ranges: Option<Vec<RangeInclusive<u64>>>,
}

/// The capability `VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationInfo {
    /// The page sizes of bitmaps, one bit each.
    pub pgsize_bitmap: u64,
    /// The largest bitmap in bytes.
    pub max_dirty_bitmap_size: u64,
}

/// How a group leaves its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// `VFIO_GROUP_UNSET_CONTAINER`
    Unset,
    /// Its file is closed.
    Close,
}

/// A container, and type1 as its IOMMU driver while it has a group.
///
/// Shared by its devices; it ends with the last of them.
///
/// # Invariants
///
/// `mapped` has a share of all memory that the kernel may have mapped: an entry is made after every
/// mapping, and taken away after an unmapping that it was there before. It isn't locked while the
/// kernel is at work, so that several threads can be; an entry may thus stay that is no mapping any
/// more, but none is missing. It is dropped after `groups` and `file` were closed; the IOMMU driver,
/// with all mappings, goes with the last group.
#[derive(Debug)]
pub struct Container {
    groups: Mutex<Vec<Arc<Group>>>,
    file: File,
    iommu: u32,
    mapped: Mutex<Mapped>,
}

/// Memory that is mapped, with the bytes of its mapping, by IOVA and a number that no other has.
#[derive(Debug, Default)]
struct Mapped {
    entries: BTreeMap<(u64, u64), (u64, Arc<Memory>)>,
    next: u64,
}

impl Mapped {
    fn add(&mut self, iova: u64, size: u64, memory: Arc<Memory>) {
        self.entries.insert((iova, self.next), (size, memory));
        self.next += 1;
    }

    /// The entries for mappings that lie in `size` bytes from `iova` on.
    fn inside(&self, iova: u64, size: u64) -> Vec<(u64, u64)> {
        let Some(last) = size.checked_sub(1) else { return Vec::new() };
        let entries = self.entries.range((iova, 0)..=(iova.saturating_add(last), u64::MAX));
        entries
            .filter(|&(&(at, _), &(len, _))| len <= size && at - iova <= size - len)
            .map(|(&key, _)| key)
            .collect()
    }
}

impl Container {
    /// Opens `/dev/vfio/vfio`, puts `group` in, and makes type1 v2 its IOMMU driver.
    pub fn new(group: Group) -> Result<Arc<Self>> {
        Self::with_iommu(group, VFIO_TYPE1v2_IOMMU)
    }

    /// As [`Self::new`], with another version of type1: `VFIO_TYPE1_IOMMU`.
    pub fn with_iommu(group: Group, iommu: u32) -> Result<Arc<Self>> {
        Self::in_file("/dev/vfio/vfio", "modprobe -a vfio vfio_iommu_type1", group, iommu)
    }

    /// As [`Self::new`], but what takes the calls of a container is iommufd, not type1. Fails with `ENOENT`
    /// if the kernel has none.
    pub fn by_iommufd(group: Group) -> Result<Arc<Self>> {
        Self::in_file("/dev/iommu", "CONFIG_IOMMUFD is off", group, VFIO_TYPE1v2_IOMMU)
    }

    /// `hint` is for who hasn't the file.
    fn in_file(path: &str, hint: &'static str, group: Group, iommu: u32) -> Result<Arc<Self>> {
        let file = group::open(path).map_err(|errno| {
            let hint = match errno {
                Errno::NOENT | Errno::NODEV | Errno::NXIO => hint,
                Errno::ACCESS | Errno::PERM => "run as root",
                _ => "",
            };
            Error::new(format!("open {path}"), errno).hint(hint)
        })?;
        let this = Self { groups: Mutex::default(), file, iommu, mapped: Mutex::default() };
        this.check_type1(iommu)?;
        this.attach(group)?;
        Ok(Arc::new(this))
    }

    /// Puts another group into the container. If it is the only one, sets the IOMMU driver, too, which
    /// left with the last group.
    pub fn attach(&self, group: Group) -> Result<()> {
        let mut groups = lock(&self.groups);
        group.set_container(self.file.as_fd())?;
        groups.push(Arc::new(group));
        let set = if groups.len() == 1 { self.set_iommu(self.iommu) } else { Ok(()) };
        if set.is_err() {
            // Closed, it leaves again.
            groups.pop();
        }
        set
    }

    /// `VFIO_SET_IOMMU`, once more.
    pub fn set_iommu(&self, iommu: u32) -> Result<()> {
        // SAFETY: The argument is a number.
        unsafe { sys::ioctl_value(&self.file, sys::SET_IOMMU, iommu as usize) }
            .map_err(|e| Error::new(format!("VFIO_SET_IOMMU to {iommu}"), e))
            .map(drop)
    }

    /// Takes a group out of the container: by `VFIO_GROUP_UNSET_CONTAINER`, which fails with `EBUSY`
    /// while a device of it is open, or by closing it, which has no effect before that is closed.
    pub fn detach(&self, group: u32, by: Leave) -> Result<()> {
        let mut groups = lock(&self.groups);
        let at = groups.iter().position(|one| one.number() == group);
        let at = at.ok_or_else(|| Error::other(format!("group {group} isn't in the container")))?;
        if by == Leave::Unset {
            groups[at].unset_container()?;
        }
        // INVARIANT: Entries of `mapped` may stay that are no mapping any more.
        counted(|| drop(groups.remove(at)));
        Ok(())
    }

    /// Opens a device of one of the container's groups. Others may do so at the same time.
    pub(crate) fn open_device(&self, node: &DeviceNode) -> Result<File> {
        let found = lock(&self.groups).iter().find(|group| group.number() == node.group).cloned();
        found
            .ok_or_else(|| Error::other(format!("group {} isn't in the container", node.group)))?
            .device(&node.name)
    }

    fn check_type1(&self, iommu: u32) -> Result<()> {
        check_version(self.file.as_fd())?;
        if self.check_extension(iommu)? == 0 {
            return Err(Error::other(format!("VFIO_CHECK_EXTENSION: no IOMMU driver {iommu}"))
                .hint("modprobe vfio_iommu_type1"));
        }
        Ok(())
    }

    /// `VFIO_CHECK_EXTENSION`. Returns 0 if the kernel lacks it.
    pub fn check_extension(&self, extension: u32) -> Result<i32> {
        // SAFETY: The argument is a number.
        unsafe { sys::ioctl_value(&self.file, sys::CHECK_EXTENSION, extension as usize) }
            .map_err(|e| Error::new(format!("VFIO_CHECK_EXTENSION {extension}"), e))
    }

    /// `VFIO_IOMMU_GET_INFO`, with all capabilities.
    pub fn info(&self) -> Result<IommuInfo> {
        self.info_of(size_of::<InfoBuffer>() as u32)
    }

    /// `VFIO_IOMMU_GET_INFO` with any `argsz` up to 4096.
    pub fn info_of(&self, argsz: u32) -> Result<IommuInfo> {
        info_of(self.file.as_fd(), argsz)
    }

    /// `VFIO_IOMMU_MAP_DMA`. Panics if the memory isn't as large as it says.
    pub fn map(&self, args: &MapArgs<'_>) -> Result<()> {
        let mut map = raw_map(args);
        // SAFETY: `vaddr` is in the memory, and so are the `size` bytes there, or they are its guard.
        // The kernel uses them until they are unmapped; `mapped` will have a share of the memory until
        // after that.
        unsafe { sys::ioctl(&self.file, sys::IOMMU_MAP_DMA, &mut map) }
            .map_err(|e| Error::new(map_call(args), e))?;
        // INVARIANT: What was mapped is entered. The memory is borrowed until after that.
        lock(&self.mapped).add(args.iova, args.size, args.memory.clone());
        Ok(())
    }

    /// `VFIO_IOMMU_UNMAP_DMA`. Returns how many bytes were unmapped.
    pub fn unmap(&self, args: &UnmapArgs) -> Result<u64> {
        self.unmap_into(args, None).map(|(size, _)| size)
    }

    /// `VFIO_IOMMU_UNMAP_DMA` with `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`. Returns how many bytes
    /// were unmapped, and the bitmap: words for `args.size` bytes of IOVA, or `bitmap.size` bytes if
    /// that is more.
    pub fn unmap_dirty(&self, args: &UnmapArgs, bitmap: &BitmapArgs) -> Result<(u64, Vec<u64>)> {
        let flags = args.flags | VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
        self.unmap_into(&UnmapArgs { flags, ..*args }, Some(bitmap))
    }

    /// As [`Self::unmap_dirty`], into `memory` at `offset`. Panics if the bitmap, or what it says its
    /// size is, goes beyond the guard.
    pub fn unmap_dirty_into(
        &self,
        args: &UnmapArgs,
        bitmap: &BitmapArgs,
        memory: &Memory,
        offset: usize,
    ) -> Result<u64> {
        let flags = args.flags | VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
        let raw = bitmap_in(args.size, bitmap, memory, offset);
        self.unmap_raw(&UnmapArgs { flags, ..*args }, raw)
    }

    fn unmap_into(&self, args: &UnmapArgs, bitmap: Option<&BitmapArgs>) -> Result<(u64, Vec<u64>)> {
        let mut words = bitmap.map_or(Vec::new(), |bitmap| bitmap_buffer(args.size, bitmap));
        let raw = bitmap.map_or(vfio_bitmap::default(), |bitmap| raw_bitmap(bitmap, &mut words));
        Ok((self.unmap_raw(args, raw)?, words))
    }

    /// `bitmap` has room for the bitmap of `args`, or is null.
    fn unmap_raw(&self, args: &UnmapArgs, bitmap: vfio_bitmap) -> Result<u64> {
        let &UnmapArgs { iova, size, flags, .. } = args;
        let before = if flags & VFIO_DMA_UNMAP_FLAG_VADDR != 0 {
            Vec::new()
        } else if flags & VFIO_DMA_UNMAP_FLAG_ALL != 0 {
            lock(&self.mapped).inside(0, u64::MAX)
        } else {
            lock(&self.mapped).inside(iova, size)
        };
        let unmapped = unmap_in(self.file.as_fd(), args, bitmap)?;

        // INVARIANT: What was there before the kernel unmapped all of the range is unmapped. If the
        // call fails, part of it may be.
        let mut mapped = lock(&self.mapped);
        for key in before {
            mapped.entries.remove(&key);
        }
        Ok(unmapped)
    }

    /// Bytes that a buffer must have for the bitmap of `size` bytes of IOVA, whatever the kernel makes
    /// of the arguments.
    pub fn bitmap_bytes(size: u64, bitmap: &BitmapArgs) -> u64 {
        8 * bitmap_words(size, bitmap) as u64
    }
}

/// Fails unless this is a container: nothing else has the version of VFIO's API.
fn check_version(container: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: There is no argument.
    let version = unsafe { sys::ioctl_value(container, sys::GET_API_VERSION, 0) }
        .map_err(|e| Error::new("VFIO_GET_API_VERSION", e))?;
    if version != VFIO_API_VERSION as i32 {
        return Err(Error::other(format!("VFIO's API has version {version}, not 0")));
    }
    Ok(())
}

/// `VFIO_IOMMU_GET_INFO` of a container, with any `argsz` up to 4096.
fn info_of(container: BorrowedFd<'_>, argsz: u32) -> Result<IommuInfo> {
    let mut buffer = InfoBuffer {
        info: vfio_iommu_type1_info { argsz, ..Default::default() },
        caps: [0; CAPS_SIZE],
    };
    assert!(argsz as usize <= size_of_val(&buffer), "argsz {argsz}");
    // SAFETY: The kernel fills in no more than `argsz` bytes, there are no pointers.
    unsafe { sys::ioctl(container, sys::IOMMU_GET_INFO, &mut buffer) }
        .map_err(|e| Error::new(format!("VFIO_IOMMU_GET_INFO with argsz {argsz}"), e))?;
    Ok(buffer.parse())
}

/// `VFIO_IOMMU_UNMAP_DMA`, in this container. `bitmap` has room for the bitmap of `args`, or is null. Returns how
/// many bytes were unmapped.
fn unmap_in(container: BorrowedFd<'_>, args: &UnmapArgs, bitmap: vfio_bitmap) -> Result<u64> {
    let &UnmapArgs { iova, size, flags, argsz } = args;
    let argsz = argsz.unwrap_or(size_of::<Unmap>() as u32);
    let unmap = vfio_iommu_type1_dma_unmap { argsz, flags, iova, size, ..Default::default() };
    let mut unmap = Unmap { unmap, bitmap };
    // SAFETY: The kernel writes no more than the structure, and the bitmap of `size` bytes of
    // IOVA, for which there is room; without a bitmap the pointer to it is null.
    unsafe { sys::ioctl(container, sys::IOMMU_UNMAP_DMA, &mut unmap) }.map_err(|e| {
        Error::new(format!("VFIO_IOMMU_UNMAP_DMA of {iova:#x}+{size:#x}, flags {flags:#x}"), e)
    })?;
    Ok(unmap.unmap.size)
}

/// The argument of `VFIO_IOMMU_MAP_DMA`. Panics if the memory isn't as large as it says.
fn raw_map(args: &MapArgs<'_>) -> vfio_iommu_type1_dma_map {
    let &MapArgs { memory, offset, iova, size, flags, argsz } = args;
    let inside = memory.span().checked_sub(offset).is_some_and(|rest| size <= rest as u64);
    assert!(inside, "{size:#x} bytes at {offset:#x} of {:#x}", memory.span());

    const ARGSZ: u32 = size_of::<vfio_iommu_type1_dma_map>() as u32;
    let vaddr = memory.address(offset);
    vfio_iommu_type1_dma_map { argsz: argsz.unwrap_or(ARGSZ), flags, vaddr, iova, size }
}

fn map_call(args: &MapArgs<'_>) -> String {
    let MapArgs { iova, size, flags, .. } = args;
    format!("VFIO_IOMMU_MAP_DMA of {iova:#x}+{size:#x}, flags {flags:#x}")
}

/// Panics elsewhere don't matter: what is locked is consistent at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Words of the bitmap of `size` bytes of IOVA, as many as the kernel is told or as there must be,
/// whatever is more; up to the largest that type1 accepts.
fn bitmap_words(size: u64, args: &BitmapArgs) -> usize {
    // Of the smallest pages there are: should the kernel misread `args.pgsize`, there is room all the
    // same.
    let pages = size / rustix::param::page_size() as u64;
    let words = pages.div_ceil(64).max(args.size.div_ceil(8));
    words.min(BITMAP_WORDS_MAX) as usize
}

/// A zeroed buffer for the bitmap of `size` bytes of IOVA.
fn bitmap_buffer(size: u64, args: &BitmapArgs) -> Vec<u64> {
    vec![0; bitmap_words(size, args)]
}

/// A buffer for the bitmap of `size` bytes of IOVA in `memory`, guard and all.
fn bitmap_in(size: u64, args: &BitmapArgs, memory: &Memory, offset: usize) -> vfio_bitmap {
    let bytes = bitmap_words(size, args) * size_of::<u64>();
    let inside = memory.span().checked_sub(offset).is_some_and(|rest| bytes <= rest);
    assert!(inside, "a bitmap of {bytes:#x} bytes at {offset:#x} of {:#x}", memory.span());
    let data = std::ptr::with_exposed_provenance_mut(memory.address(offset) as usize);
    vfio_bitmap { pgsize: args.pgsize, size: args.size, data }
}

fn raw_bitmap(args: &BitmapArgs, words: &mut [u64]) -> vfio_bitmap {
    vfio_bitmap { pgsize: args.pgsize, size: args.size, data: words.as_mut_ptr() }
}

/// The argument of `VFIO_IOMMU_UNMAP_DMA`.
#[repr(C)]
#[derive(Default)]
struct Unmap {
    unmap: vfio_iommu_type1_dma_unmap,
    bitmap: vfio_bitmap,
}

/// The argument of `VFIO_IOMMU_GET_INFO`.
#[repr(C)]
struct InfoBuffer {
    info: vfio_iommu_type1_info,
    caps: [u8; CAPS_SIZE],
}

impl InfoBuffer {
    fn parse(&self) -> IommuInfo {
        let mut info = IommuInfo { pgsizes: self.info.iova_pgsizes, ..Default::default() };
        let mut at = match self.info.flags & VFIO_IOMMU_INFO_CAPS {
            0 => 0,
            _ => self.info.cap_offset,
        };
        // Offsets grow along the chain: one that doesn't ends it.
        while at != 0 {
            // struct vfio_info_cap_header { __u16 id; __u16 version; __u32 next; }
            let Some(id) = self.cap(at, 0).map(u16::from_ne_bytes) else { break };
            match u32::from(id) {
                VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => {
                    info.migration =
                        self.cap(at, 16).zip(self.cap(at, 24)).map(|(sizes, max)| MigrationInfo {
                            pgsize_bitmap: u64::from_ne_bytes(sizes),
                            max_dirty_bitmap_size: u64::from_ne_bytes(max),
                        });
                }
                VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => info.iova_ranges = self.iova_ranges(at),
                VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                    info.dma_avail = self.cap(at, 8).map(u32::from_ne_bytes);
                }
                _ => {}
            }
            let next = self.cap(at, 4).map_or(0, u32::from_ne_bytes);
            at = if next > at { next } else { 0 };
        }
        info
    }

    /// `struct vfio_iommu_type1_info_cap_iova_range`
    fn iova_ranges(&self, at: u32) -> Option<Vec<RangeInclusive<u64>>> {
        let count = self.cap(at, 8).map(u32::from_ne_bytes)?;
        let number = |offset| self.cap(at, offset).map(u64::from_ne_bytes);
        let range = |i| Some(number(16 + 16 * i)?..=number(24 + 16 * i)?);
        (0..count as usize).map(range).collect()
    }

    /// The bytes at `offset` of the capability that is at `at` of the whole structure.
    fn cap<const N: usize>(&self, at: u32, offset: usize) -> Option<[u8; N]> {
        let start = (at as usize).checked_sub(size_of::<vfio_iommu_type1_info>())? + offset;
        self.caps.get(start..)?.first_chunk().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts() {
        assert_eq!(std::mem::offset_of!(Unmap, bitmap), 24);
        assert_eq!(std::mem::offset_of!(InfoBuffer, caps), 24);
    }

    #[test]
    fn only_whole_mappings_are_inside() {
        let memory = Arc::new(Memory::new(4096).unwrap());
        let mut mapped = Mapped::default();
        for (iova, size) in [(0x1000, 0x1000), (0x2000, 0x2000), (u64::MAX - 0xfff, 0x1000)] {
            mapped.add(iova, size, memory.clone());
        }
        let inside = |iova, size| {
            mapped.inside(iova, size).into_iter().map(|(iova, _)| iova).collect::<Vec<_>>()
        };
        assert_eq!(inside(0x1000, 0x3000), [0x1000, 0x2000]);
        assert_eq!(inside(0x1000, 0x2000), [0x1000]);
        assert_eq!(inside(0x1001, 0x3000), [0x2000]);
        assert_eq!(inside(0, 0), []);
        assert_eq!(inside(u64::MAX - 0xfff, 0x1000), [u64::MAX - 0xfff]);
        assert_eq!(inside(0, u64::MAX).len(), 2, "the last byte isn't in this range");
    }

    #[test]
    fn a_chain_that_goes_in_circles_ends() {
        let mut buffer = InfoBuffer {
            info: vfio_iommu_type1_info {
                flags: VFIO_IOMMU_INFO_CAPS,
                cap_offset: 24,
                ..Default::default()
            },
            caps: [0; CAPS_SIZE],
        };
        buffer.caps[0] = VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL as u8;
        buffer.caps[4] = 24;
        buffer.caps[8] = 7;
        assert_eq!(buffer.parse().dma_avail, Some(7));
        buffer.info.cap_offset = 1 << 20;
        assert_eq!(buffer.parse().dma_avail, None);
    }
}
