// SPDX-License-Identifier: GPL-2.0

//! The registration of VFIO devices.

use super::{
    callbacks::VTable, irq::Interrupts, logging, logging::Logging, migration, virqfd::Unmasker,
    Base, Device, Iommu, IrqSetup, Migration, Operations,
};
use crate::{abstractions::workqueue::ScopedWork, bindings};
use core::{convert::Infallible, ptr::NonNull};
use kernel::{
    device::{self, Bound},
    devres,
    error::{from_err_ptr, to_result},
    new_mutex,
    prelude::*,
    ModuleMetadata,
};

/// The registration of a VFIO device.
///
/// Dropping it waits until the device isn't open any more.
///
/// # Invariants
///
/// `self.0` is registered, and this owns a reference to it.
///
/// # Examples
///
/// ```
/// impl pci::Driver for MyDriver {
///     type IdInfo = ();
///     type Data<'bound> = ();
///     const ID_TABLE: pci::IdTable<()> = &TABLE;
///
///     fn probe<'bound>(
///         pdev: &'bound pci::Device<Core<'_>>,
///         _info: Option<&'bound ()>,
///     ) -> impl PinInit<(), Error> + 'bound {
///         vfio::Registration::<MyDevice>::new_foreign_owned(pdev.as_ref(), MyData::new())
///     }
/// }
/// ```
pub(crate) struct Registration<T: Operations>(NonNull<Device<T>>);

// SAFETY: `Device` is `Send` and `Sync`, and may be unregistered from any thread.
unsafe impl<T: Operations> Send for Registration<T> {}

impl<T: Operations> Registration<T> {
    /// Registers a VFIO device for `parent`, until `parent` is unbound. From now on the user can
    /// open it.
    ///
    /// Fails with `EINVAL` if `parent` isn't bound to a driver of the operations' module: VFIO
    /// takes a reference to that module while a device is open.
    pub(crate) fn new_foreign_owned(parent: &device::Device<Bound>, data: T::Data) -> Result {
        // SAFETY: The parent's devres is released before it is unbound.
        let registration = unsafe { Self::new(parent, data)? };
        devres::register(parent, registration, GFP_KERNEL)
    }

    /// # Safety
    ///
    /// The registration is dropped before `parent` is unbound.
    unsafe fn new(parent: &device::Device<Bound>, data: T::Data) -> Result<Self> {
        const {
            assert!(core::mem::offset_of!(Device<T>, vdev) == 0);
            assert!(align_of::<Device<T>>() <= align_of::<u64>());
        }

        // CAST: `Device` is a transparent wrapper.
        let parent: *mut bindings::device = core::ptr::from_ref(parent).cast_mut().cast();
        // SAFETY: A device that is bound has a driver, as long as it is bound.
        let owner = unsafe { (*(*parent).driver).owner };
        if owner != T::OwnerModule::THIS_MODULE.as_ptr() {
            return Err(EINVAL);
        }

        let parts = T::parts(&data);
        // SAFETY: `parent` is valid. The size is that of a `Device<T>`, whose alignment is no more
        // than that of any allocation, and whose first field is a `struct vfio_device`. The others
        // are initialised below, before there can be a callback.
        let vdev = from_err_ptr(unsafe {
            bindings::_vfio_alloc_device(size_of::<Device<T>>(), parent, &VTable::<T>::VTABLE)
        })?;
        // CAST: `vdev` is at offset 0.
        let dev = NonNull::new(vdev.cast::<Device<T>>()).ok_or(ENOMEM)?;

        let base = pin_init!(Base {
            data,
            iommu <- <T::Iommu as Iommu>::new_state(),
            msi_vectors: parts.interrupts,
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
            worker <- ScopedWork::new(),
        });
        // SAFETY: `dev` is valid for writes, nothing else refers to it yet, and it is never moved.
        // INVARIANT: From here on `base` is initialised. What can fail comes later.
        let init: Result<(), Infallible> =
            unsafe { pin_init::raw_try_init(&raw mut (*dev.as_ptr()).base, base) };
        let Ok(()) = init;

        if let Some(ops) = parts.migration {
            // SAFETY: `vdev` is valid, and not registered yet.
            unsafe {
                (*vdev).mig_ops = ops;
                (*vdev).migration_flags = migration::FLAGS;
            }
        }
        if let Some(ops) = parts.logging.filter(|_| logging::AVAILABLE) {
            // SAFETY: `vdev` is valid, and not registered yet.
            unsafe { (*vdev).log_ops = ops };
        }

        // SAFETY: The device was just allocated, and isn't registered yet. The caller promises that
        // it is unregistered before `parent` is unbound, and the driver's owner is the module that
        // has the callbacks.
        if let Err(e) = to_result(unsafe { <T::Iommu as Iommu>::REGISTER(vdev) }) {
            // SAFETY: This is the only reference.
            unsafe { bindings::put_device(&raw mut (*vdev).device) };
            return Err(e);
        }

        // INVARIANT: The device was just registered; the reference is that of its allocation.
        Ok(Self(dev))
    }
}

impl<T: Operations> Drop for Registration<T> {
    fn drop(&mut self) {
        // CAST: `vdev` is at offset 0.
        let vdev: *mut bindings::vfio_device = self.0.as_ptr().cast();

        // SAFETY: By the type invariant the device is registered.
        unsafe { bindings::vfio_unregister_group_dev(vdev) };

        // SAFETY: By the type invariant this owns a reference.
        unsafe { bindings::put_device(&raw mut (*vdev).device) };
    }
}
