// SPDX-License-Identifier: GPL-2.0

//! Devices that do DMA themselves, through an IOMMU.

use super::iommu::{private, Iommu};
use crate::bindings;
use kernel::prelude::*;

/// A device whose parent is behind an IOMMU.
///
/// VFIO attaches the parent's IOMMU group to the user's address space: the device reaches all
/// memory that the user has mapped, at the IOVA where it is mapped, and nothing else. The kernel
/// takes no part in that, so there are no pins.
///
/// The parent's driver must leave DMA to the user: `driver_managed_dma` has to be set, as
/// [`pci::Adapter`](crate::abstractions::pci::Adapter) does, else nobody can use the group.
pub(crate) struct Backed;

impl private::Sealed for Backed {}

impl Iommu for Backed {
    type State = ();

    const OPS: bindings::vfio_device_ops = {
        #[allow(unused_mut)]
        let mut ops: bindings::vfio_device_ops = pin_init::zeroed();
        #[cfg(CONFIG_IOMMUFD)]
        {
            ops.bind_iommufd = Some(bindings::vfio_iommufd_physical_bind);
            ops.unbind_iommufd = Some(bindings::vfio_iommufd_physical_unbind);
            ops.attach_ioas = Some(bindings::vfio_iommufd_physical_attach_ioas);
            ops.detach_ioas = Some(bindings::vfio_iommufd_physical_detach_ioas);
        }
        ops
    };
    const PINS: bool = false;
    const REGISTER: unsafe extern "C" fn(*mut bindings::vfio_device) -> c_int =
        bindings::vfio_register_group_dev;

    fn new_state() -> impl PinInit<()> {
        pin_init::init_zeroed()
    }
}
