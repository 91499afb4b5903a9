// SPDX-License-Identifier: GPL-2.0

//! Abstractions for the bus of mediated devices.
//!
//! A parent device offers types of mediated devices in sysfs; writing a UUID to a type's `create`
//! file creates a [`Device`], to which the [`Driver`] is bound that was registered with the parent.
//!
//! C header: [`include/linux/mdev.h`](srctree/include/linux/mdev.h)

use crate::bindings;
use core::{
    marker::PhantomData,
    mem::offset_of,
    ptr::{from_ref, NonNull},
};
use kernel::{
    container_of, device, driver,
    error::{from_result, to_result},
    prelude::*,
    sync::aref::ARef,
    types::Opaque,
    ModuleMetadata,
};

/// A type of mediated device that a parent offers.
pub(crate) struct Type<I: 'static> {
    /// The name of the type's directory in sysfs, after the parent's `dev_driver_string()` and a
    /// dash.
    pub(crate) sysfs_name: &'static CStr,
    /// The type's `name` attribute.
    pub(crate) pretty_name: &'static CStr,
    /// What the driver knows of devices of this type.
    pub(crate) info: I,
}

/// A driver of mediated devices.
///
/// # Examples
///
/// ```
/// struct MyDriver;
///
/// #[vtable]
/// impl mdev::Driver for MyDriver {
///     type OwnerModule = LocalModule;
///     type TypeInfo = u32;
///     type Data<'bound> = ();
///     const DEVICE_API: &'static CStr = c"vfio-pci";
///     const TYPES: &'static [mdev::Type<u32>] = &[mdev::Type {
///         sysfs_name: c"2",
///         pretty_name: c"With two ports",
///         info: 2,
///     }];
///
///     fn probe<'bound>(
///         mdev: &'bound mdev::Device<Core<'_>>,
///         ports: &'static u32,
///     ) -> impl PinInit<(), Error> + 'bound {
///         vfio::Registration::<MyDevice>::new_foreign_owned(mdev.as_ref(), *ports)
///     }
///
///     fn available(ports: &'static u32) -> u32 {
///         PORTS_LEFT.load(Relaxed) / ports
///     }
/// }
/// ```
#[vtable]
pub(crate) trait Driver: Sized + 'static {
    /// The driver's module.
    type OwnerModule: ModuleMetadata;

    /// What the driver knows of devices of one type.
    type TypeInfo: Sync + 'static;

    /// The driver's data of one device.
    type Data<'bound>: Send + 'bound;

    /// The types' `device_api` attribute, e.g. `vfio-pci`.
    const DEVICE_API: &'static CStr;

    /// The types that the parent offers.
    const TYPES: &'static [Type<Self::TypeInfo>];

    /// A device has been created, of the type with this `info`.
    fn probe<'bound>(
        mdev: &'bound Device<device::Core<'_>>,
        info: &'static Self::TypeInfo,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound;

    /// The device is being removed. `data` is dropped after this.
    fn remove<'bound>(_mdev: &'bound Device<device::Core<'_>>, _data: Pin<&Self::Data<'bound>>) {}

    /// The maximum number of devices of all types, asked for once.
    fn max_instances() -> u32 {
        u32::MAX
    }

    /// How many more devices of a type can be created. A driver that has this counts its devices
    /// itself, and [`Self::max_instances`] has no effect.
    fn available(_info: &'static Self::TypeInfo) -> u32 {
        0
    }
}

/// A mediated device.
///
/// # Invariants
///
/// `self.0` is a valid `struct mdev_device`.
#[repr(transparent)]
pub(crate) struct Device<Ctx: device::DeviceContext = device::Normal>(
    Opaque<bindings::mdev_device>,
    PhantomData<Ctx>,
);

// SAFETY: `Device` is a transparent wrapper of a type that doesn't depend on its generic argument.
kernel::impl_device_context_deref!(unsafe { Device });

impl<Ctx: device::DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: By the type invariant `self.0` is valid, and so is the device in it, as long as
        // the reference to `self`.
        unsafe { device::Device::from_raw(&raw mut (*self.0.get()).dev) }
    }
}

/// A type as the mdev core knows it.
#[repr(C)]
struct RawType<T: Driver> {
    raw: Opaque<bindings::mdev_type>,
    info: &'static T::TypeInfo,
}

impl<T: Driver> RawType<T> {
    fn new(t: &'static Type<T::TypeInfo>) -> Self {
        let mut raw: bindings::mdev_type = pin_init::zeroed();
        raw.sysfs_name = t.sysfs_name.as_char_ptr();
        raw.pretty_name = t.pretty_name.as_char_ptr();
        Self {
            raw: Opaque::new(raw),
            info: &t.info,
        }
    }

    /// # Safety
    ///
    /// `raw` is a type that a [`Registration<T>`] has registered, and still has.
    unsafe fn info(raw: *mut bindings::mdev_type) -> &'static T::TypeInfo {
        // SAFETY: The caller promises that this is the `raw` of a valid `RawType<T>`.
        unsafe { (*container_of!(Opaque::cast_from(raw), Self, raw)).info }
    }
}

/// An adapter for the registration of mdev drivers.
pub(crate) struct Adapter<T: Driver>(PhantomData<T>);

// SAFETY: `mdev_driver` is a C type, and embeds a `device_driver` at this offset. `T::Data` is what
// `probe_callback` makes the device's private data.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = bindings::mdev_driver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(bindings::mdev_driver, driver);
}

// SAFETY: `unregister` is valid for every `DriverType` that `register` succeeded on.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        mdrv: &Opaque<bindings::mdev_driver>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        // SAFETY: The driver isn't registered yet, nothing else uses it.
        unsafe {
            (*mdrv.get()).device_api = T::DEVICE_API.as_char_ptr();
            (*mdrv.get()).max_instances = T::max_instances();
            (*mdrv.get()).probe = Some(Self::probe_callback);
            (*mdrv.get()).remove = Some(Self::remove_callback);
            if T::HAS_AVAILABLE {
                (*mdrv.get()).get_available = Some(Self::available_callback);
            }
            (*mdrv.get()).driver.name = name.as_char_ptr();
            (*mdrv.get()).driver.owner = module.as_ptr();
        }

        // SAFETY: The driver is initialised, and the caller promises that it stays where it is until
        // it is unregistered.
        to_result(unsafe { bindings::mdev_register_driver(mdrv.get()) })
    }

    unsafe fn unregister(mdrv: &Opaque<bindings::mdev_driver>) {
        // SAFETY: The caller promises that the driver is registered.
        unsafe { bindings::mdev_unregister_driver(mdrv.get()) };
    }
}

impl<T: Driver> Adapter<T> {
    /// # Safety
    ///
    /// `mdev` is a valid device of a type of a [`Registration<T>`], which is being bound.
    unsafe extern "C" fn probe_callback(mdev: *mut bindings::mdev_device) -> c_int {
        // CAST: `Device` is a transparent wrapper.
        // SAFETY: The caller promises that the device is valid, and being bound.
        // INVARIANT: The caller promises that `mdev` is valid.
        let dev = unsafe { &*mdev.cast::<Device<device::CoreInternal<'_>>>() };
        // SAFETY: The caller promises that the type is one of a `Registration<T>`. That stays until
        // all its devices are removed.
        let info = unsafe { RawType::<T>::info((*mdev).type_) };

        from_result(|| {
            dev.as_ref().set_drvdata(T::probe(dev, info))?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// `mdev` is a valid device, which `probe_callback` has succeeded on, and is being unbound.
    unsafe extern "C" fn remove_callback(mdev: *mut bindings::mdev_device) {
        // CAST: `Device` is a transparent wrapper.
        // SAFETY: The caller promises that the device is valid, and being unbound.
        // INVARIANT: The caller promises that `mdev` is valid.
        let dev = unsafe { &*mdev.cast::<Device<device::CoreInternal<'_>>>() };
        // SAFETY: `probe_callback` has stored the data, of this type; the driver core takes it when
        // this has returned.
        let data = unsafe { dev.as_ref().drvdata_borrow::<T::Data<'_>>() };

        T::remove(dev, data);
    }

    /// # Safety
    ///
    /// `raw` is a type that a [`Registration<T>`] has registered, and still has.
    unsafe extern "C" fn available_callback(raw: *mut bindings::mdev_type) -> c_uint {
        // SAFETY: The caller promises what this needs.
        T::available(unsafe { RawType::<T>::info(raw) })
    }
}

/// The registration of a [`Driver`], and of a device as the parent that offers its types.
///
/// Dropping it removes all devices that were created, and waits for those that are open.
///
/// # Invariants
///
/// `parent` is registered, with `driver`, `types` and `type_ptrs`, which don't change.
///
/// # Examples
///
/// ```
/// fn register(parent: &device::Device) -> Result<Pin<KBox<mdev::Registration<MyDriver>>>> {
///     KBox::pin_init(mdev::Registration::new(parent), GFP_KERNEL)
/// }
/// ```
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: Driver> {
    #[pin]
    parent: Opaque<bindings::mdev_parent>,
    type_ptrs: KVec<*mut bindings::mdev_type>,
    types: KVec<RawType<T>>,
    /// Unregistered when the parent has been.
    #[pin]
    driver: driver::Registration<Adapter<T>>,
    dev: ARef<device::Device>,
}

// SAFETY: The mdev core does its own locking, and a registration may be removed on any thread.
// There is no other access to the C structures.
unsafe impl<T: Driver> Send for Registration<T> {}

// SAFETY: A shared reference gives no access to anything.
unsafe impl<T: Driver> Sync for Registration<T> {}

impl<T: Driver> Registration<T> {
    /// Registers `T`, under the name of its module, and `dev` as the parent that offers its types.
    pub(crate) fn new(dev: &device::Device) -> impl PinInit<Self, Error> + use<'_, T> {
        // CAST: `Device` is a transparent wrapper.
        let raw_dev: *mut bindings::device = from_ref(dev).cast_mut().cast();
        try_pin_init!(&this in Self {
            driver <- driver::Registration::new(
                T::OwnerModule::NAME,
                const { &T::OwnerModule::THIS_MODULE },
            ),
            types: Self::types()?,
            type_ptrs: Self::type_ptrs(types)?,
            dev: dev.into(),
            // INVARIANT: If this succeeds the parent is registered, with these.
            parent <- Opaque::try_ffi_init(move |parent| {
                // SAFETY: `driver` was initialised above, so it is registered; it isn't moved until
                // `Self::drop` has unregistered the parent. The same holds for `parent`, for the
                // types, whose vector never changes, and for the array of pointers to them. `dev` is
                // valid, and `Self::dev` keeps it valid until after that.
                to_result(unsafe {
                    let this = this.as_ptr();
                    let driver = Self::raw_driver(&(*this).driver);
                    let types = &raw mut (*this).type_ptrs;
                    bindings::mdev_register_parent(
                        parent,
                        raw_dev,
                        driver.as_ptr(),
                        (*types).as_mut_ptr(),
                        // CAST: `T::TYPES` is a list in a source file.
                        (*types).len() as u32,
                    )
                })
            }),
        })
    }

    /// The C driver of a registration. The kernel crate would have this.
    fn raw_driver(
        registration: &driver::Registration<Adapter<T>>,
    ) -> NonNull<bindings::mdev_driver> {
        // A registration consists of the C driver: where all of it is that, so is its beginning.
        const {
            assert!(
                size_of::<driver::Registration<Adapter<T>>>() == size_of::<bindings::mdev_driver>()
            );
        }
        // CAST: As asserted, the C driver is at offset 0.
        NonNull::from(registration).cast()
    }

    fn types() -> Result<KVec<RawType<T>>> {
        let mut types = KVec::with_capacity(T::TYPES.len(), GFP_KERNEL)?;
        for t in T::TYPES {
            types.push(RawType::new(t), GFP_KERNEL)?;
        }
        Ok(types)
    }

    fn type_ptrs(types: &[RawType<T>]) -> Result<KVec<*mut bindings::mdev_type>> {
        let mut ptrs = KVec::with_capacity(types.len(), GFP_KERNEL)?;
        for t in types.iter() {
            ptrs.push(t.raw.get(), GFP_KERNEL)?;
        }
        Ok(ptrs)
    }
}

#[pinned_drop]
impl<T: Driver> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the parent is registered.
        unsafe { bindings::mdev_unregister_parent(self.parent.get()) };
    }
}
