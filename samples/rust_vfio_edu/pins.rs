// SPDX-License-Identifier: GPL-2.0

//! The one place where this driver does what no other may.

use crate::{
    abstractions::vfio::{OpenDevice, Pins},
    device::EduDevice,
};

/// Locks the pins of a device that has an IOMMU.
pub(crate) fn pins(dev: &OpenDevice<EduDevice>) -> Pins<'_, EduDevice> {
    // SAFETY: This driver is for tests of VFIO and nothing else, as Kconfig, the module's
    // description and the uapi header say; it binds to devices only by `driver_override`. The user
    // has no other access to the device than through commands, and of these only those that call
    // `round_trip()` make it access memory: for pages that are pinned, with the pins locked, and
    // when it returns the engine is idle or off. The engine is off whenever the device isn't open.
    unsafe { dev.pins_for_tests_only() }
}
