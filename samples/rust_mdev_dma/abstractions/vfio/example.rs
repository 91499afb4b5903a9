// SPDX-License-Identifier: GPL-2.0

//! The example in the documentation of `vfio`, which is compiled this way.

use crate::{
    abstractions::{mdev, vfio},
    bindings::VFIO_REGION_INFO_FLAG_READ,
};
use kernel::{device::Core, prelude::*, uaccess::UserSliceWriter};

/// An open device. It has one region, to be read, with what its type says.
struct Greeter;

#[vtable]
impl vfio::Operations for Greeter {
    type OwnerModule = crate::LocalModule;
    type Iommu = vfio::Emulated;
    type Data = &'static str;

    const NAME: &'static CStr = c"greeter";

    fn open(_dev: &vfio::OpenDevice<Self>) -> impl PinInit<Self, Error> {
        Ok(Self)
    }

    fn info(self: Pin<&Self>, _dev: &vfio::OpenDevice<Self>) -> vfio::DeviceInfo {
        vfio::DeviceInfo {
            flags: 0,
            num_regions: 1,
        }
    }

    fn region_info(
        self: Pin<&Self>,
        dev: &vfio::OpenDevice<Self>,
        _index: u32,
    ) -> Result<vfio::RegionInfo> {
        Ok(vfio::RegionInfo {
            flags: VFIO_REGION_INFO_FLAG_READ,
            size: dev.data().len() as u64,
            offset: 0,
        })
    }

    fn read(
        self: Pin<&Self>,
        dev: &vfio::OpenDevice<Self>,
        mut buf: UserSliceWriter,
        offset: u64,
    ) -> Result<usize> {
        let rest = dev.data().as_bytes().get(offset.try_into()?..);
        let rest = rest.ok_or(EINVAL)?;
        let part = rest.get(..buf.len()).unwrap_or(rest);
        buf.write_slice(part)?;
        Ok(part.len())
    }
}

struct GreeterDriver;

#[vtable]
impl mdev::Driver for GreeterDriver {
    type OwnerModule = crate::LocalModule;
    type TypeInfo = &'static str;
    type Data<'bound> = ();

    const DEVICE_API: &'static CStr = c"greeter";
    const TYPES: &'static [mdev::Type<&'static str>] = &[mdev::Type {
        sysfs_name: c"english",
        pretty_name: c"Polite, in English",
        info: "Good morning",
    }];

    fn probe<'bound>(
        mdev: &'bound mdev::Device<Core<'_>>,
        &greeting: &'static &'static str,
    ) -> impl PinInit<(), Error> + 'bound {
        vfio::Registration::<Greeter>::new_foreign_owned(mdev.as_ref(), greeting)
    }
}
