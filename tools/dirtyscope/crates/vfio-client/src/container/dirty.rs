// SPDX-License-Identifier: GPL-2.0-only

//! Which pages are dirty: `VFIO_IOMMU_DIRTY_PAGES`.

use super::{
    Container, InfoBuffer, IommuInfo, UnmapArgs, bitmap_buffer, bitmap_in, check_version, info_of,
    raw_bitmap, unmap_in,
};
use crate::{BitmapArgs, Error, Memory, MigrationInfo, Result, sys};
use std::os::fd::{AsFd, BorrowedFd};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_START, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, vfio_bitmap,
    vfio_iommu_type1_dirty_bitmap, vfio_iommu_type1_dirty_bitmap_get,
};

/// Dirty page tracking of a container that may have been opened by others, such as rust-vmm's
/// `vfio-ioctls`, which has no calls for it. Those of a [`Container`] have it as its methods.
///
/// # Invariants
///
/// The file is one of `/dev/vfio/vfio`, or what stands for it.
#[derive(Clone, Copy, Debug)]
pub struct DirtyTracking<'a>(BorrowedFd<'a>);

impl<'a> DirtyTracking<'a> {
    /// That of this container. Fails if it isn't one.
    pub fn of(container: BorrowedFd<'a>) -> Result<Self> {
        check_version(container)?;
        // INVARIANT: It is a container.
        Ok(Self(container))
    }

    /// The capability `VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION` of `VFIO_IOMMU_GET_INFO`: what bitmaps there
    /// are. None if the kernel can't track.
    pub fn info(&self) -> Result<Option<MigrationInfo>> {
        let IommuInfo { migration, .. } = info_of(self.0, size_of::<InfoBuffer>() as u32)?;
        Ok(migration)
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with `VFIO_IOMMU_DIRTY_PAGES_FLAG_START`
    pub fn start(&self) -> Result<()> {
        self.call(VFIO_IOMMU_DIRTY_PAGES_FLAG_START, None)
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with `VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP`
    pub fn stop(&self) -> Result<()> {
        self.call(VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, None)
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with `VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP`, for `size` bytes from
    /// `iova` on. Returns the bitmap: words for that many bytes of IOVA, or `bitmap.size` bytes if
    /// that is more.
    pub fn bitmap(&self, iova: u64, size: u64, bitmap: &BitmapArgs) -> Result<Vec<u64>> {
        let mut words = bitmap_buffer(size, bitmap);
        self.bitmap_raw(None, iova, size, raw_bitmap(bitmap, &mut words))?;
        Ok(words)
    }

    /// `VFIO_IOMMU_UNMAP_DMA` with `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`, for `size` bytes from `iova` on,
    /// whole mappings. Returns the bitmap, as [`DirtyTracking::bitmap`] does: no other will have these
    /// pages.
    pub fn unmap(&self, iova: u64, size: u64, bitmap: &BitmapArgs) -> Result<Vec<u64>> {
        let mut words = bitmap_buffer(size, bitmap);
        let flags = VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
        let args = UnmapArgs { iova, size, flags, argsz: None };
        unmap_in(self.0, &args, raw_bitmap(bitmap, &mut words))?;
        Ok(words)
    }

    fn call(&self, flags: u32, argsz: Option<u32>) -> Result<()> {
        let mut dirty = Dirty::default();
        dirty.head.argsz = argsz.unwrap_or(size_of::<Dirty>() as u32);
        dirty.head.flags = flags;
        // SAFETY: The kernel reads the structure; the pointer in it is null.
        unsafe { sys::ioctl(self.0, sys::IOMMU_DIRTY_PAGES, &mut dirty) }
            .map_err(|e| Error::new(format!("VFIO_IOMMU_DIRTY_PAGES with flags {flags:#x}"), e))
    }

    /// `bitmap` has room for the bitmap of `size` bytes of IOVA.
    pub(super) fn bitmap_raw(
        &self,
        argsz: Option<u32>,
        iova: u64,
        size: u64,
        bitmap: vfio_bitmap,
    ) -> Result<()> {
        let mut dirty = Dirty::default();
        dirty.head.argsz = argsz.unwrap_or(size_of::<Dirty>() as u32);
        dirty.head.flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
        dirty.get = vfio_iommu_type1_dirty_bitmap_get { iova, size, bitmap };
        // SAFETY: The kernel writes no more than the bitmap of `size` bytes of IOVA, for which there
        // is room.
        unsafe { sys::ioctl(self.0, sys::IOMMU_DIRTY_PAGES, &mut dirty) }.map_err(|e| {
            let what = "VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP";
            Error::new(format!("{what} of {iova:#x}+{size:#x}"), e)
        })
    }
}

impl Container {
    /// Its dirty page tracking.
    pub(super) fn tracking(&self) -> DirtyTracking<'_> {
        // INVARIANT: This is the file of a container.
        DirtyTracking(self.file.as_fd())
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with `VFIO_IOMMU_DIRTY_PAGES_FLAG_START`
    pub fn dirty_start(&self) -> Result<()> {
        self.tracking().start()
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with `VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP`
    pub fn dirty_stop(&self) -> Result<()> {
        self.tracking().stop()
    }

    /// `VFIO_IOMMU_DIRTY_PAGES` with any flags and `argsz`, no range, and a null pointer for a
    /// bitmap.
    pub fn dirty(&self, flags: u32, argsz: Option<u32>) -> Result<()> {
        self.tracking().call(flags, argsz)
    }

    /// See [`DirtyTracking::bitmap`].
    pub fn dirty_bitmap(&self, iova: u64, size: u64, bitmap: &BitmapArgs) -> Result<Vec<u64>> {
        self.tracking().bitmap(iova, size, bitmap)
    }

    /// As [`Self::dirty_bitmap`], into `memory` at `offset`. Panics if the bitmap, or what it says
    /// its size is, goes beyond the guard.
    pub fn dirty_bitmap_into(
        &self,
        iova: u64,
        size: u64,
        bitmap: &BitmapArgs,
        memory: &Memory,
        offset: usize,
    ) -> Result<()> {
        self.tracking().bitmap_raw(None, iova, size, bitmap_in(size, bitmap, memory, offset))
    }
}

/// The argument of `VFIO_IOMMU_DIRTY_PAGES`.
#[repr(C)]
#[derive(Default)]
struct Dirty {
    head: vfio_iommu_type1_dirty_bitmap,
    get: vfio_iommu_type1_dirty_bitmap_get,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn layout() {
        assert_eq!(std::mem::offset_of!(Dirty, get), 8);
    }

    #[test]
    fn other_files_are_no_containers() {
        let file = File::open("/dev/null").unwrap();
        let error = DirtyTracking::of(file.as_fd()).unwrap_err().to_string();
        assert!(error.starts_with("VFIO_GET_API_VERSION: "), "{error}");
    }
}
