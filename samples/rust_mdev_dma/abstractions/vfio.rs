// SPDX-License-Identifier: GPL-2.0

//! Abstractions for emulated VFIO devices, which have no IOMMU.
//!
//! Such a device does its DMA by the CPU: through pages it pins ([`Pins`]), or by copying
//! ([`OpenDevice::dma_write`], [`OpenDevice::dma_read`]). VFIO's IOMMU driver tracks both for dirty
//! page tracking.
//!
//! # Contexts
//!
//! All callbacks run in process context and may sleep. Locks of VFIO that are held when they are
//! called:
//!
//! ```text
//! init                   the caller's; nothing refers to the device yet
//! open, close            group->group_lock (not for cdev), dev_set->lock
//! read, write, ioctl,    none: the user's system call
//! get_region_info_caps,
//! migration_*, log_*
//! request                none: the task that removes the device
//! dma_unmap              type1: device_list_lock; iommufd: none, or dev_set->lock in detach. Any
//!                        task that unmaps memory of the container or IOAS, which need not be a
//!                        user of this device
//! release                none: whoever drops the last reference
//! ```
//!
//! [`Operations::work`] and the unmasking of INTx by eventfd run in workqueues, with no lock held.
//!
//! C header: [`include/linux/vfio.h`](srctree/include/linux/vfio.h)

use crate::bindings;
use core::{
    cell::UnsafeCell,
    convert::Infallible,
    marker::PhantomData,
    mem::MaybeUninit,
    ops::{DerefMut, Range},
    ptr::NonNull,
};
use kernel::{
    error::{from_err_ptr, from_result, to_result},
    ioctl::_IO,
    new_mutex,
    prelude::*,
    sync::{Mutex, MutexGuard},
    time::Jiffies,
    types::Opaque,
    uaccess::{UserPtr, UserSlice, UserSliceReader, UserSliceWriter},
    ModuleMetadata,
};

mod irq;
pub(crate) mod logging;
mod migration;
mod pins;
mod raw_pins;
mod virqfd;
mod work;

use irq::{Interrupts, IrqSetup, SetIrqs};
use logging::Logging;
use migration::Migration;
use pins::PinTable;
pub(crate) use pins::{PageMemory, BATCH_PAGES, PAGE_PINS};
pub(crate) use raw_pins::RawRange;
use virqfd::Unmasker;
use work::Worker;

/// What `VFIO_DEVICE_GET_INFO` reports of a device.
pub(crate) struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`.
    pub(crate) flags: u32,
    /// Number of regions: the indices are less than this.
    pub(crate) num_regions: u32,
    /// Number of interrupt indices.
    pub(crate) num_irqs: u32,
}

/// What `VFIO_DEVICE_GET_REGION_INFO` reports of a region.
pub(crate) struct RegionInfo {
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub(crate) flags: u32,
    /// Size in bytes; 0 if there is no such region.
    pub(crate) size: u64,
    /// Offset in the device file.
    pub(crate) offset: u64,
}

/// Operations of the driver of an emulated VFIO device that is a PCI function.
///
/// The implementing type is the driver's side of an *open* device: it exists from the first
/// `open()` to the last `close()`. Its methods may sleep, and may run concurrently. All but
/// [`Self::work`] run in the context of the user's system call.
pub(crate) trait Operations: Sized + Send + Sync + 'static {
    /// The driver's module.
    type OwnerModule: ModuleMetadata;

    /// The driver's name.
    const NAME: &'static CStr;

    /// Device information; the same for all devices of the driver.
    const INFO: DeviceInfo;

    /// Number of MSI vectors.
    const MSI_VECTORS: usize;

    /// Initialises the driver's side of a device that is being opened.
    fn open(dev: &OpenDevice<Self>) -> impl PinInit<Self, Error>;

    /// Reads from the device file at `offset`, returns the number of bytes. `offset` also selects
    /// the region: see [`RegionInfo::offset`].
    fn read(
        self: Pin<&Self>,
        dev: &OpenDevice<Self>,
        buf: UserSliceWriter,
        offset: u64,
    ) -> Result<usize>;

    /// Writes to the device file at `offset`, returns the number of bytes.
    fn write(
        self: Pin<&Self>,
        dev: &OpenDevice<Self>,
        buf: UserSliceReader,
        offset: u64,
    ) -> Result<usize>;

    /// Describes region `index`, or fails with `EINVAL`.
    fn region_info(index: u32) -> Result<RegionInfo>;

    /// Resets the device: it is as after opening, and running. This and the methods below, up to
    /// [`Self::load`], don't run concurrently.
    fn reset(self: Pin<&Self>, dev: &OpenDevice<Self>);

    /// Quiesces the device: when this returns, it does no DMA and doesn't interrupt until
    /// [`Self::resume`]. Operations in progress have completed, or continue then.
    fn quiesce(self: Pin<&Self>, dev: &OpenDevice<Self>);

    /// Sets the device running, after [`Self::quiesce`].
    fn resume(self: Pin<&Self>, dev: &OpenDevice<Self>);

    /// Appends the part of the migration data that can be read in pre-copy, while the device still
    /// runs, to `stream`.
    fn save_identity(self: Pin<&Self>, stream: &mut KVVec<u8>) -> Result;

    /// Appends the rest of the migration data to `stream`. The device is quiesced.
    fn save(self: Pin<&Self>, dev: &OpenDevice<Self>, stream: &mut KVVec<u8>) -> Result;

    /// Loads the migration data that [`Self::save_identity`] and [`Self::save`] wrote. The device
    /// is quiesced and stays so. Fails with `EINVAL` if `stream` isn't valid, or with the error of
    /// an operation that this device can't repeat; then the device is reset, but still quiesced.
    fn load(self: Pin<&Self>, dev: &OpenDevice<Self>, stream: &[u8]) -> Result;

    /// Size of what [`Self::save_identity`] and [`Self::save`] would write now.
    fn saved_size(self: Pin<&Self>, dev: &OpenDevice<Self>) -> usize;

    /// Maximum size of what [`Self::load`] accepts.
    fn max_saved_size() -> usize;

    /// Does the work that [`OpenDevice::queue_work`] queued, in a workqueue. It isn't reentrant,
    /// and has returned before the device is closed.
    fn work(self: Pin<&Self>, dev: &OpenDevice<Self>);
}

/// A VFIO device.
///
/// # Invariants
///
/// - `vdev` is at offset 0, and initialised by VFIO.
/// - `base` is initialised, from `init_callback` to `release_callback`.
/// - `driver` is initialised while the device is open: from the end of `open_callback` to the
///   beginning of `close_callback`. VFIO runs no read, write or ioctl outside of that.
/// - There are pins only while the device is open.
#[repr(C)]
pub(crate) struct Device<T: Operations> {
    vdev: Opaque<bindings::vfio_device>,
    base: Base<T>,
    driver: UnsafeCell<MaybeUninit<T>>,
}

/// The part of a device that exists whether it is open or not.
#[pin_data]
struct Base<T: Operations> {
    /// The pages that this device keeps pinned.
    ///
    /// Not part of `driver`: VFIO calls `dma_unmap` from the time it has added the device to its
    /// container until it has removed it, before `open_callback` and after `close_callback`, if
    /// another device of the container has pages pinned.
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
    /// Serialises `VFIO_DEVICE_SET_IRQS`.
    ///
    /// # Locking
    ///
    /// Taken with no lock held but `dev_set->lock` (in close), before `interrupts`. Held while
    /// waiting for an `unmask_callback` in progress, which therefore must not take it.
    #[pin]
    irq_setup: Mutex<IrqSetup<T>>,
    /// The eventfds to signal. Not part of `driver`, because VFIO calls `request_callback` at any
    /// time.
    ///
    /// # Locking
    ///
    /// A leaf: only the spinlocks of eventfds are taken with it held, and no page fault.
    #[pin]
    interrupts: Mutex<Interrupts>,
    /// The device's dirty log.
    ///
    /// # Locking
    ///
    /// Taken after `pins` and the locks of the driver, before `mmap_lock`: `log_read_and_clear`
    /// holds it across `iova_bitmap_set()`, which pins the pages of the user's bitmap and so takes
    /// page faults. No other lock of the device or of type1 is taken with it held. As writes
    /// through pins take it with `pins` held, such a fault delays `dma_unmap`, too.
    #[pin]
    logging: Mutex<Logging>,
    /// Serialises reset, close and changes of the migration state.
    ///
    /// # Locking
    ///
    /// The outermost lock but `dev_set->lock` (in close): taken before the lock of a data transfer
    /// session and those of the driver. Held while waiting for [`Operations::work`], which must not
    /// take it. Never taken in `dma_unmap`.
    #[pin]
    migration: Mutex<Migration>,
    /// Runs [`Operations::work`].
    ///
    /// # Locking
    ///
    /// close, [`OpenDevice::stop_work`] and [`OpenDevice::abort_work`] wait for
    /// [`Operations::work`]. They must not be called with a lock held that it takes: `pins`,
    /// `interrupts`, `logging`, or one of the driver's. `dev_set->lock` and `migration` aren't
    /// among those.
    #[pin]
    worker: Worker<T>,
}

// SAFETY: VFIO counts references and may release the device on any thread; `T` is `Send`.
unsafe impl<T: Operations> Send for Device<T> {}

// SAFETY: VFIO locks `vdev`, `base` consists of mutexes and of work that the workqueue locks, and
// `driver` is only written while no reference to it exists; `T` is `Sync`.
unsafe impl<T: Operations> Sync for Device<T> {}

impl<T: Operations> Device<T> {
    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that lives for `'a`.
    unsafe fn from_raw<'a>(vdev: *mut bindings::vfio_device) -> &'a Self {
        // SAFETY: `vdev` is at offset 0; the caller promises the rest.
        unsafe { &*vdev.cast() }
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open for `'a`.
    unsafe fn open_from_raw<'a>(vdev: *mut bindings::vfio_device) -> &'a OpenDevice<T> {
        // SAFETY: As the caller promises; `OpenDevice` is a transparent wrapper.
        // INVARIANT: As the caller promises.
        unsafe { &*vdev.cast() }
    }

    /// # Safety
    ///
    /// The device's `driver` is initialised for `'a`.
    unsafe fn driver<'a>(&'a self) -> Pin<&'a T> {
        // SAFETY: As the caller promises. `close_callback` drops `driver` in place.
        unsafe { Pin::new_unchecked((*self.driver.get()).assume_init_ref()) }
    }
}

/// A [`Device`] that is open.
///
/// # Invariants
///
/// The device stays open as long as there is a reference to this.
#[repr(transparent)]
pub(crate) struct OpenDevice<T: Operations>(Device<T>);

impl<T: Operations> OpenDevice<T> {
    fn as_raw(&self) -> NonNull<bindings::vfio_device> {
        NonNull::from(&self.0.vdev).cast()
    }

    /// Locks the device's pins.
    ///
    /// Tasks that unmap memory of the container wait while they are locked.
    pub(crate) fn pins(&self) -> Pins<'_, T> {
        Pins {
            dev: self,
            table: self.0.base.pins.lock(),
        }
    }

    /// Locks the device's interrupts.
    pub(crate) fn interrupts(&self) -> impl DerefMut<Target = Interrupts> + '_ {
        self.0.base.interrupts.lock()
    }

    fn logging(&self) -> MutexGuard<'_, Logging> {
        self.0.base.logging.lock()
    }

    fn migration(&self) -> MutexGuard<'_, Migration> {
        self.0.base.migration.lock()
    }

    /// Queues [`Operations::work`] to run after `delay`. If it is queued already, it runs once,
    /// after the new delay.
    pub(crate) fn queue_work(&self, delay: Jiffies) {
        self.0.base.worker.queue(delay);
    }

    /// Cancels queued [`Operations::work`], and waits for it if it is running. If it queues
    /// itself meanwhile, that has no effect.
    pub(crate) fn stop_work(&self) {
        self.0.base.worker.stop();
    }

    /// As [`Self::stop_work`]; [`Self::interrupted`] returns true while it waits.
    pub(crate) fn abort_work(&self) {
        self.0.base.worker.abort();
    }

    /// Whether a long operation should fail with `EINTR`: a signal is pending for the current task,
    /// or the device is being reset or closed.
    pub(crate) fn interrupted(&self) -> bool {
        self.0.base.worker.aborting() || kernel::current!().signal_pending()
    }

    /// Writes `data` to the user's memory at `iova`, and marks it dirty.
    ///
    /// Fails with `EINVAL` if part of the range isn't mapped, `EPERM` if it isn't writable,
    /// `EFAULT` if the process has no memory there. Part of the data may have been written then.
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
        // SAFETY: By the type invariant the device is open. The caller promises the rest.
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
    dev: &'a OpenDevice<T>,
    table: MutexGuard<'a, PinTable>,
}

impl<T: Operations> Pins<'_, T> {
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

    /// Removes one pin of each page of `range`, which must be page aligned. Fails with `ENXIO` if
    /// one of them isn't pinned; then none is unpinned.
    pub(crate) fn unpin(&mut self, range: Range<u64>) -> Result {
        self.table.unpin(range)
    }

    /// Runs of pages with the same number of pins, and that number, in order of IOVA.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (Range<u64>, u16)> + '_ {
        self.table.runs()
    }

    /// Removes all pins of all pages.
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

/// The registration of a VFIO device, for use by the abstraction of the device's bus.
///
/// Dropping it waits until the device isn't open any more.
///
/// # Invariants
///
/// `self.0` is registered, and this owns a reference to it.
pub(super) struct Registration<T: Operations>(NonNull<Device<T>>);

// SAFETY: `Device` is `Send` and `Sync`, and may be unregistered from any thread.
unsafe impl<T: Operations> Send for Registration<T> {}

impl<T: Operations> Registration<T> {
    /// Registers a VFIO device for `parent`; the user can open it from now on. It has DMA logging
    /// if `dma_logging` is set and the kernel supports it, see [`logging::AVAILABLE`].
    ///
    /// # Safety
    ///
    /// `parent` is valid and bound to a driver whose owner is the module of `T`, and stays so until
    /// the registration has been dropped.
    pub(super) unsafe fn new(parent: *mut bindings::device, dma_logging: bool) -> Result<Self> {
        const {
            assert!(core::mem::offset_of!(Device<T>, vdev) == 0);
            assert!(align_of::<Device<T>>() <= align_of::<u64>());
        }

        // SAFETY: The caller promises a valid `parent`. The size is that of a `Device<T>`, whose
        // alignment is no more than that of any allocation, and whose first field is a `struct
        // vfio_device`. `init_callback` initialises the others.
        let vdev = from_err_ptr(unsafe {
            bindings::_vfio_alloc_device(size_of::<Device<T>>(), parent, &VTable::<T>::VTABLE)
        })?;

        if dma_logging && logging::AVAILABLE {
            // SAFETY: The device was just allocated, and isn't registered yet.
            unsafe { (*vdev).log_ops = &logging::VTable::<T>::VTABLE };
        }

        // SAFETY: The device was just allocated, and isn't registered yet.
        if let Err(e) = to_result(unsafe { bindings::vfio_register_emulated_iommu_dev(vdev) }) {
            // SAFETY: This is the only reference.
            unsafe { bindings::put_device(&raw mut (*vdev).device) };
            return Err(e);
        }

        // INVARIANT: The device was just registered; the reference is that of its allocation.
        Ok(Self(NonNull::new(vdev.cast()).ok_or(ENOMEM)?))
    }
}

impl<T: Operations> Drop for Registration<T> {
    fn drop(&mut self) {
        let vdev: *mut bindings::vfio_device = self.0.as_ptr().cast();

        // SAFETY: By the type invariant the device is registered.
        unsafe { bindings::vfio_unregister_group_dev(vdev) };

        // SAFETY: By the type invariant this owns a reference.
        unsafe { bindings::put_device(&raw mut (*vdev).device) };
    }
}

/// The C callbacks of a driver.
struct VTable<T: Operations>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    const VTABLE: bindings::vfio_device_ops = {
        let mut ops: bindings::vfio_device_ops = pin_init::zeroed();
        ops.name = kernel::str::as_char_ptr_in_const_context(T::NAME).cast_mut();
        ops.init = Some(Self::init_callback);
        ops.release = Some(Self::release_callback);
        ops.open_device = Some(Self::open_callback);
        ops.close_device = Some(Self::close_callback);
        ops.read = Some(Self::read_callback);
        ops.write = Some(Self::write_callback);
        ops.ioctl = Some(Self::ioctl_callback);
        ops.request = Some(Self::request_callback);
        ops.get_region_info_caps = Some(Self::region_info_callback);
        ops.dma_unmap = Some(Self::dma_unmap_callback);
        #[cfg(CONFIG_IOMMUFD)]
        {
            ops.bind_iommufd = Some(bindings::vfio_iommufd_emulated_bind);
            ops.unbind_iommufd = Some(bindings::vfio_iommufd_emulated_unbind);
            ops.attach_ioas = Some(bindings::vfio_iommufd_emulated_attach_ioas);
            ops.detach_ioas = Some(bindings::vfio_iommufd_emulated_detach_ioas);
        }
        ops
    };

    /// # Safety
    ///
    /// Called by `_vfio_alloc_device()` only, with a zeroed `Device<T>`.
    unsafe extern "C" fn init_callback(vdev: *mut bindings::vfio_device) -> c_int {
        let Some(dev) = NonNull::new(vdev.cast::<Device<T>>()) else {
            return EINVAL.to_errno();
        };

        let base = pin_init!(Base {
            pins <- new_mutex!(PinTable::new(), "vfio::Base::pins"),
            irq_setup <- new_mutex!(
                IrqSetup {
                    // SAFETY: This is a field of `dev`. `close_callback` disables it.
                    unmasker: unsafe { Unmasker::new(dev) },
                },
                "vfio::Base::irq_setup"
            ),
            interrupts <- new_mutex!(Interrupts::new(), "vfio::Base::interrupts"),
            logging <- new_mutex!(Logging::new(), "vfio::Base::logging"),
            migration <- new_mutex!(Migration::new(), "vfio::Base::migration"),
            // SAFETY: This is the worker of the `base` of `dev`.
            worker <- unsafe { Worker::new(dev) },
        });
        // SAFETY: `dev` is valid for writes, nothing else refers to it yet, and it is never moved.
        let init: Result<(), Infallible> =
            unsafe { pin_init::raw_try_init(&raw mut (*dev.as_ptr()).base, base) };
        let Ok(()) = init;

        // SAFETY: `vdev` is valid, and not registered yet.
        unsafe {
            (*vdev).mig_ops = &migration::VTable::<T>::VTABLE;
            (*vdev).migration_flags = migration::FLAGS;
        }
        0
    }

    /// # Safety
    ///
    /// Called by VFIO only, after the last reference to the device has been dropped.
    unsafe extern "C" fn release_callback(vdev: *mut bindings::vfio_device) {
        let dev: *mut Device<T> = vdev.cast();

        // SAFETY: `init_callback` has initialised `base`, and no reference to it is left. Its
        // worker is disabled, because the device isn't open.
        unsafe { core::ptr::drop_in_place(&raw mut (*dev).base) };
    }

    /// # Safety
    ///
    /// Called by VFIO only, when the device is opened and not open yet.
    unsafe extern "C" fn open_callback(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: VFIO has counted the device as open before this call. If it fails, all pages are
        // unpinned below.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };

        // SAFETY: Nothing else uses `driver` while the device isn't open, and the device isn't
        // moved.
        // INVARIANT: `driver` is initialised when this returns 0.
        let init =
            unsafe { pin_init::raw_try_init((*dev.0.driver.get()).as_mut_ptr(), T::open(dev)) };
        match init {
            Ok(()) => {
                // SAFETY: The device is open, and `driver` was just initialised. `close_callback`
                // disables the worker.
                unsafe { dev.0.base.worker.enable() };
                0
            }
            Err(e) => {
                dev.pins().unpin_all();
                e.to_errno()
            }
        }
    }

    /// # Safety
    ///
    /// Called by VFIO only, when the device is closed: until it is opened again, no other callback
    /// runs but `dma_unmap` and `request`.
    unsafe extern "C" fn close_callback(vdev: *mut bindings::vfio_device) {
        // SAFETY: VFIO counts the device as open until this call has returned.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };

        dev.migration().reset();
        dev.0.base.worker.disable();
        // SAFETY: `open_callback` has initialised `driver`, no other callback uses it, and the
        // worker is disabled.
        unsafe { (*dev.0.driver.get()).assume_init_drop() };
        dev.pins().unpin_all();
        dev.0.base.irq_setup.lock().unmasker.disable();
        *dev.interrupts() = Interrupts::new();
        *dev.logging() = Logging::new();
    }

    /// # Safety
    ///
    /// Called by VFIO only, with an open device; `buf` and `count` are those of the system call.
    unsafe extern "C" fn read_callback(
        vdev: *mut bindings::vfio_device,
        buf: *mut c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The device is open, as long as this callback runs.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };
        // SAFETY: It is open.
        let driver = unsafe { dev.0.driver() };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast()), count).writer();

        // SAFETY: VFIO passes a position that may be read and written.
        unsafe { Self::at_position(ppos, |offset| driver.read(dev, buf, offset)) }
    }

    /// # Safety
    ///
    /// Called by VFIO only, with an open device; `buf` and `count` are those of the system call.
    unsafe extern "C" fn write_callback(
        vdev: *mut bindings::vfio_device,
        buf: *const c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The device is open, as long as this callback runs.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };
        // SAFETY: It is open.
        let driver = unsafe { dev.0.driver() };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast_mut().cast()), count).reader();

        // SAFETY: VFIO passes a position that may be read and written.
        unsafe { Self::at_position(ppos, |offset| driver.write(dev, buf, offset)) }
    }

    /// Calls `f` with the file position, and advances the position by what it returns.
    ///
    /// # Safety
    ///
    /// `ppos` is valid for reads and writes.
    unsafe fn at_position(
        ppos: *mut bindings::loff_t,
        f: impl FnOnce(u64) -> Result<usize>,
    ) -> isize {
        from_result(|| {
            // SAFETY: As the caller promises.
            let offset = u64::try_from(unsafe { *ppos })?;
            let done = f(offset)?;
            // SAFETY: As the caller promises.
            unsafe { *ppos += done as bindings::loff_t };
            Ok(done as isize)
        })
    }

    /// # Safety
    ///
    /// Called by VFIO only, with an open device.
    unsafe extern "C" fn ioctl_callback(
        vdev: *mut bindings::vfio_device,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_long {
        const GET_INFO: u32 = vfio_ioctl(7);
        const GET_IRQ_INFO: u32 = vfio_ioctl(9);
        const SET_IRQS: u32 = vfio_ioctl(10);
        const RESET: u32 = vfio_ioctl(11);

        // SAFETY: The device is open, as long as this callback runs.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };
        // SAFETY: It is open.
        let driver = unsafe { dev.0.driver() };

        from_result(|| {
            match cmd {
                GET_INFO => get_info(arg, &T::INFO)?,
                GET_IRQ_INFO => irq::get_irq_info(arg, T::MSI_VECTORS)?,
                SET_IRQS => {
                    let set = SetIrqs::from_user(arg, T::MSI_VECTORS)?;
                    set.apply(dev, &dev.0.base.irq_setup.lock())?;
                }
                RESET => {
                    let mut migration = dev.migration();
                    migration.reset();
                    driver.reset(dev);
                }
                _ => return Err(ENOTTY),
            }
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Called by VFIO only, with valid `info`, whose `argsz` it has checked.
    unsafe extern "C" fn region_info_callback(
        _vdev: *mut bindings::vfio_device,
        info: *mut bindings::vfio_region_info,
        _caps: *mut bindings::vfio_info_cap,
    ) -> c_int {
        // SAFETY: VFIO passes a valid `info` that nothing else uses.
        let info = unsafe { &mut *info };

        from_result(|| {
            if info.index >= T::INFO.num_regions {
                return Err(EINVAL);
            }
            let region = T::region_info(info.index)?;
            info.flags = region.flags;
            info.size = region.size;
            info.offset = region.offset;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Called by VFIO only, with a device that is being unregistered, and may be open or not.
    unsafe extern "C" fn request_callback(vdev: *mut bindings::vfio_device, _count: c_uint) {
        // SAFETY: The device isn't released while it is registered.
        let dev = unsafe { Device::<T>::from_raw(vdev) };
        dev.base.interrupts.lock().request();
    }

    /// # Safety
    ///
    /// Called by VFIO only, with a device that is in a container or being added to one; see
    /// [`Base::pins`] for the locks held.
    unsafe extern "C" fn dma_unmap_callback(
        vdev: *mut bindings::vfio_device,
        iova: u64,
        length: u64,
    ) {
        // SAFETY: The device isn't released while it is in a container.
        let dev = unsafe { Device::<T>::from_raw(vdev) };

        // No `Range<u64>` includes the last byte of the address space, but all of the last page is
        // pinned, or nothing of it.
        dev.base
            .pins
            .lock()
            .revoke(iova..iova.saturating_add(length));
    }
}

/// The number of a VFIO ioctl, from its offset to `VFIO_BASE`.
const fn vfio_ioctl(nr: u32) -> u32 {
    _IO(bindings::VFIO_TYPE as u32, bindings::VFIO_BASE + nr)
}

/// Reads `words.len()` words at `arg`. Fails with `EINVAL` if the first, `argsz`, is less than
/// their size.
fn read_words(arg: usize, words: &mut [u32]) -> Result {
    let mut reader = UserSlice::new(UserPtr::from_addr(arg), size_of_val(words)).reader();
    for word in words.iter_mut() {
        *word = reader.read()?;
    }
    if (words[0] as usize) < size_of_val(words) {
        return Err(EINVAL);
    }
    Ok(())
}

fn write_words(arg: usize, words: &[u32]) -> Result {
    let mut writer = UserSlice::new(UserPtr::from_addr(arg), size_of_val(words)).writer();
    for word in words {
        writer.write(word)?;
    }
    Ok(())
}

/// `VFIO_DEVICE_GET_INFO`: `struct vfio_device_info`, up to `num_irqs`.
fn get_info(arg: usize, info: &DeviceInfo) -> Result {
    let mut words = [0; 4];
    read_words(arg, &mut words)?;
    let [argsz, ..] = words;
    write_words(arg, &[argsz, info.flags, info.num_regions, info.num_irqs])
}
