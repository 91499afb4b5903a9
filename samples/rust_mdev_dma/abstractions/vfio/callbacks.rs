// SPDX-License-Identifier: GPL-2.0

//! The callbacks of VFIO.

use super::{
    ioctl::{get_info, vfio_ioctl},
    irq::{self, Interrupts, SetIrqs},
    logging::Logging,
    Device, Iommu, Operations,
};
use crate::bindings;
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    error::from_result,
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};

/// The C callbacks of a driver.
pub(super) struct VTable<T: Operations>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    pub(super) const VTABLE: bindings::vfio_device_ops = {
        let mut ops = <T::Iommu as Iommu>::OPS;
        ops.name = kernel::str::as_char_ptr_in_const_context(T::NAME).cast_mut();
        ops.release = Some(Self::release_callback);
        ops.open_device = Some(Self::open_callback);
        ops.close_device = Some(Self::close_callback);
        if T::HAS_READ {
            ops.read = Some(Self::read_callback);
        }
        if T::HAS_WRITE {
            ops.write = Some(Self::write_callback);
        }
        ops.ioctl = Some(Self::ioctl_callback);
        ops.request = Some(Self::request_callback);
        ops.get_region_info_caps = Some(Self::region_info_callback);
        if <T::Iommu as Iommu>::PINS {
            ops.dma_unmap = Some(Self::dma_unmap_callback);
        }
        ops
    };

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` with `base` initialised, to which there is no reference.
    unsafe extern "C" fn release_callback(vdev: *mut bindings::vfio_device) {
        // CAST: `vdev` is at offset 0.
        let dev: *mut Device<T> = vdev.cast();

        // SAFETY: The caller promises that `base` is initialised and nothing refers to it. Its
        // work is disabled, because the device isn't open.
        unsafe { core::ptr::drop_in_place(&raw mut (*dev).base) };
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that VFIO counts as open, but whose `driver` isn't
    /// initialised. Until this has returned, no callback runs but `dma_unmap` and `request`.
    unsafe extern "C" fn open_callback(vdev: *mut bindings::vfio_device) -> c_int {
        // SAFETY: The caller promises that the device is open. If this fails, all pages are
        // unpinned below, before VFIO counts it as closed.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };

        // SAFETY: The caller promises that nothing else uses `driver`, and the device isn't moved.
        // INVARIANT: `driver` is initialised when this returns 0.
        let init =
            unsafe { pin_init::raw_try_init((*dev.0.driver.get()).as_mut_ptr(), T::open(dev)) };
        match init {
            Ok(()) => {
                // SAFETY: The work is disabled: it was when the device was registered, and since
                // `close_callback` of the last time. `close_callback` disables it again, until
                // then the device is open.
                unsafe { dev.0.base.worker.enable(NonNull::from(dev)) };
                0
            }
            Err(e) => {
                <T::Iommu as Iommu>::closed(&dev.0.base.iommu);
                e.to_errno()
            }
        }
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open, with `driver` initialised, until this
    /// returns. From now until the device is opened again, no other callback runs but `dma_unmap`
    /// and `request`.
    unsafe extern "C" fn close_callback(vdev: *mut bindings::vfio_device) {
        // SAFETY: The caller promises that the device is open.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };

        dev.migration().reset();
        dev.0.base.worker.disable();
        // SAFETY: The caller promises that `driver` is initialised.
        unsafe { dev.0.driver() }.close(dev);
        // SAFETY: The caller promises that `driver` is initialised and no other callback uses it,
        // and the worker is disabled.
        unsafe { (*dev.0.driver.get()).assume_init_drop() };
        <T::Iommu as Iommu>::closed(&dev.0.base.iommu);
        dev.0.base.irq_setup.lock().unmasker.disable();
        *dev.interrupts() = Interrupts::new();
        *dev.logging() = Logging::new();
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open, with `driver` initialised, until this
    /// returns. `ppos` is valid for reads and writes.
    unsafe extern "C" fn read_callback(
        vdev: *mut bindings::vfio_device,
        buf: *mut c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The caller promises that the device is open.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };
        // SAFETY: The caller promises that `driver` is initialised.
        let driver = unsafe { dev.0.driver() };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast()), count).writer();

        // SAFETY: The caller promises that `ppos` is valid.
        unsafe { Self::at_position(ppos, |offset| driver.read(dev, buf, offset)) }
    }

    /// # Safety
    ///
    /// As for [`Self::read_callback`].
    unsafe extern "C" fn write_callback(
        vdev: *mut bindings::vfio_device,
        buf: *const c_char,
        count: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The caller promises that the device is open.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };
        // SAFETY: The caller promises that `driver` is initialised.
        let driver = unsafe { dev.0.driver() };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast_mut().cast()), count).reader();

        // SAFETY: The caller promises that `ppos` is valid.
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
            // SAFETY: The caller promises that `ppos` is valid for reads.
            let offset = u64::try_from(unsafe { *ppos })?;
            let done = f(offset)?;
            // CAST: A number of bytes of a user's buffer fits an `loff_t` and an `isize`.
            // SAFETY: The caller promises that `ppos` is valid for writes.
            unsafe { *ppos = (*ppos).wrapping_add(done as bindings::loff_t) };
            Ok(done as isize)
        })
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open, with `driver` initialised, until this
    /// returns.
    unsafe extern "C" fn ioctl_callback(
        vdev: *mut bindings::vfio_device,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_long {
        const GET_INFO: u32 = vfio_ioctl(7);
        const GET_IRQ_INFO: u32 = vfio_ioctl(9);
        const SET_IRQS: u32 = vfio_ioctl(10);
        const RESET: u32 = vfio_ioctl(11);

        // SAFETY: The caller promises that the device is open.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };
        // SAFETY: The caller promises that `driver` is initialised.
        let driver = unsafe { dev.0.driver() };
        let msi_vectors = dev.0.base.msi_vectors;

        from_result(|| {
            match (cmd, msi_vectors) {
                (GET_INFO, _) => {
                    let mut info = driver.info(dev);
                    if T::HAS_RESET {
                        info.flags |= bindings::VFIO_DEVICE_FLAGS_RESET;
                    }
                    let num_irqs = msi_vectors.map_or(0, |_| bindings::VFIO_PCI_NUM_IRQS);
                    get_info(arg, &info, num_irqs)?;
                }
                (GET_IRQ_INFO, Some(msi_vectors)) => irq::get_irq_info(arg, msi_vectors)?,
                (SET_IRQS, Some(msi_vectors)) => {
                    let set = SetIrqs::from_user(arg, msi_vectors)?;
                    set.apply(dev, &dev.0.base.irq_setup.lock())?;
                }
                (RESET, _) if T::HAS_RESET => {
                    let mut migration = dev.migration();
                    migration.reset();
                    driver.reset(dev);
                }
                _ => return driver.ioctl(dev, cmd, arg),
            }
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open, with `driver` initialised, until this
    /// returns. `info` is valid for reads and writes, and nothing else uses it.
    unsafe extern "C" fn region_info_callback(
        vdev: *mut bindings::vfio_device,
        info: *mut bindings::vfio_region_info,
        _caps: *mut bindings::vfio_info_cap,
    ) -> c_int {
        // SAFETY: The caller promises that the device is open.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };
        // SAFETY: The caller promises that `driver` is initialised.
        let driver = unsafe { dev.0.driver() };
        // SAFETY: The caller promises that `info` is valid and nothing else uses it.
        let info = unsafe { &mut *info };

        from_result(|| {
            if info.index >= driver.info(dev).num_regions {
                return Err(EINVAL);
            }
            let region = driver.region_info(dev, info.index)?;
            info.flags = region.flags;
            info.size = region.size;
            info.offset = region.offset;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` with `base` initialised, open or not, which isn't
    /// released before this returns.
    unsafe extern "C" fn request_callback(vdev: *mut bindings::vfio_device, _count: c_uint) {
        // SAFETY: The caller promises that the device isn't released meanwhile.
        let dev = unsafe { Device::<T>::from_raw(vdev) };
        dev.base.interrupts.lock().request();
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` with `base` initialised, open or not, which isn't
    /// released before this returns.
    unsafe extern "C" fn dma_unmap_callback(
        vdev: *mut bindings::vfio_device,
        iova: u64,
        length: u64,
    ) {
        // SAFETY: The caller promises that the device isn't released meanwhile.
        let dev = unsafe { Device::<T>::from_raw(vdev) };
        <T::Iommu as Iommu>::unmapped(&dev.base.iommu, iova, length);
    }
}
