// SPDX-License-Identifier: GPL-2.0-only

//! Calls that nobody makes who has no question about the answer.

use super::{CAPS_SIZE, Container, InfoBuffer, bitmap_buffer, raw_bitmap};
use crate::{BitmapArgs, Error, Result, UnmapArgs, sys};
use std::ptr::with_exposed_provenance_mut;
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
    vfio_bitmap, vfio_iommu_type1_dma_map, vfio_iommu_type1_info,
};

/// Addresses from here on are the kernel's.
const KERNEL: u64 = 1 << 63;

impl Container {
    /// The ioctl that comes `nr` after `VFIO_BASE`, with a null argument.
    pub fn ioctl_null(&self, nr: u8) -> Result<i32> {
        // SAFETY: At a null address the kernel finds no memory of ours.
        unsafe { sys::ioctl_value(&self.file, sys::vfio(nr.into()), 0) }
            .map_err(|e| Error::new(format!("ioctl VFIO_BASE + {nr}"), e))
    }

    /// `VFIO_IOMMU_GET_INFO` with any `argsz` up to 4096, in a buffer of 4096 bytes which are `fill`
    /// where they are not `argsz`. Returns what is there afterwards.
    pub fn info_bytes(&self, argsz: u32, fill: u8) -> Result<Vec<u8>> {
        let filled = u32::from_ne_bytes([fill; 4]);
        let mut buffer = InfoBuffer {
            info: vfio_iommu_type1_info {
                argsz,
                flags: filled,
                iova_pgsizes: u64::from_ne_bytes([fill; 8]),
                cap_offset: filled,
                pad: filled,
            },
            caps: [fill; CAPS_SIZE],
        };
        assert!(argsz as usize <= size_of_val(&buffer), "argsz {argsz}");
        // SAFETY: The kernel fills in no more than `argsz` bytes, there are no pointers.
        unsafe { sys::ioctl(&self.file, sys::IOMMU_GET_INFO, &mut buffer) }
            .map_err(|e| Error::new(format!("VFIO_IOMMU_GET_INFO with argsz {argsz}"), e))?;
        let vfio_iommu_type1_info { argsz, flags, iova_pgsizes, cap_offset, pad } = buffer.info;
        let [argsz, flags, cap_offset, pad] = [argsz, flags, cap_offset, pad].map(u32::to_ne_bytes);
        let mut bytes = [argsz, flags].concat();
        bytes.extend(iova_pgsizes.to_ne_bytes());
        bytes.extend([cap_offset, pad].concat());
        bytes.extend(buffer.caps);
        Ok(bytes)
    }

    /// As [`Self::map`], of memory of the kernel, at `address`: nobody gets that, as the process has
    /// none there. Panics if that isn't the kernel's.
    pub fn map_kernel(&self, iova: u64, size: u64, address: u64) -> Result<()> {
        assert!(address >= KERNEL, "{address:#x} is no address of the kernel's");
        let mut map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: address,
            iova,
            size,
        };
        // SAFETY: No memory of this program is there: should the kernel let a device write to it, it
        // is its own.
        unsafe { sys::ioctl(&self.file, sys::IOMMU_MAP_DMA, &mut map) }.map_err(|e| {
            Error::new(format!("VFIO_IOMMU_MAP_DMA of {iova:#x}+{size:#x} at {address:#x}"), e)
        })?;
        Ok(())
    }

    /// As [`Self::dirty_bitmap`], with any `argsz`; nobody sees the bitmap.
    pub fn dirty_bitmap_of(
        &self,
        argsz: u32,
        iova: u64,
        size: u64,
        bitmap: &BitmapArgs,
    ) -> Result<()> {
        let mut words = bitmap_buffer(size, bitmap);
        self.tracking().bitmap_raw(Some(argsz), iova, size, raw_bitmap(bitmap, &mut words))
    }

    /// As [`Self::dirty_bitmap`], into memory of the kernel, at `address`. Panics if that isn't the
    /// kernel's.
    pub fn dirty_bitmap_into_kernel(
        &self,
        iova: u64,
        size: u64,
        bitmap: &BitmapArgs,
        address: u64,
    ) -> Result<()> {
        self.tracking().bitmap_raw(None, iova, size, in_kernel(bitmap, address))
    }

    /// As [`Self::unmap_dirty`], into memory of the kernel: see [`Self::dirty_bitmap_into_kernel`].
    pub fn unmap_dirty_into_kernel(
        &self,
        args: &UnmapArgs,
        bitmap: &BitmapArgs,
        address: u64,
    ) -> Result<u64> {
        let flags = args.flags | VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
        self.unmap_raw(&UnmapArgs { flags, ..*args }, in_kernel(bitmap, address))
    }
}

/// A bitmap that has room, since no memory of this program is there: should the kernel write there, it
/// is its own that it writes.
fn in_kernel(args: &BitmapArgs, address: u64) -> vfio_bitmap {
    assert!(address >= KERNEL, "{address:#x} is no address of the kernel's");
    let data = with_exposed_provenance_mut(address as usize);
    vfio_bitmap { pgsize: args.pgsize, size: args.size, data }
}
