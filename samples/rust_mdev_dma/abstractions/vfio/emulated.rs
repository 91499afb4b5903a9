// SPDX-License-Identifier: GPL-2.0

//! Devices without an IOMMU.
//!
//! Such a device does its DMA by the CPU: through pages it pins ([`Pins`]), or by copying
//! ([`OpenDevice::dma_write`], [`OpenDevice::dma_read`]). VFIO's IOMMU driver tracks both for dirty
//! page tracking.

use super::{
    iommu::{private, Iommu},
    pins::PinTable,
    OpenDevice, Operations,
};
use crate::{abstractions::page::PageMemory, bindings};
use core::ops::Range;
use kernel::{
    error::to_result,
    new_mutex,
    prelude::*,
    sync::{Mutex, MutexGuard},
};

/// A device without an IOMMU, e.g. a mediated one.
pub(crate) struct Emulated;

impl private::Sealed for Emulated {}

impl Pinning for Emulated {}

impl Iommu for Emulated {
    type State = PinState;

    const OPS: bindings::vfio_device_ops = {
        #[allow(unused_mut)]
        let mut ops: bindings::vfio_device_ops = pin_init::zeroed();
        #[cfg(CONFIG_IOMMUFD)]
        {
            ops.bind_iommufd = Some(bindings::vfio_iommufd_emulated_bind);
            ops.unbind_iommufd = Some(bindings::vfio_iommufd_emulated_unbind);
            ops.attach_ioas = Some(bindings::vfio_iommufd_emulated_attach_ioas);
            ops.detach_ioas = Some(bindings::vfio_iommufd_emulated_detach_ioas);
        }
        ops
    };
    const PINS: bool = true;
    const REGISTER: unsafe extern "C" fn(*mut bindings::vfio_device) -> c_int =
        bindings::vfio_register_emulated_iommu_dev;

    fn new_state() -> impl PinInit<PinState> {
        PinState::new()
    }

    fn unmapped(state: &PinState, iova: u64, length: u64) {
        state.unmapped(iova, length);
    }

    fn closed(state: &PinState) {
        state.closed();
    }
}

/// An [`Iommu`] whose devices pin pages.
pub(crate) trait Pinning: Iommu<State = PinState> {}

/// The pins of a device, open or not.
#[pin_data]
pub(crate) struct PinState {
    /// The pages that the device keeps pinned.
    ///
    /// # Locking
    ///
    /// Held across `vfio_pin_pages()`: a `dma_unmap` between pinning a page and adding it to the
    /// table would miss the page, and type1 has a `BUG_ON` for devices that keep pages of a range
    /// that is unmapped. `vfio_pin_pages()` takes page faults, under type1's `iommu->lock` and
    /// `mmap_lock`, so `pins` is held across them; a fault that takes long (`userfaultfd`, swap)
    /// delays `dma_unmap` and the task that unmaps. `pins` isn't held across `copy_to_user()`,
    /// `copy_from_user()` or `vfio_dma_rw()`.
    ///
    /// ```text
    /// pin, unpin    a lock of the driver -> pins -> iommu->lock -> mmap_lock
    /// write         a lock of the driver -> pins -> logging
    /// dma_unmap     device_list_lock     -> pins -> iommu->lock -> mmap_lock
    /// close         dev_set->lock        -> pins -> iommu->lock -> mmap_lock
    /// ```
    ///
    /// type1 drops `iommu->lock` before it calls `dma_unmap`, but after it has taken
    /// `device_list_lock`, so it has both orders of these two: two tasks that unmap ranges with
    /// pinned pages can deadlock. A driver can't avoid that, as `dma_unmap` must unpin.
    ///
    /// With iommufd, `dma_unmap` is called with no lock of iommufd held (with `dev_set->lock` when
    /// the device is detached), and pin and unpin take the access's `ioas_lock` and the IOAS's
    /// `iova_rwsem` in place of `iommu->lock`.
    #[pin]
    pins: Mutex<PinTable>,
}

impl PinState {
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            pins <- new_mutex!(PinTable::new(), "vfio::PinState::pins"),
        })
    }

    /// Revokes the pins of what the user has unmapped.
    pub(super) fn unmapped(&self, iova: u64, length: u64) {
        // No `Range<u64>` includes the last byte of the address space, but all of the last page is
        // pinned, or nothing of it.
        let range = iova..iova.saturating_add(length);
        self.pins.lock().revoke(range);
    }

    pub(super) fn closed(&self) {
        self.pins.lock().unpin_all();
    }
}

impl<T: Operations<Iommu = Emulated>> OpenDevice<T> {
    /// Locks the device's pins.
    ///
    /// Tasks that unmap memory of the container wait while they are locked.
    ///
    /// # Examples
    ///
    /// ```
    /// fn clear(dev: &OpenDevice<MyDriver>, range: Range<u64>) -> Result {
    ///     let mut pins = dev.pins();
    ///     pins.pin(range.clone())?;
    ///     pins.access_to_write(range.clone(), |_iova, bytes, memory| {
    ///         memory.write_bytes(bytes, |_| 0);
    ///     })?;
    ///     pins.unpin(range)
    /// }
    /// ```
    pub(crate) fn pins(&self) -> Pins<'_, T> {
        Pins::lock(self)
    }

    /// Writes `data` to the user's memory at `iova`, and marks it dirty.
    ///
    /// Fails with `EINVAL` if part of the range isn't mapped, `EPERM` if it isn't writable,
    /// `EFAULT` if the process has no memory there. Part of the data may have been written then.
    ///
    /// # Examples
    ///
    /// ```
    /// fn complete(dev: &OpenDevice<MyDevice>, descriptor: u64) -> Result {
    ///     let mut flags = [0; 2];
    ///     dev.dma_read(descriptor, &mut flags)?;
    ///     dev.dma_write(descriptor, &[flags[0] | DONE, flags[1]])
    /// }
    /// ```
    pub(crate) fn dma_write(&self, iova: u64, data: &[u8]) -> Result {
        // SAFETY: `vfio_dma_rw()` doesn't write to the buffer of a write.
        let done = unsafe { self.dma_rw(iova, data.as_ptr().cast_mut(), data.len(), true) };
        // Even if this failed, part of the range may have been written.
        let end = iova.saturating_add(data.len() as u64);
        self.logging().written(&(iova..end));
        done
    }

    /// Reads the user's memory at `iova` into `data`.
    ///
    /// Fails as [`Self::dma_write`] does; `data` may have changed then.
    pub(crate) fn dma_read(&self, iova: u64, data: &mut [u8]) -> Result {
        // SAFETY: `data` is valid for writes.
        unsafe { self.dma_rw(iova, data.as_mut_ptr(), data.len(), false) }
    }

    /// # Safety
    ///
    /// `data` is valid for `len` bytes: for reads if `write` is set, for writes if not.
    unsafe fn dma_rw(&self, iova: u64, data: *mut u8, len: usize, write: bool) -> Result {
        // SAFETY: By the type invariant the device is open, and the caller promises that `data` is
        // valid for what this does with it.
        to_result(unsafe {
            bindings::vfio_dma_rw(self.as_raw().as_ptr(), iova, data.cast(), len, write)
        })
    }
}

/// The pins of an open device, locked.
///
/// A page stays pinned until it is unpinned, the user unmaps it, or the device is closed. The
/// driver isn't notified of the latter two: the pins are revoked, and the next access to the page
/// fails.
///
/// Ranges are of IOVA, in bytes.
pub(crate) struct Pins<'a, T: Operations> {
    pub(super) dev: &'a OpenDevice<T>,
    pub(super) table: MutexGuard<'a, PinTable>,
}

impl<'a, T: Operations<Iommu: Pinning>> Pins<'a, T> {
    pub(super) fn lock(dev: &'a OpenDevice<T>) -> Self {
        Self {
            dev,
            table: dev.0.base.iommu.pins.lock(),
        }
    }

    /// The number of pins held: the sum over all pages.
    pub(crate) fn held(&self) -> u64 {
        self.table.held()
    }

    /// Pins all pages of `range`, which must be page aligned, for reading and writing; or none of
    /// them. Pages that are already pinned get one more pin.
    ///
    /// Fails with the error of `vfio_pin_pages()`, e.g. `EINVAL` if a page isn't mapped, `EPERM` if
    /// it is read-only, `ENOMEM` if the user's `RLIMIT_MEMLOCK` would be exceeded; with `ENOSPC` if
    /// a page would have more than [`PAGE_PINS`] pins; with `EINTR` if it was
    /// [`OpenDevice::interrupted`] between two batches of [`BATCH_PAGES`].
    pub(crate) fn pin(&mut self, range: Range<u64>) -> Result {
        let dev = self.dev;
        // SAFETY: By `OpenDevice`'s invariant the device is open, and stays so while `self` exists.
        // `close_callback` calls `unpin_all()`.
        unsafe { self.table.pin(dev.as_raw(), range, || dev.interrupted()) }
    }

    /// As [`Self::pin`], but only a signal that kills the task interrupts it.
    pub(crate) fn pin_killable(&mut self, range: Range<u64>) -> Result {
        let dev = self.dev;
        // SAFETY: As for `Self::pin`.
        unsafe { self.table.pin(dev.as_raw(), range, || dev.killed()) }
    }

    /// Reserves the memory for [`Self::pin`] of `range`, which then allocates none, in place of what was
    /// reserved before. For pins in [`Operations::work`]: what is allocated there is charged to nobody, and
    /// so should be here, in the user's task.
    pub(crate) fn reserve(&mut self, range: &Range<u64>) -> Result {
        self.table.reserve(range)
    }

    /// Frees what was reserved and isn't used.
    pub(crate) fn release_reserved(&mut self) {
        self.table.release_reserved();
    }

    /// Removes one pin of each page of `range`, which must be page aligned. Fails with `ENXIO` if
    /// one of them isn't pinned; then none is unpinned.
    pub(crate) fn unpin(&mut self, range: Range<u64>) -> Result {
        self.table.unpin(range)
    }

    /// Runs of pages with the same number of pins, and that number, in order of IOVA.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (Range<u64>, u16)> + '_ {
        self.table.runs()
    }

    /// Removes all pins of all pages, and frees what was reserved.
    pub(crate) fn unpin_all(&mut self) {
        self.table.unpin_all();
    }

    /// Calls `f(iova, bytes, memory)` for every page that `range` touches, in order: the page's
    /// IOVA, the bytes of it that are in the range, and its memory. Fails with `ENXIO` before the
    /// first call if one of them isn't pinned.
    #[inline]
    pub(crate) fn access(
        &self,
        range: Range<u64>,
        f: impl FnMut(u64, Range<usize>, &PageMemory<'_>),
    ) -> Result {
        self.table.access(range, f)
    }

    /// As [`Self::access`], for an `f` that writes all of `range`, which is then logged as dirty.
    #[inline]
    pub(crate) fn access_to_write(
        &self,
        range: Range<u64>,
        f: impl FnMut(u64, Range<usize>, &PageMemory<'_>),
    ) -> Result {
        self.table.access(range.clone(), f)?;
        self.dev.logging().written(&range);
        Ok(())
    }
}
