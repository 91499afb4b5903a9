// SPDX-License-Identifier: GPL-2.0

//! Rust mediated device sample: a PCI function that does DMA on command.
//!
//! It pins and writes the user's memory as a vendor driver's virtual device does, so that VFIO's
//! dirty page tracking can be tested. Its programming interface is in
//! `include/uapi/linux/rust_mdev_dma.h`.

// The user and migration data set most numbers: what can overflow must say what it means then, and what
// may not be in a slice what becomes of it. Both are a BUG, the former in kernels with
// `CONFIG_RUST_OVERFLOW_CHECKS`. Modules whose indices were checked before say so.
#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use abstractions::{class::VirtualDevice, mdev, vfio};
use device::{Kind, MdevDma};
use kernel::{device::Core, prelude::*};

mod abstractions;
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

/// The types of device, which differ in the log only.
const TYPES: &[mdev::Type<Kind>] = &[
    mdev::Type {
        sysfs_name: c"dma",
        pretty_name: c"DMA on command",
        info: Kind { logging: false },
    },
    mdev::Type {
        sysfs_name: c"dma-log",
        pretty_name: c"DMA on command, with a log of it",
        info: Kind { logging: true },
    },
];

/// The mdev driver.
struct MdevDriver;

#[vtable]
impl mdev::Driver for MdevDriver {
    type OwnerModule = LocalModule;
    type TypeInfo = Kind;
    type Data<'bound> = ();

    const DEVICE_API: &'static CStr = c"vfio-pci";
    const TYPES: &'static [mdev::Type<Kind>] = if vfio::logging::AVAILABLE {
        TYPES
    } else {
        TYPES.split_at(1).0
    };

    fn max_instances() -> u32 {
        module_parameters::max_instances.value()
    }

    fn probe<'bound>(
        mdev: &'bound mdev::Device<Core<'_>>,
        &kind: &'static Kind,
    ) -> impl PinInit<(), Error> + 'bound {
        vfio::Registration::<MdevDma>::new_foreign_owned(mdev.as_ref(), kind)
    }
}

#[pin_data]
struct RustMdevDma {
    // Dropped in this order: the devices before their parent.
    #[pin]
    _registration: mdev::Registration<MdevDriver>,
    _parent: VirtualDevice,
}

impl kernel::InPlaceModule for RustMdevDma {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _parent: VirtualDevice::new(NAME)?,
            _registration <- mdev::Registration::new(_parent.as_ref()),
        })
    }
}
