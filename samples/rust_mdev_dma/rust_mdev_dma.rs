// SPDX-License-Identifier: GPL-2.0

//! Rust mediated device sample: a PCI function that does DMA on command.
//!
//! It pins and writes the user's memory as a vendor driver's virtual device does, so that VFIO's
//! dirty page tracking can be tested. Its programming interface is in
//! `include/uapi/linux/rust_mdev_dma.h`.

use abstractions::{class::VirtualDevice, mdev};
use device::MdevDma;
use kernel::prelude::*;

mod abstractions {
    //! Safe abstractions that the `kernel` crate lacks. They are independent of this driver.

    pub(crate) mod class;
    pub(crate) mod eventfd;
    pub(crate) mod mdev;
    pub(crate) mod vfio;
}
mod bindings;
mod device;

module! {
    type: RustMdevDma,
    name: "rust_mdev_dma",
    authors: ["rust-mdev-dma developers"],
    description: "Rust mediated device sample that does DMA on command",
    license: "GPL",
    // For `iova_bitmap_set()`.
    imports_ns: ["IOMMUFD"],
    params: {
        max_instances: u32 {
            default: 16,
            description: "Maximum number of devices",
        },
        max_pins: u64 {
            default: 65536,
            description: "Maximum number of pins of a device, which also bounds the memory it uses",
        },
        max_length: u64 {
            default: 268435456,
            description: "Maximum size of a command's range in bytes",
        },
        raw_pins: bool {
            default: false,
            description: "Offer pins of any IOVA: in today's kernels these can corrupt memory",
        },
    },
}

/// Name of the module, the mdev driver and the parent device.
const NAME: &CStr = c"rust_mdev_dma";

/// The mdev driver.
struct MdevDriver;

impl mdev::Driver for MdevDriver {
    const NAME: &'static CStr = NAME;
    const DEVICE_API: &'static CStr = c"vfio-pci";
    const TYPES: &'static [mdev::Type] = &[
        mdev::Type {
            sysfs_name: c"dma",
            pretty_name: c"DMA on command",
            dma_logging: false,
        },
        mdev::Type {
            sysfs_name: c"dma-log",
            pretty_name: c"DMA on command, with a log of it",
            dma_logging: true,
        },
    ];

    type Operations = MdevDma;
}

struct RustMdevDma {
    // Dropped in this order: the devices before their parent.
    _registration: mdev::Registration<MdevDriver>,
    _parent: VirtualDevice,
}

impl kernel::Module for RustMdevDma {
    fn init(module: &'static ThisModule) -> Result<Self> {
        let parent = VirtualDevice::new(NAME)?;
        let max_instances = module_parameters::max_instances.value();
        Ok(Self {
            _registration: mdev::Registration::new(parent.as_ref(), module, max_instances)?,
            _parent: parent,
        })
    }
}
