// SPDX-License-Identifier: GPL-2.0

//! Abstractions for mediated devices.
//!
//! A parent device offers types of mediated devices in sysfs; writing a UUID to a type's `create`
//! file creates a device, for which the [`Driver`] that was registered with the parent registers a
//! VFIO device.
//!
//! C header: [`include/linux/mdev.h`](srctree/include/linux/mdev.h)

use super::vfio;
use crate::bindings;
use core::marker::PhantomData;
use kernel::{
    device,
    error::{from_result, to_result},
    prelude::*,
    sync::aref::ARef,
    types::{ForeignOwnable, Opaque},
};

/// A type of mediated device that a parent offers.
pub(crate) struct Type {
    /// The name of the type's directory in sysfs, after the parent's `dev_driver_string()` and a
    /// dash.
    pub(crate) sysfs_name: &'static CStr,
    /// The type's `name` attribute.
    pub(crate) pretty_name: &'static CStr,
    /// Whether devices of this type have DMA logging. The type is only registered if the kernel
    /// supports that.
    pub(crate) dma_logging: bool,
}

/// The types of `T` that this kernel supports.
fn offered<T: Driver>() -> impl Iterator<Item = &'static Type> {
    T::TYPES
        .iter()
        .filter(|t| !t.dma_logging || vfio::logging::AVAILABLE)
}

/// A driver of mediated devices.
pub(crate) trait Driver: Sized + 'static {
    /// The driver's name.
    const NAME: &'static CStr;

    /// The types' `device_api` attribute, e.g. `vfio-pci`.
    const DEVICE_API: &'static CStr;

    /// The types that the parent offers.
    const TYPES: &'static [Type];

    /// The operations of the VFIO devices.
    type Operations: vfio::Operations;
}

/// The C structures of a [`Registration`], which must not move.
struct Registered {
    driver: Opaque<bindings::mdev_driver>,
    parent: Opaque<bindings::mdev_parent>,
    types: KVec<Opaque<bindings::mdev_type>>,
    type_ptrs: KVec<*mut bindings::mdev_type>,
}

/// The registration of a [`Driver`], and of a device as the parent that offers its types.
///
/// Dropping it removes all devices that were created, and waits for those that are open.
///
/// # Invariants
///
/// The driver and the parent in `inner` are registered. `inner` is never moved out of its box, and
/// its vectors never change.
pub(crate) struct Registration<T: Driver> {
    inner: KBox<Registered>,
    _dev: ARef<device::Device>,
    _driver: PhantomData<T>,
}

// SAFETY: The mdev core does its own locking, and a registration may be removed on any thread.
// There is no other access to the C structures.
unsafe impl<T: Driver> Send for Registration<T> {}

// SAFETY: A shared reference gives no access to anything.
unsafe impl<T: Driver> Sync for Registration<T> {}

impl<T: Driver> Registration<T> {
    /// Registers `T`, and `dev` as the parent that offers its types.
    ///
    /// `max_instances` is the maximum number of devices.
    pub(crate) fn new(
        dev: &device::Device,
        module: &'static ThisModule,
        max_instances: u32,
    ) -> Result<Self> {
        let inner = Registered {
            driver: Opaque::new(Self::driver(module, max_instances)),
            // `mdev_register_parent()` initialises it.
            parent: Opaque::new(pin_init::zeroed()),
            types: Self::types()?,
            type_ptrs: KVec::with_capacity(T::TYPES.len(), GFP_KERNEL)?,
        };
        let mut inner = KBox::new(inner, GFP_KERNEL)?;
        for i in 0..inner.types.len() {
            let ptr = inner.types[i].get();
            inner.type_ptrs.push(ptr, GFP_KERNEL)?;
        }

        // SAFETY: `driver` is initialised, and isn't moved until `Self::drop` unregisters it.
        to_result(unsafe { bindings::mdev_register_driver(inner.driver.get()) })?;

        // SAFETY: The driver was just registered. `parent`, the types and the array of pointers to
        // them aren't moved until `Self::drop` unregisters the parent. `dev` is valid, and `_dev`
        // keeps it valid until after that.
        let ret = unsafe {
            bindings::mdev_register_parent(
                inner.parent.get(),
                core::ptr::from_ref(dev).cast_mut().cast(),
                inner.driver.get(),
                inner.type_ptrs.as_mut_ptr(),
                inner.type_ptrs.len() as u32,
            )
        };
        if let Err(e) = to_result(ret) {
            // SAFETY: The driver was registered above, and no device is bound to it.
            unsafe { bindings::mdev_unregister_driver(inner.driver.get()) };
            return Err(e);
        }

        // INVARIANT: Both were just registered.
        Ok(Self {
            inner,
            _dev: dev.into(),
            _driver: PhantomData,
        })
    }

    fn driver(module: &'static ThisModule, max_instances: u32) -> bindings::mdev_driver {
        let mut driver: bindings::mdev_driver = pin_init::zeroed();
        driver.device_api = T::DEVICE_API.as_char_ptr();
        driver.max_instances = max_instances;
        driver.probe = Some(Self::probe_callback);
        driver.remove = Some(Self::remove_callback);
        driver.driver.name = T::NAME.as_char_ptr();
        // VFIO holds a reference to the owner while a device is open.
        driver.driver.owner = module.as_ptr();
        driver
    }

    fn types() -> Result<KVec<Opaque<bindings::mdev_type>>> {
        let mut types = KVec::with_capacity(T::TYPES.len(), GFP_KERNEL)?;
        for t in offered::<T>() {
            let mut raw: bindings::mdev_type = pin_init::zeroed();
            raw.sysfs_name = t.sysfs_name.as_char_ptr();
            raw.pretty_name = t.pretty_name.as_char_ptr();
            types.push(Opaque::new(raw), GFP_KERNEL)?;
        }
        Ok(types)
    }

    /// # Safety
    ///
    /// Called by the mdev core only, with a device that is being bound to the driver, under its
    /// device lock.
    unsafe extern "C" fn probe_callback(mdev: *mut bindings::mdev_device) -> c_int {
        // SAFETY: The mdev core passes a valid device.
        let dev = unsafe { &raw mut (*mdev).dev };
        // SAFETY: As above, and the type of a device is one of those that were registered.
        let name = unsafe { (*(*mdev).type_).sysfs_name };
        let made_as = offered::<T>().find(|t| t.sysfs_name.as_char_ptr() == name);

        from_result(|| {
            let dma_logging = made_as.ok_or(EINVAL)?.dma_logging;
            // SAFETY: `dev` stays bound until `remove_callback` returns, which drops this.
            let vfio = unsafe { vfio::Registration::<T::Operations>::new(dev, dma_logging)? };
            let vfio = KBox::new(vfio, GFP_KERNEL)?;
            // SAFETY: `dev` is valid, and being bound to this driver, which may set its driver
            // data.
            unsafe { bindings::dev_set_drvdata(dev, vfio.into_foreign()) };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Called by the mdev core only, with a device that `probe_callback` succeeded on, under its
    /// device lock.
    unsafe extern "C" fn remove_callback(mdev: *mut bindings::mdev_device) {
        // SAFETY: The mdev core passes a valid device.
        let vfio = unsafe { bindings::dev_get_drvdata(&raw mut (*mdev).dev) };

        // SAFETY: `probe_callback` has set this, and a device is removed once.
        drop(unsafe { KBox::<vfio::Registration<T::Operations>>::from_foreign(vfio) });
    }
}

impl<T: Driver> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the parent is registered.
        unsafe { bindings::mdev_unregister_parent(self.inner.parent.get()) };

        // SAFETY: By the type invariant the driver is registered. Unregistering the parent removed
        // all of its devices.
        unsafe { bindings::mdev_unregister_driver(self.inner.driver.get()) };
    }
}
