// SPDX-License-Identifier: GPL-2.0

//! Virtual devices, each in its own class.
//!
//! C header: [`include/linux/device/class.h`](srctree/include/linux/device/class.h)

use core::ptr::{null_mut, NonNull};
use kernel::{bindings, device, error::from_err_ptr, prelude::*};

/// A class.
///
/// # Invariants
///
/// `self.0` is a class that `class_create()` returned and that hasn't been destroyed.
struct Class(NonNull<bindings::class>);

impl Class {
    fn new(name: &CStr) -> Result<Self> {
        // SAFETY: `name` is a valid string. The class keeps a pointer to it: it is static, see
        // `VirtualDevice::new`.
        let class = from_err_ptr(unsafe { bindings::class_create(name.as_char_ptr()) })?;

        // INVARIANT: The class was just created.
        Ok(Self(NonNull::new(class).ok_or(ENOMEM)?))
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the class is valid. It has no devices left: `VirtualDevice`
        // unregisters its device before it drops the class.
        unsafe { bindings::class_destroy(self.0.as_ptr()) };
    }
}

/// A device without hardware and without a bus, the only one of its class.
///
/// `dev_driver_string()` of a device that has neither driver nor bus is the name of its class, so a
/// class of its own gives a virtual device a `dev_driver_string()` of its own.
///
/// # Examples
///
/// ```
/// let parent = VirtualDevice::new(c"my_driver")?;
/// dev_info!(parent.as_ref(), "created\n");
/// ```
///
/// # Invariants
///
/// `dev` is a registered device of `class`.
pub(crate) struct VirtualDevice {
    dev: NonNull<bindings::device>,
    _class: Class,
}

// SAFETY: The driver core does its own locking; a device may be unregistered from any thread.
unsafe impl Send for VirtualDevice {}

// SAFETY: A shared reference only gives access to a shared reference to the `Device`, which is
// `Sync`.
unsafe impl Sync for VirtualDevice {}

impl VirtualDevice {
    /// Creates the class `name`, and the device `name` in it.
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        let class = Class::new(name)?;

        // SAFETY: The class is valid, there is no parent and no device number, and the argument of
        // "%s" is a valid string.
        let dev = from_err_ptr(unsafe {
            bindings::device_create(
                class.0.as_ptr(),
                null_mut(),
                0,
                null_mut(),
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        })?;

        // INVARIANT: The device was just registered.
        Ok(Self {
            dev: NonNull::new(dev).ok_or(ENOMEM)?,
            _class: class,
        })
    }
}

impl AsRef<device::Device> for VirtualDevice {
    fn as_ref(&self) -> &device::Device {
        // SAFETY: By the type invariant the device is valid for as long as `self` is.
        unsafe { device::Device::from_raw(self.dev.as_ptr()) }
    }
}

impl Drop for VirtualDevice {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the device is registered. The class is dropped after it.
        unsafe { bindings::device_unregister(self.dev.as_ptr()) };
    }
}
