// SPDX-License-Identifier: GPL-2.0

//! PCI drivers that leave their devices' DMA to a user.
//!
//! C header: [`include/linux/pci.h`](srctree/include/linux/pci.h)

use core::{convert::Infallible, marker::PhantomData, mem::transmute, ptr::from_ref};
use kernel::{
    bindings,
    device::{Bound, Core},
    devres,
    driver::{DriverLayout, RegistrationOps},
    pci,
    prelude::*,
    sync::aref::ARef,
    types::Opaque,
};

/// As [`pci::Adapter`], for a driver whose devices' DMA goes to the address space of a user, e.g. by
/// VFIO: the kernel's own DMA API must not be used for them.
///
/// # Examples
///
/// ```
/// kernel::module_driver!(<T>, abstractions::pci::Adapter<T>, {
///     type: MyDriver,
///     name: "my_driver",
///     authors: ["Me"],
///     description: "My driver",
///     license: "GPL",
/// });
/// ```
pub(crate) struct Adapter<T: pci::Driver>(PhantomData<T>);

// SAFETY: These are those of `pci::Adapter`, which promises the same.
unsafe impl<T: pci::Driver> DriverLayout for Adapter<T> {
    type DriverType = bindings::pci_driver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = <pci::Adapter<T> as DriverLayout>::DEVICE_DRIVER_OFFSET;
}

// SAFETY: `unregister` is valid for every `DriverType` that `register` succeeded on, as that of
// `pci::Adapter` is.
unsafe impl<T: pci::Driver> RegistrationOps for Adapter<T> {
    unsafe fn register(
        pdrv: &Opaque<bindings::pci_driver>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        // SAFETY: The driver isn't registered yet, nothing else uses it. `pci::Adapter` sets other
        // fields.
        unsafe { (*pdrv.get()).driver_managed_dma = true };
        // SAFETY: The caller promises what this needs.
        unsafe { pci::Adapter::<T>::register(pdrv, name, module) }
    }

    unsafe fn unregister(pdrv: &Opaque<bindings::pci_driver>) {
        // SAFETY: The caller promises what this needs.
        unsafe { pci::Adapter::<T>::unregister(pdrv) }
    }
}

/// Equivalent to C's `PCI_DRIVER_OVERRIDE_DEVICE_VFIO`: matches only devices whose
/// `driver_override` names the driver.
///
/// # Examples
///
/// ```
/// kernel::pci_device_table!(TABLE, (), [(vfio_override(0x1234, 0x11e8), ())]);
/// ```
pub(crate) const fn vfio_override(vendor: u16, device: u16) -> pci::DeviceId {
    let id = bindings::pci_device_id {
        vendor: vendor as u32,
        device: device as u32,
        subvendor: bindings::PCI_ANY_ID as u32,
        subdevice: bindings::PCI_ANY_ID as u32,
        class: 0,
        class_mask: 0,
        driver_data: 0,
        override_only: bindings::PCI_ID_F_VFIO_DRIVER_OVERRIDE,
    };
    // SAFETY: `DeviceId` is a transparent wrapper of `pci_device_id`, and every value is valid.
    unsafe { transmute::<bindings::pci_device_id, pci::DeviceId>(id) }
}

fn as_raw(pdev: &pci::Device<Bound>) -> *mut bindings::pci_dev {
    // CAST: `Device` is a transparent wrapper.
    from_ref(pdev).cast_mut().cast()
}

/// Keeps a device enabled.
///
/// # Invariants
///
/// The device was enabled for this, and not disabled since.
struct Enabled(ARef<pci::Device>);

impl Drop for Enabled {
    fn drop(&mut self) {
        // CAST: `Device` is a transparent wrapper.
        let pdev = from_ref(&*self.0).cast_mut().cast();
        // SAFETY: By its type invariant the device is valid; by ours it is enabled for this.
        unsafe { bindings::pci_disable_device(pdev) };
    }
}

/// Enables the memory of the device, until it is unbound.
pub(crate) fn enable_device_mem(pdev: &pci::Device<Core<'_>>) -> Result {
    pdev.enable_device_mem()?;
    // INVARIANT: It was just enabled.
    let enabled = Enabled(pdev.into());
    devres::register::<_, Infallible>(pdev.as_ref(), enabled, GFP_KERNEL)
}

/// Lets the device do DMA.
///
/// # Examples
///
/// ```
/// fn run(pdev: &pci::Device<Bound>) {
///     set_master(pdev);
///     // ... DMA ...
///     clear_master(pdev);
/// }
/// ```
pub(crate) fn set_master(pdev: &pci::Device<Bound>) {
    // SAFETY: By its type invariant the device is valid.
    unsafe { bindings::pci_set_master(as_raw(pdev)) };
}

/// Stops the device from doing DMA, see [`set_master`].
pub(crate) fn clear_master(pdev: &pci::Device<Bound>) {
    // SAFETY: By its type invariant the device is valid.
    unsafe { bindings::pci_clear_master(as_raw(pdev)) };
}
