// SPDX-License-Identifier: GPL-2.0

//! Abstractions for VFIO devices.
//!
//! The driver of a device implements [`Operations`], and calls [`Registration::new_foreign_owned`]
//! when it is bound to the device's parent. Two things are for the driver to choose:
//!
//! - How the device does its DMA, [`Operations::Iommu`]. An [`Emulated`] device has no IOMMU: the
//!   CPU accesses the user's memory, through pages that it pins or by copying. A [`Backed`] device
//!   does DMA itself, through its IOMMU, to all memory that the user has mapped.
//! - The optional parts, [`Operations::parts`]: migration, interrupts, DMA logging. Others are
//!   methods of [`Operations`] that have a default.
//!
//! # Contexts
//!
//! All callbacks run in process context and may sleep. Locks of VFIO that are held when they are
//! called:
//!
//! ```text
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
//! # Examples
//!
//! An mdev driver whose devices have one region that can be read, and no optional part:
//!
//! ```
#![doc = include_str!("vfio/example.rs")]
//! ```
//!
//! C header: [`include/linux/vfio.h`](srctree/include/linux/vfio.h)

use super::{
    task,
    workqueue::{ScopedWork, Stopped, WorkItem},
};
use crate::bindings;
use core::{cell::UnsafeCell, marker::PhantomData, mem::MaybeUninit, ops::DerefMut, ptr::NonNull};
use kernel::{
    device,
    error::VTABLE_DEFAULT_ERROR,
    prelude::*,
    sync::{Mutex, MutexGuard},
    time::Jiffies,
    types::Opaque,
    uaccess::{UserSliceReader, UserSliceWriter},
    ModuleMetadata,
};

mod backed;
mod callbacks;
mod emulated;
mod example;
mod ioctl;
mod iommu;
mod irq;
pub(crate) mod logging;
mod migration;
mod pins;
mod raw_pins;
mod registration;
pub(crate) mod test_only;
mod virqfd;

pub(crate) use backed::Backed;
pub(crate) use emulated::{Emulated, Pins};
pub(crate) use iommu::Iommu;
pub(crate) use migration::{LoadError, MigrationOperations};
pub(crate) use pins::{BATCH_PAGES, PAGE_PINS};
pub(crate) use raw_pins::RawRange;
pub(crate) use registration::Registration;

use irq::{Interrupts, IrqSetup};
use logging::Logging;
use migration::Migration;

/// What `VFIO_DEVICE_GET_INFO` reports of a device.
pub(crate) struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`, but for `VFIO_DEVICE_FLAGS_RESET`: that is for
    /// [`Operations::reset`].
    pub(crate) flags: u32,
    /// Number of regions: the indices are less than this.
    pub(crate) num_regions: u32,
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

/// The optional parts of a device.
///
/// # Examples
///
/// ```
/// Parts::none().with_migration().with_pci_interrupts(2)
/// ```
pub(crate) struct Parts<T: Operations> {
    migration: Option<&'static bindings::vfio_migration_ops>,
    logging: Option<&'static bindings::vfio_log_ops>,
    /// The number of MSI vectors.
    interrupts: Option<usize>,
    _driver: PhantomData<fn(T)>,
}

impl<T: Operations> Parts<T> {
    /// None of them.
    pub(crate) const fn none() -> Self {
        Self {
            migration: None,
            logging: None,
            interrupts: None,
            _driver: PhantomData,
        }
    }

    /// The device can be migrated.
    pub(crate) const fn with_migration(self) -> Self
    where
        T: MigrationOperations,
    {
        Self {
            migration: Some(&migration::VTable::<T>::VTABLE),
            ..self
        }
    }

    /// The device has DMA logging, if the kernel supports that: see [`logging::AVAILABLE`]. It logs
    /// what is written through [`Pins`] and by [`OpenDevice::dma_write`].
    pub(crate) const fn with_logging(self) -> Self {
        Self {
            logging: Some(&logging::VTable::<T>::VTABLE),
            ..self
        }
    }

    /// The device is a PCI function with INTx and `msi_vectors` vectors of MSI, at most 32, which
    /// [`OpenDevice::interrupts`] raises.
    pub(crate) const fn with_pci_interrupts(self, msi_vectors: usize) -> Self {
        Self {
            interrupts: Some(msi_vectors),
            ..self
        }
    }
}

/// Operations of the driver of a VFIO device.
///
/// The implementing type is the driver's side of an *open* device: it exists from the first
/// `open()` to the last `close()`. Its methods may sleep, and may run concurrently. All but
/// [`Self::work`] run in the context of the user's system call.
#[vtable]
pub(crate) trait Operations: Sized + Send + Sync + 'static {
    /// The driver's module.
    type OwnerModule: ModuleMetadata;

    /// How its devices do their DMA.
    type Iommu: Iommu;

    /// What the driver knows of one device, open or not: see [`OpenDevice::data`].
    type Data: Send + Sync + 'static;

    /// The driver's name.
    const NAME: &'static CStr;

    /// The optional parts that a device has.
    fn parts(_data: &Self::Data) -> Parts<Self> {
        Parts::none()
    }

    /// Initialises the driver's side of a device that is being opened.
    fn open(dev: &OpenDevice<Self>) -> impl PinInit<Self, Error>;

    /// Describes the device.
    fn info(self: Pin<&Self>, dev: &OpenDevice<Self>) -> DeviceInfo;

    /// Describes region `index`, or fails with `EINVAL`. VFIO only asks for
    /// [`DeviceInfo::num_regions`].
    fn region_info(self: Pin<&Self>, dev: &OpenDevice<Self>, index: u32) -> Result<RegionInfo>;

    /// Reads from the device file at `offset`, returns the number of bytes. `offset` also selects
    /// the region: see [`RegionInfo::offset`]. Without this, reads fail with `EINVAL`.
    fn read(
        self: Pin<&Self>,
        _dev: &OpenDevice<Self>,
        _buf: UserSliceWriter,
        _offset: u64,
    ) -> Result<usize> {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Writes to the device file at `offset`, returns the number of bytes. Without this, writes
    /// fail with `EINVAL`.
    fn write(
        self: Pin<&Self>,
        _dev: &OpenDevice<Self>,
        _buf: UserSliceReader,
        _offset: u64,
    ) -> Result<usize> {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// The device is being closed: when this returns, it does no DMA. [`Self::work`] has returned,
    /// and isn't called any more. The pins, if any, are removed after this.
    fn close(self: Pin<&Self>, _dev: &OpenDevice<Self>) {}

    /// An ioctl that this abstraction has no method for.
    fn ioctl(self: Pin<&Self>, _dev: &OpenDevice<Self>, _cmd: u32, _arg: usize) -> Result<isize> {
        Err(ENOTTY)
    }

    /// Resets the device: it is as after opening, and running. This and the methods of
    /// [`MigrationOperations`] don't run concurrently. A device without this method has no
    /// `VFIO_DEVICE_RESET`.
    fn reset(self: Pin<&Self>, _dev: &OpenDevice<Self>) {}

    /// Does the work that [`OpenDevice::queue_work`] queued, in a workqueue. It isn't reentrant,
    /// and has returned before the device is closed.
    fn work(self: Pin<&Self>, _dev: &OpenDevice<Self>) {}
}

/// A VFIO device.
///
/// # Invariants
///
/// - `vdev` is at offset 0, and initialised by VFIO.
/// - `base` is initialised, from [`Registration`] to `release_callback`.
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
    /// The driver's.
    data: T::Data,
    /// What the device needs for its kind of DMA.
    ///
    /// Not part of `driver`: VFIO calls `dma_unmap` from the time it has added the device to its
    /// container until it has removed it, before `open_callback` and after `close_callback`, if
    /// another device of the container has pages pinned.
    #[pin]
    iommu: <T::Iommu as Iommu>::State,
    /// The number of MSI vectors, if the device has interrupts.
    msi_vectors: Option<usize>,
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
    migration: Mutex<Migration<T>>,
    /// Runs [`Operations::work`].
    ///
    /// # Locking
    ///
    /// close, [`OpenDevice::stop_work`] and [`OpenDevice::abort_work`] wait for
    /// [`Operations::work`]. They must not be called with a lock held that it takes: `pins`,
    /// `interrupts`, `logging`, or one of the driver's. `dev_set->lock` and `migration` aren't
    /// among those.
    #[pin]
    worker: ScopedWork<OpenDevice<T>>,
}

// SAFETY: VFIO counts references and may release the device on any thread; `T` and its `Data` are
// `Send`, and so is the rest of `base`.
unsafe impl<T: Operations> Send for Device<T> {}

// SAFETY: VFIO locks `vdev`. `base` consists of the driver's data, which is `Sync`, of what the
// `Sync` of `Iommu::State` and mutexes lock, and of work that the workqueue locks. `driver` is only
// written while no reference to it exists; `T` is `Sync`.
unsafe impl<T: Operations> Sync for Device<T> {}

impl<T: Operations> Device<T> {
    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that lives for `'a`, with `base` initialised.
    unsafe fn from_raw<'a>(vdev: *mut bindings::vfio_device) -> &'a Self {
        // CAST: `vdev` is at offset 0.
        // SAFETY: The caller promises that this is a `Device<T>`, which lives long enough.
        unsafe { &*vdev.cast() }
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open for `'a`.
    unsafe fn open_from_raw<'a>(vdev: *mut bindings::vfio_device) -> &'a OpenDevice<T> {
        // CAST: `vdev` is at offset 0, and `OpenDevice` is a transparent wrapper.
        // SAFETY: The caller promises that this is a `Device<T>`, which isn't released while it is
        // open.
        // INVARIANT: The caller promises that it is open.
        unsafe { &*vdev.cast() }
    }

    /// # Safety
    ///
    /// The device's `driver` is initialised for `'a`.
    unsafe fn driver<'a>(&'a self) -> Pin<&'a T> {
        // SAFETY: The caller promises that `driver` is initialised. It is never moved:
        // `close_callback` drops it in place.
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
        // CAST: `Opaque` is a transparent wrapper.
        NonNull::from(&self.0.vdev).cast()
    }

    /// What the driver passed to [`Registration::new_foreign_owned`].
    ///
    /// # Examples
    ///
    /// ```
    /// fn status(dev: &OpenDevice<MyDevice>) -> Result<u32> {
    ///     let bar: &DevresBar<0x100> = &dev.data().bar;
    ///     Ok(bar.access(dev.parent())?.read(STATUS).into())
    /// }
    /// ```
    pub(crate) fn data(&self) -> &T::Data {
        &self.0.base.data
    }

    /// The device that this was registered for. It stays bound while this is open.
    pub(crate) fn parent(&self) -> &device::Device<device::Bound> {
        // SAFETY: `_vfio_alloc_device()` has set `dev` to the parent, to which the registration
        // keeps a reference. As the registration waits until the device isn't open any more before
        // the parent is unbound, the parent is bound now, and stays so for the lifetime of `&self`.
        unsafe { device::Device::from_raw((*self.as_raw().as_ptr()).dev) }
    }

    /// Locks the device's interrupts. What the user hasn't enabled has no effect.
    ///
    /// # Examples
    ///
    /// ```
    /// dev.interrupts().assert_intx(true);
    /// dev.interrupts().send_msi(0);
    /// ```
    pub(crate) fn interrupts(&self) -> impl DerefMut<Target = Interrupts> + '_ {
        self.0.base.interrupts.lock()
    }

    fn logging(&self) -> MutexGuard<'_, Logging> {
        self.0.base.logging.lock()
    }

    fn migration(&self) -> MutexGuard<'_, Migration<T>> {
        self.0.base.migration.lock()
    }

    /// Queues [`Operations::work`] to run after `delay`. If it is queued already, it runs once,
    /// after the new delay.
    pub(crate) fn queue_work(&self, delay: Jiffies) {
        self.0.base.worker.queue(delay);
    }

    /// Cancels queued [`Operations::work`], and waits for it if it is running. Until what this
    /// returns is dropped it doesn't start again, and queueing it may have no effect.
    ///
    /// As the work may wait for memory that the caller's process serves, it is aborted when that is
    /// killed. Only from reset and the methods of [`MigrationOperations`].
    pub(crate) fn stop_work(&self) -> Stopped<'_, OpenDevice<T>> {
        self.0.base.worker.stop()
    }

    /// As [`Self::stop_work`], and has the work end: [`Self::interrupted`] returns true, and a page
    /// fault fails that waits for a process to serve it.
    pub(crate) fn abort_work(&self) -> Stopped<'_, OpenDevice<T>> {
        self.0.base.worker.abort()
    }

    /// Whether [`Operations::work`] should end, and what comes of it won't be looked at: the device is
    /// being reset or closed.
    pub(crate) fn aborting(&self) -> bool {
        self.0.base.worker.aborting()
    }

    /// Whether a long operation should fail with `EINTR`: a signal is pending for the current task,
    /// or the device is being reset or closed.
    pub(crate) fn interrupted(&self) -> bool {
        self.aborting() || kernel::current!().signal_pending()
    }

    /// Whether an operation that can't be repeated should fail with `EINTR` nevertheless: the current
    /// task is being killed, or the device is being reset or closed.
    pub(crate) fn killed(&self) -> bool {
        self.aborting() || task::killed()
    }
}

impl<T: Operations> WorkItem for OpenDevice<T> {
    fn run(&self) {
        // SAFETY: `open_callback` enables the work when it has initialised `driver`, and
        // `close_callback` disables it before it drops `driver`.
        unsafe { self.0.driver() }.work(self);
    }
}
