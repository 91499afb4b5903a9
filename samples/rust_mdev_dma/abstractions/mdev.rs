// SPDX-License-Identifier: GPL-2.0

//! Abstractions for mediated devices.
//!
//! A parent device offers types of mediated devices in sysfs; writing a UUID to a type's `create`
//! file makes a device of it, which the [`Driver`] that was registered with the parent makes a VFIO
//! device of.
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
    /// The type's folder in sysfs is named after the parent's driver, bus or class, a dash, and
    /// this.
    pub(crate) sysfs_name: &'static CStr,
    /// What the type's `name` attribute says.
    pub(crate) pretty_name: &'static CStr,
    /// Whether devices of this type offer DMA logging. Where the kernel can't serve that, there is no
    /// such type.
    pub(crate) dma_logging: bool,
}

/// The types of `T` that this kernel can serve.
fn offered<T: Driver>() -> impl Iterator<Item = &'static Type> {
    T::TYPES
        .iter()
        .filter(|t| !t.dma_logging || vfio::logging::AVAILABLE)
}

/// A driver of mediated devices.
pub(crate) trait Driver: Sized + 'static {
    /// The driver's name.
    const NAME: &'static CStr;

    /// What the types' `device_api` attribute says, e.g. `vfio-pci`.
    const DEVICE_API: &'static CStr;

    /// The types that the parent offers.
    const TYPES: &'static [Type];

    /// What the devices do.
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
/// Dropping it removes all devices that were created, waiting for those that are in use.
///
/// # Invariants
///
/// The driver and the parent in `inner` are registered. `inner` is never moved out of its box, its
/// vectors never change.
pub(crate) struct Registration<T: Driver> {
    inner: KBox<Registered>,
    _dev: ARef<device::Device>,
    _driver: PhantomData<T>,
}

// SAFETY: The mdev core does its own locking; registering and unregistering may happen on different
// threads. No other access to the C structures is offered.
unsafe impl<T: Driver> Send for Registration<T> {}

// SAFETY: As above: there is nothing to call on a shared reference.
unsafe impl<T: Driver> Sync for Registration<T> {}

impl<T: Driver> Registration<T> {
    /// Registers `T`, and `dev` as the parent that offers its types.
    ///
    /// At most `max_instances` devices exist at once.
    pub(crate) fn new(
        dev: &device::Device,
        module: &'static ThisModule,
        max_instances: u32,
    ) -> Result<Self> {
        let inner = Registered {
            driver: Opaque::new(Self::driver(module, max_instances)),
            // `mdev_register_parent()` fills it in.
            parent: Opaque::new(pin_init::zeroed()),
            types: Self::types()?,
            type_ptrs: KVec::with_capacity(T::TYPES.len(), GFP_KERNEL)?,
        };
        let mut inner = KBox::new(inner, GFP_KERNEL)?;
        for i in 0..inner.types.len() {
            let ptr = inner.types[i].get();
            inner.type_ptrs.push(ptr, GFP_KERNEL)?;
        }

        // SAFETY: `driver` is filled in, and stays where it is until `Self::drop` unregisters it.
        to_result(unsafe { bindings::mdev_register_driver(inner.driver.get()) })?;

        // SAFETY: The driver was just registered. `parent`, the types and the list of pointers to
        // them stay where they are until `Self::drop` unregisters the parent. `dev` is valid, and
        // `_dev` keeps it so until after that.
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
            // SAFETY: The driver was registered above, and no device was ever bound to it.
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
        // VFIO takes a reference on the owner while a device is open.
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
    /// Called by the mdev core only, with a device that is being bound to the driver.
    unsafe extern "C" fn probe_callback(mdev: *mut bindings::mdev_device) -> c_int {
        // SAFETY: The mdev core passes a valid device.
        let dev = unsafe { &raw mut (*mdev).dev };
        // SAFETY: As above, and a device has one of the types that were registered.
        let name = unsafe { (*(*mdev).type_).sysfs_name };
        let made_as = offered::<T>().find(|t| t.sysfs_name.as_char_ptr() == name);

        from_result(|| {
            let dma_logging = made_as.ok_or(EINVAL)?.dma_logging;
            // SAFETY: `dev` stays bound until `remove_callback` returns, which drops this.
            let vfio = unsafe { vfio::Registration::<T::Operations>::new(dev, dma_logging)? };
            let vfio = KBox::new(vfio, GFP_KERNEL)?;
            // SAFETY: `dev` is valid, and the driver data of a device that is being bound is its
            // driver's to set.
            unsafe { bindings::dev_set_drvdata(dev, vfio.into_foreign()) };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Called by the mdev core only, with a device that `probe_callback` succeeded on.
    unsafe extern "C" fn remove_callback(mdev: *mut bindings::mdev_device) {
        // SAFETY: The mdev core passes a valid device.
        let vfio = unsafe { bindings::dev_get_drvdata(&raw mut (*mdev).dev) };

        // SAFETY: This is what `probe_callback` set, and a device is removed once.
        drop(unsafe { KBox::<vfio::Registration<T::Operations>>::from_foreign(vfio) });
    }
}

impl<T: Driver> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the parent is registered.
        unsafe { bindings::mdev_unregister_parent(self.inner.parent.get()) };

        // SAFETY: By the type invariant the driver is registered; the line above removed all of its
        // devices.
        unsafe { bindings::mdev_unregister_driver(self.inner.driver.get()) };
    }
}
